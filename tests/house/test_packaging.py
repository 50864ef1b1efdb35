"""What gets installed: exactly two packages, with their data; and `kernels` is never ours."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile

import pytest
from launching import REPOSITORY


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """Names inside a wheel built from a copy of the sources."""
    import shutil

    copy = tmp_path_factory.mktemp("sources") / "repository"
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")
    at_the_top = {"runs", "cache", "build"}
    shutil.copytree(
        REPOSITORY,
        copy,
        ignore=lambda path, names: ignore(path, names) | (at_the_top if path == str(REPOSITORY) else set()),
    )
    out = copy.parent / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_exactly_two_packages(wheel_names):
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"versatune_ds", "versatune_kernels"}


@pytest.mark.parametrize(
    "name",
    [
        "versatune_ds/py.typed",
        "versatune_kernels/py.typed",
        "versatune_ds/sample/train/law.jsonl",
        "versatune_ds/sample/train/medicine.json",
        "versatune_ds/sample/eval/other.jsonl",
        "versatune_ds/data/encode/templates/chatml.jinja",
    ],
)
def test_wheel_holds_data(wheel_names, name):
    assert name in wheel_names


def test_wheel_holds_every_data_file_of_the_packages(wheel_names):
    """A new template or sample file that setup.py forgets is found here."""
    listed = subprocess.run(
        ["git", "ls-files", "versatune_ds", "kernels/versatune_kernels"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = {name.removeprefix("kernels/") for name in listed}
    assert not expected - set(wheel_names)


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_transformers_models_import_from_the_repository_root(safe_path):
    """Hugging Face probes for a package named `kernels`; our folder of that name must not answer."""
    import os

    code = "from transformers import LlamaForCausalLM; import versatune_kernels; print('fine')"
    environment = {**os.environ, "PYTHONSAFEPATH": safe_path}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert out.stdout.strip().endswith("fine"), out.stderr


def test_the_oldest_versions_tested_are_those_declared():
    """`make test-oldest` proves the lower bounds of setup.py, all of them and no others."""
    setup = (REPOSITORY / "setup.py").read_text()
    required = setup[setup.index("install_requires=[") : setup.index("extras_require")]
    declared = dict(re.findall(r'"([\w.-]+)>=([\d.]+)', required))
    possible = declared | dict(re.findall(r'["\']([\w.-]+)>=([\d.]+)', setup))
    lines = (REPOSITORY / "constraints-oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert declared.keys() <= tested.keys() <= possible.keys() and "triton" in tested
    for name, version in tested.items():
        assert f"{version}.".startswith(f"{possible[name]}."), f"{name}: {version} is not {possible[name]}"
