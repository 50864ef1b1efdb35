"""The shell scripts: they parse, pass shellcheck if it is installed, and the wheel script does its work."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from launching import REPOSITORY, free_port
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPTS = [
    *sorted(
        path
        for folder in ("launch", "tests")
        for pattern in ("**/*.sh", "**/*.sbatch")
        for path in (REPOSITORY / folder).glob(pattern)
    ),
    *sorted((REPOSITORY / ".ci").iterdir()),
]
WHEELS = REPOSITORY / "launch" / "airgapped_wheels.sh"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_can_be_run(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    command = ["shellcheck", "--external-sources", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run(["hadolint", str(REPOSITORY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_follows_the_pinned_versions():
    """torch from PyPI is built for one CUDA: a new one in constraints.txt needs a look at the base image."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines, "the base of the Dockerfile must have the CUDA of the new torch"
    text = (REPOSITORY / "Dockerfile").read_text()
    assert re.search(r"^FROM nvidia/cuda:13\.0\.\d+-devel-ubuntu24\.04@sha256:[0-9a-f]{64}$", text, re.M)
    assert text.count("-c constraints.txt") == 2


def tiny_wheel(folder: Path, name: str, *requires: str) -> None:
    """A wheel of one module, written by hand."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = {
        f"{name}.py": "VALUE = 7\n",
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, text)


@pytest.fixture
def index(tmp_path) -> Path:
    """A folder that stands for the package index: `outer` needs `inner`."""
    folder = tmp_path / "index"
    folder.mkdir()
    tiny_wheel(folder, "outer", "inner")
    tiny_wheel(folder, "inner")
    return folder


def run_wheels(*arguments: str, index: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    """The script with pip cut off from everything but `index`."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", **more}
    if index is not None:
        environment["PIP_FIND_LINKS"] = str(index)
    return subprocess.run(
        ["bash", str(WHEELS), *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def test_wheels_are_downloaded_with_what_they_need_and_installed_from_the_folder(index, tmp_path):
    folder, site = tmp_path / "wheels", tmp_path / "site"
    options = ("--folder", str(folder), "--packages", "outer")
    down = run_wheels("download", *options, "--constraints", os.devnull, index=index)
    assert down.returncode == 0, down.stderr
    assert {path.name for path in folder.glob("*.whl")} == {
        "outer-1.0-py3-none-any.whl",
        "inner-1.0-py3-none-any.whl",
    }
    shutil.rmtree(index)
    installed = run_wheels("install", *options, "--target", str(site))
    assert installed.returncode == 0, installed.stderr
    assert (site / "outer.py").is_file() and (site / "inner.py").is_file()


def test_a_damaged_or_unfinished_folder_is_refused(index, tmp_path):
    folder = tmp_path / "wheels"
    options = ("--folder", str(folder), "--packages", "outer")
    missing = run_wheels("download", "--folder", str(folder), "--packages", "absent", index=index)
    assert missing.returncode != 0 and not (folder / "SHA256SUMS").exists()
    unfinished = run_wheels("install", *options)
    assert unfinished.returncode == 4 and "did not finish" in unfinished.stderr
    assert run_wheels("download", *options, index=index).returncode == 0
    assert run_wheels("verify", "--folder", str(folder)).returncode == 0
    (folder / "inner-1.0-py3-none-any.whl").write_bytes(b"broken")
    damaged = run_wheels("install", *options, "--target", str(tmp_path / "site"))
    assert damaged.returncode == 4 and "damaged" in damaged.stderr
    assert not (tmp_path / "site").exists()


def test_another_python_is_refused(tmp_path):
    done = run_wheels("download", "--folder", str(tmp_path), "--packages", "outer", "--python", "3.99")
    assert done.returncode == 2 and "Python 3.99" in done.stderr


def unpacked(folder: Path, name: str, into: Path) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(into)


def test_beside_what_a_host_has_only_what_it_lacks_is_installed(tmp_path):
    """`hosted` stays the host's own although the folder has it; `old` is too old; nobody has `absent`."""
    folder, host, site = (tmp_path / name for name in ("wheels", "host", "site"))
    folder.mkdir()
    tiny_wheel(
        folder, "outer", "inner", "hosted>=1", "old>=1", "absent", "elsewhere; sys_platform == 'win32'"
    )
    for name in ("inner", "hosted", "old", "unasked"):
        tiny_wheel(folder, name)
    unpacked(folder, "hosted", host)
    unpacked(folder, "old", host)
    (host / "old-1.0.dist-info").rename(host / "old-0.9.dist-info")
    metadata = host / "old-0.9.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 0.9"))
    sums = subprocess.run("sha256sum *.whl", shell=True, cwd=folder, capture_output=True, check=True).stdout
    (folder / "SHA256SUMS").write_bytes(sums)

    options = ("--folder", str(folder), "--packages", "outer", "--target", str(site))
    done = run_wheels("install", *options, PYTHONPATH=str(host))
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in site.glob("*.py")} == {"outer", "inner", "old"}
    assert done.stderr.count("not here") == 1 and "absent (for outer)" in done.stderr


