#!/usr/bin/env bash
# Sweep the trainer's throughput over shapes and settings, and write one comparison page.
#
#   launch/bench_throughput.sh                                     # the defaults below, on the GPUs of this machine
#   launch/bench_throughput.sh --shapes "llama-3-8b:all qwen2.5-32b:4,8" --recompute "off all" --zero 3
#   launch/bench_throughput.sh --hostfile hosts                    # many nodes
#   launch/bench_throughput.sh --shapes tiny:2 --pack-lens 256 -- --dtype fp32 --steps 4   # a CPU, one minute
#
# A shape is NAME or NAME:LAYERS, where LAYERS are slices of the model (4,8) or "all"; see versatune-ds bench.
# Everything after -- goes to every benchmark. Results: FOLDER/*.json, *.md, comparison.md; a setting that fails
# (out of memory, say) is noted in FOLDER/failures.txt and the sweep goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/bench
shapes="llama-3-8b:all qwen2.5-7b:all qwen2.5-14b:4,8 qwen2.5-32b:4,8"
pack_lens=8192
packs_per_rank=8
recompute=auto
zero_stages=3
hostfile=
ranks=

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }
while (($#)); do
    case $1 in
        --out) out=$2; shift 2 ;;
        --shapes) shapes=$2; shift 2 ;;
        --pack-lens) pack_lens=$2; shift 2 ;;
        --packs-per-rank) packs_per_rank=$2; shift 2 ;;
        --recompute) recompute=$2; shift 2 ;;
        --zero) zero_stages=$2; shift 2 ;;
        --ranks) ranks=$2; shift 2 ;;
        --hostfile) hostfile=$2; shift 2 ;;
        --help|-h) usage; exit 0 ;;
        --) shift; break ;;
        *) echo "bench_throughput.sh: unknown option $1; see --help" >&2; exit 2 ;;
    esac
done
ranks=${ranks:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$out"
: > "$out/failures.txt"

bench() {
    if [[ -n $hostfile ]]; then
        deepspeed --hostfile "$hostfile" launch/bench.py "$@"
    elif ((ranks > 1)); then
        deepspeed --num_gpus "$ranks" launch/bench.py "$@"
    else
        python launch/bench.py "$@"
    fi
}

for shape in $shapes; do
    name=${shape%%:*}
    layers=${shape#"$name"}
    layers=${layers#:}
    slice=()
    if [[ -n $layers && $layers != all ]]; then slice=(--layers "$layers"); fi
    for pack_len in $pack_lens; do
        for packs in $packs_per_rank; do
            for policy in $recompute; do
                for zero in $zero_stages; do
                    label="$name ${layers:-all} layers, $packs x $pack_len, recompute $policy, ZeRO-$zero"
                    echo "== $label" >&2
                    if ! bench --shape "$name" ${slice[@]+"${slice[@]}"} --pack-len "$pack_len" \
                        --packs-per-rank "$packs" --checkpointing "$policy" --zero "$zero" --out "$out" "$@"; then
                        echo "$label" >> "$out/failures.txt"
                    fi
                done
            done
        done
    done
done
python -m versatune_ds.cli.main bench --page "$out"
