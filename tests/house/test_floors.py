"""Imports go down the floors or stay on one, never up; only the engine knows DeepSpeed and model classes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY

FLOORS = ["foundations", "config", "domain", "data", "observability", "engine", "apps", "cli"]
PACKAGE = REPOSITORY / "versatune_ds"
KERNELS = REPOSITORY / "kernels" / "versatune_kernels"


def imported_modules(file: Path) -> list[str]:
    """Every module a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(file: Path, floor: str) -> list[str]:
    """Imports of a file that its floor does not allow."""
    bad = []
    for module in imported_modules(file):
        parts = module.split(".")
        inside = parts[0] == "versatune_ds" and len(parts) > 1 and parts[1] in FLOORS
        if inside and FLOORS.index(parts[1]) > FLOORS.index(floor):
            bad.append(f"{module} is on a higher floor")
        if parts[0] == "deepspeed" and floor != "engine":
            bad.append(f"{module}: only the engine imports deepspeed")
        if parts[0] == "versatune_kernels" and floor != "engine":
            bad.append(f"{module}: only the engine calls the kernels")
        if parts[0] in ("torch", "transformers") and floor in ("foundations", "config", "domain"):
            allowed = floor == "foundations" and file.name == "distributed.py"
            if not allowed:
                bad.append(f"{module} on floor {floor}")
    return bad


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down(floor):
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    problems = {file.name: bad for file in files if (bad := violations(file, floor))}
    assert not problems


def test_every_folder_is_a_floor():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == {*FLOORS, "sample"}  # `sample` holds data files only


def test_kernels_never_import_the_trainer():
    for file in KERNELS.rglob("*.py"):
        assert not [m for m in imported_modules(file) if m.split(".")[0] == "versatune_ds"], file


def test_the_rule_sees_an_upward_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from versatune_ds.engine.train import train\n    return train\n")
    assert violations(bad, "domain") == ["versatune_ds.engine.train.train is on a higher floor"]
    assert not violations(bad, "cli")


def test_help_does_not_load_torch():
    code = (
        "import sys\n"
        "from versatune_ds.cli.main import build_parser\n"
        "build_parser().format_help()\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_loop_stays_readable():
    """The file that tells the story is at most 350 lines."""
    assert len((PACKAGE / "engine" / "train.py").read_text().splitlines()) <= 350


def test_the_entry_for_launchers_is_thin():
    assert len((REPOSITORY / "launch" / "train.py").read_text().splitlines()) < 80