def test_for_a_host_with_torch_wheels_come_by_name_and_for_any_python(index, tmp_path):
    options = ("--folder", str(tmp_path / "wheels"), "--packages", "outer", "--beside-torch")
    done = run_wheels("download", *options, "--python", "3.99", index=index)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "wheels").glob("*.whl")] == ["outer-1.0-py3-none-any.whl"]


def test_every_dependency_is_carried_or_left_to_the_host_on_purpose():
    script = WHEELS.read_text()
    carried = set(re.search(r'^runtime="([^"]*)"', script, re.MULTILINE).group(1).split())
    setup = (REPOSITORY / "setup.py").read_text()
    required = setup[setup.index("install_requires=[") : setup.index("extras_require")]
    declared = set(re.findall(r'"([\w.-]+)>=', required))
    brought_by_torch = {
        "torch",
        "transformers",
        "numpy",
        "safetensors",
        "pyyaml",
        "filelock",
        "tqdm",
        "jinja2",
        "httpx",
        "fsspec",
    }
    left_out = set(
        re.findall(r"[\w-]+(?= \()", script[script.index("# What a host") : script.index("runtime=")])
    )
    assert left_out == {"pyarrow", "matplotlib", "scikit-learn", "scipy"}
    assert declared - carried - brought_by_torch == left_out and not carried & brought_by_torch
    # and what the carried ones need in turn
    host = needed_by({"torch", "transformers", *brought_by_torch})
    assert not needed_by(carried) - carried - host


def needed_by(names: set[str]) -> set[str]:
    """These distributions and all that they require here without an extra, in turn."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        required = map(Requirement, importlib.metadata.requires(name) or [])
        waiting += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_training_needs_nothing_that_is_left_out():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'matplotlib', 'sklearn']))\n"
        "import versatune_ds.cli.main, versatune_ds.data.cache.prepare, versatune_ds.engine.run"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["airgapped_wheels.sh", "bench_throughput.sh"])
def test_help_and_unknown_options(script):
    path = str(REPOSITORY / "launch" / script)
    arguments = ["download"] if script.startswith("airgapped") else []
    shown = subprocess.run(["bash", path, *arguments, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and script in shown.stdout
    wrong = subprocess.run(["bash", path, *arguments, "--flder", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--flder" in wrong.stderr


FAKE_TORCH = """
import os, types

