#!/usr/bin/env bash
# Everything a host without network needs: download the wheels here, carry the folder over, install from it there.
#
#   launch/airgapped_wheels.sh download --folder wheels [--extras cuda,tracking] [--beside-torch] [--python 3.12]
#   launch/airgapped_wheels.sh install  --folder wheels [--extras cuda,tracking] [--target FOLDER]
#   launch/airgapped_wheels.sh verify   --folder wheels
#
# download  asks pip for versatune-ds of this checkout, its dependencies at the versions of constraints.txt, and
#           the tools that install them. Packages that exist as source only (--build; by default deepspeed) become
#           wheels here. Writes SHA256SUMS last, so a folder that has it is complete.
#           --beside-torch: for a host that has torch and transformers of its own. Only what such a host lacks, by name
#           and without dependencies; --extras compare adds what trainers are compared with. --python may then be
#           another than this one.
# install   checks the hashes and installs with pip's --no-index: nothing is fetched, or it fails. With --target, for
#           PYTHONPATH: only what the host lacks goes into that folder; its torch and all else stay as they are.
# verify    checks the hashes.
#
# Other options: --packages "A B" instead of versatune-ds; --constraints FILE; --build "A B"; --platform TAG, repeated;
# --index-options "..." (handed to pip as they are, for a mirror or a CUDA build of torch).
# docs/airgapped.md has the steps for a cluster. Which index pip asks is pip's own setting.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }
fail() { echo "airgapped_wheels.sh: $1" >&2; exit "${2:-2}"; }

(($#)) || { usage; exit 2; }
mode=$1
shift
folder=
extras=
packages=
python_version=
platforms=()
constraints=$root/constraints.txt
build="deepspeed"
index_options=
target=
beside=
# What a host with torch and transformers lacks of versatune-ds' dependencies and theirs. Left out, for their size:
# pyarrow (parquet files), matplotlib (pictures, report), scikit-learn (topic classifier), scipy (its own need).
runtime="deepspeed hjson msgpack ninja py-cpuinfo einops psutil accelerate sentencepiece protobuf zstandard pydantic
    pydantic-core annotated-types typing-inspection typing-extensions"
compare="liger-kernel trl datasets dill multiprocess xxhash cut-cross-entropy torchao"
while (($#)); do
    case $1 in
        --folder) folder=$2; shift 2 ;;
        --extras) extras=$2; shift 2 ;;
        --packages) packages=$2; shift 2 ;;
        --python) python_version=$2; shift 2 ;;
        --platform) platforms+=("$2"); shift 2 ;;
        --constraints) constraints=$2; shift 2 ;;
        --build) build=$2; shift 2 ;;
        --index-options) index_options=$2; shift 2 ;;
        --beside-torch) beside=1; shift ;;
        --target) target=$2; shift 2 ;;
        --help | -h) usage; exit 0 ;;
        *) fail "unknown option $1; see --help" ;;
    esac
done
[[ -n $folder ]] || { [[ $mode == --help || $mode == -h ]] && { usage; exit 0; }; fail "give --folder"; }

python=${PYTHON:-python3}
own="versatune-ds${extras:+[$extras]}"
read -r -a wanted <<< "${packages:-$own}"

verify() {
    [[ -f $folder/SHA256SUMS ]] || fail "$folder has no SHA256SUMS: the download did not finish; run it again" 4
    (cd "$folder" && sha256sum --check --quiet SHA256SUMS) || fail "$folder is damaged; copy it again" 4
}

download() {
    local here pip_download wheel_options=()
    here=$("$python" -c 'import sys; print(".".join(map(str, sys.version_info[:2])))')
    python_version=${python_version:-$here}
    # pip takes environment markers ("python_version >= 3.11", "Linux") from the Python that runs it.
    if [[ -z $beside && $python_version != "$here" ]]; then
        fail "the wheels are for Python $python_version and this is $here: pip would choose dependencies for $here. \
Set PYTHON to a Python $python_version"
    fi
    mkdir -p "$folder"
    rm -f "$folder/SHA256SUMS"
    [[ -f $constraints ]] && wheel_options+=(-c "$constraints")
    read -r -a index <<< "$index_options"
    if [[ -z $packages ]]; then
        echo "building the wheel of this checkout" >&2
        # From a copy: setuptools leaves build/ behind, and would pack old files from it the next time.
        copy=$(mktemp -d)
        trap 'rm -rf "$copy"' EXIT
        cp -r "$root"/{setup.py,pyproject.toml,README.md,LICENSE,versatune_ds,kernels} "$copy"
        "$python" -m pip wheel -q --no-deps -w "$folder" "$copy"
    fi
    for package in $build; do
        needs "$package" || continue
        echo "building a wheel of $package" >&2
        # DeepSpeed compiles its kernels on the host that runs them; DS_BUILD_OPS=0 makes a wheel for any host.
        DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps "${wheel_options[@]}" ${index[@]+"${index[@]}"} \
            -w "$folder" "$package"
    done
    pip_download=("$python" -m pip download -q --only-binary=:all: --find-links "$folder" -d "$folder")
    pip_download+=("${wheel_options[@]}" ${index[@]+"${index[@]}"})
    if [[ $python_version != "$here" ]] && ! ((${#platforms[@]})); then
        for tag in manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_17 manylinux2014 manylinux_2_12; do
            platforms+=("${tag}_$(uname -m)")
        done
    fi
    if ((${#platforms[@]})); then
        pip_download+=(--python-version "$python_version" --implementation cp)
        for tag in "${platforms[@]}"; do pip_download+=(--platform "$tag"); done
    fi
    if [[ -n $beside ]]; then
        read -r -d '' -a names <<< "${packages:-$runtime} $([[ ,$extras, != *,compare,* ]] || echo "$compare")" || true
        echo "downloading ${names[*]}" >&2
        "${pip_download[@]}" --no-deps "${names[@]}"
    else
        echo "downloading ${wanted[*]} and what they need" >&2
        "${pip_download[@]}" "${wanted[@]}"
        if [[ -z $packages ]]; then "${pip_download[@]}" pip "setuptools>=77" wheel ninja; fi
    fi
    (cd "$folder" && sha256sum -- *.whl > .sums && mv .sums SHA256SUMS)
    echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f1), in $folder"
}

# Whether a source-only package is among what is wanted: only versatune-ds needs DeepSpeed.
needs() {
    [[ -z $packages ]] && return 0
    for wish in "${wanted[@]}"; do [[ $wish == "$1" || $wish == "$1"[=\<\>]* ]] && return 0; done
    return 1
}

install() {
    verify
    local options=(--no-index --find-links "$folder")
    if [[ -z $target ]]; then
        "$python" -m pip install -q "${options[@]}" "${wanted[@]}"
        "$python" -m pip check
    else
        local roots=("${wanted[@]}") lacking=()
        if [[ -z $packages && ,$extras, == *,compare,* ]]; then
            read -r -a rivals <<< "$compare"
            roots=(versatune-ds "${rivals[@]}")
        fi
        mapfile -t lacking < <("$python" "$root/launch/airgapped_missing.py" "$folder" "${roots[@]}")
        ((${#lacking[@]})) || fail "the wheels of $folder could not be chosen" 4
        "$python" -m pip install -q --no-deps --no-index --target "$target" "${lacking[@]}"
    fi
    echo "installed ${wanted[*]} from $folder${target:+ into $target: put it into PYTHONPATH}"
}

case $mode in
    download) download ;;
    install) install ;;
    verify) verify; echo "$folder is complete" ;;
    *) fail "unknown mode $mode; download, install or verify" ;;
esac