cuda = types.SimpleNamespace(
    device_count=lambda: int(os.environ["GPUS"]),
    is_bf16_supported=lambda including_emulation: including_emulation or os.environ["BF16"] == "1",
)
"""


@pytest.mark.parametrize(
    ("gpus", "has_bf16", "ranks", "dtype"),
    [(0, False, 2, "fp32"), (1, True, 1, "bf16"), (3, True, 2, "bf16"), (1, False, 1, "fp32")],
)
def test_the_quick_start_takes_bf16_where_gpus_have_it(tmp_path, gpus, has_bf16, ranks, dtype):
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    for program in ("deepspeed", "versatune-ds"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho "{program} $*" >> "$CALLS"\n')
        (tmp_path / program).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path),
        "GPUS": str(gpus),
        "BF16": str(int(has_bf16)),
        "CALLS": str(tmp_path / "calls"),
    }
    script = REPOSITORY / "launch" / "quickstart.sh"
    done = subprocess.run(
        [script], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    (training,) = [call for call in calls if call.startswith("deepspeed ")]
    assert f" --num_gpus {ranks} " in training
    assert training.endswith(f"launch/train.py --config configs/quickstart.yaml model.dtype={dtype}")


@pytest.mark.slow
def test_a_sweep_leaves_results_failures_and_one_page(tmp_path):
    """Two settings of a tiny model, of which one cannot be."""
    command = [
        "bash", str(REPOSITORY / "launch" / "bench_throughput.sh"), "--shapes", "tiny:2 no-such-shape",
        "--pack-lens", "128", "--packs-per-rank", "1", "--recompute", "off", "--ranks", "1",
        "--out", str(tmp_path), "--", "--dtype", "fp32", "--steps", "2", "--warmup-steps", "1",
        "--split-steps", "1", "--metrics", "off",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    failures = (tmp_path / "failures.txt").read_text()
    assert failures == "no-such-shape all layers, 1 x 128, recompute off, ZeRO-3\n"
    (result,) = tmp_path.glob("*.json")
    assert json.loads(result.read_text())["slices"][0]["layers"] == 2
    page = (tmp_path / "comparison.md").read_text()
    assert "| tiny" in page and f"Not measured:\n\n- {failures}" in page


@pytest.mark.parametrize(
    ("output", "errors", "status", "code", "says"),
    [
        ("", "No known vulnerabilities found", 0, 0, "no installed package is known to be vulnerable"),
        ("torch 1.0 CVE-1", "Found 1 known vulnerability", 1, 1, "torch 1.0 CVE-1"),
        ("", "requests.exceptions.ConnectionError: no such host", 1, 0, "skipped: the database"),
        ("", "error: unrecognized arguments", 2, 1, "unrecognized arguments"),
        (None, "", 0, 0, "skipped: "),
    ],
)
def test_the_audit_fails_on_findings_and_skips_with_a_reason(tmp_path, output, errors, status, code, says):
    program = tmp_path / "pip-audit"
    if output is not None:
        program.write_text(f"#!/bin/sh\nprintf '%s' '{output}'\necho '{errors}' >&2\nexit {status}\n")
        program.chmod(0o755)
    done = subprocess.run(
        [str(REPOSITORY / ".ci" / "audit")],
        env={**os.environ, "PIP_AUDIT": str(program)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout


@pytest.mark.parametrize(
    ("install", "tests", "code", "says"),
    [
        ("exit 0", "exit 0", 0, "the tests run"),
        ("exit 0", "exit 1", 2, "the tests run"),
        ("sleep 60", "exit 0", 0, "skipped: not installed within 1 s"),
        (
            "echo 'ERROR: Could not find a version that satisfies torch'; echo 'make: *** Error 1'; exit 2",
            "exit 0",
            0,
            "skipped: the wheels cannot be had: ERROR: Could not find a version that satisfies torch",
        ),
        ("echo 'ERROR: ResolutionImpossible: for help visit'; exit 2", "exit 0", 1, "ResolutionImpossible"),
        ("echo 'error: metadata-generation-failed'; exit 2", "exit 0", 1, "metadata-generation-failed"),
    ],
)
def test_the_oldest_versions_are_tested_where_they_can_be_had(tmp_path, install, tests, code, says):
    """With a `make` that does as told: what is ours to mend fails, wheels that cannot be had are a skip."""
    make = tmp_path / "make"
    make.write_text(
        f"#!/bin/bash\n[[ $1 == test-oldest ]] || {{ {install}; }}\n"
        f"if [[ $1 == test-oldest ]]; then echo the tests run; ({tests}) || exit 2; fi\n"
    )
    make.chmod(0o755)
    done = subprocess.run(
        [str(REPOSITORY / ".ci" / "oldest")],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OLDEST_LIMIT": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout
