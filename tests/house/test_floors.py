"""Imports go down the floors or stay on one, never up; one room knows DeepSpeed; and what may only shrink.

Numbers in the lists of exceptions may only fall: an exception that is not needed any more must go.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from launching import REPOSITORY

WITHOUT_TORCH = ["foundations", "strategies", "config", "domain"]
FLOORS = [*WITHOUT_TORCH, "data", "observability", "engine", "report", "apps", "cli"]
PACKAGE = REPOSITORY / "versatune_ds"
KERNELS = REPOSITORY / "kernels" / "versatune_kernels"
BACKEND = PACKAGE / "engine" / "backend"

MAX_FILES = 12
"""Python files in a folder, besides `__init__.py`."""
FULLER_FOLDERS = {"cli": 18}
MAX_LINES = 450
LONGER_FILES: dict[str, int] = {}
STORY_LINES = 253
"""Of `engine/train.py`."""


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
        if parts[0] == "deepspeed" and BACKEND not in file.parents:
            bad.append(f"{module}: only engine/backend imports deepspeed")
        if parts[0] == "versatune_kernels" and floor not in ("engine", "apps"):
            bad.append(f"{module}: only the engine and the programs over it know the kernels")
        if parts[0] in ("torch", "transformers") and floor in WITHOUT_TORCH:
            allowed = floor == "foundations" and file.name == "distributed.py"
            if not allowed:
                bad.append(f"{module} on floor {floor}")
    return bad + [f"{name}: only engine/backend knows what DeepSpeed adds" for name in deepspeed_names(file)]


def deepspeed_names(file: Path) -> list[str]:
    """Attributes that DeepSpeed gives to parameters (`ds_...`), asked for outside of engine/backend."""
    if BACKEND in file.parents:
        return []
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    found = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    asked = [node.args[1] for node in nodes if isinstance(node, ast.Call) and len(node.args) > 1]
    found += [node.value for node in asked if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [name for name in found if name.startswith("ds_")]


def too_many(counts: dict[str, int], limit: int, exceptions: dict[str, int]) -> list[str]:
    """What is over the limit or over its exception, and exceptions that nothing needs."""
    bad = [f"{name}: {n}" for name, n in counts.items() if n > exceptions.get(name, limit)]
    return bad + [f"{name}: no exception needed" for name in exceptions if not limit < counts.get(name, 0)]


def lines_of_files(root: Path) -> dict[str, int]:
    """Lines of each Python file below a folder."""
    return {
        str(file.relative_to(root)): len(file.read_text(encoding="utf-8").splitlines())
        for file in sorted(root.rglob("*.py"))
    }


def files_of_folders(root: Path) -> dict[str, int]:
    """Python files of each folder below a folder, besides `__init__.py`."""
    folders = Counter(str(file.parent.relative_to(root)) for file in root.rglob("*.py"))
    inits = Counter(str(file.parent.relative_to(root)) for file in root.rglob("__init__.py"))
    return dict(folders - inits)


def classes_named_twice(roots: Iterable[Path]) -> set[str]:
    """Names that more than one class below these folders has."""
    names = Counter(
        node.name
        for root in roots
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    return {name for name, count in names.items() if count > 1}


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


def test_the_rule_sees_deepspeed_outside_of_its_room(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import deepspeed\nsize = getattr(p, 'ds_numel', 0)\nshape = p.ds_shape\nstate = p.shape\n"
    )
    assert violations(bad, "engine") == [
        "deepspeed: only engine/backend imports deepspeed",
        "ds_shape: only engine/backend knows what DeepSpeed adds",
        "ds_numel: only engine/backend knows what DeepSpeed adds",
    ]


def test_rooms_and_files_stay_small():
    assert not too_many(files_of_folders(PACKAGE), MAX_FILES, FULLER_FOLDERS)
    assert not too_many(lines_of_files(PACKAGE), MAX_LINES, LONGER_FILES)


def test_the_rule_sees_full_rooms_long_files_and_exceptions_that_are_not_needed(tmp_path):
    for name in ("__init__", "a", "b", "c"):
        (tmp_path / f"{name}.py").write_text("x = 1\n" * 3)
    assert too_many(files_of_folders(tmp_path), 2, {}) == [".: 3"]
    assert too_many(files_of_folders(tmp_path), 2, {".": 3}) == []
    assert too_many(files_of_folders(tmp_path), 3, {".": 4}) == [".: no exception needed"]
    (tmp_path / "b.py").write_text("x = 1\n" * 5)
    assert too_many(lines_of_files(tmp_path), 4, {}) == ["b.py: 5"]
    assert too_many(lines_of_files(tmp_path), 3, {"b.py": 4, "gone.py": 9}) == [
        "b.py: 5",
        "gone.py: no exception needed",
    ]


def test_no_class_has_the_name_of_another():
    assert classes_named_twice([PACKAGE, REPOSITORY / "kernels"]) == set()


def test_the_rule_sees_a_name_used_twice(tmp_path):
    (tmp_path / "a.py").write_text("class Thing: ...\nclass Other: ...\n")
    (tmp_path / "b.py").write_text("def f():\n    class Thing: ...\n")
    assert classes_named_twice([tmp_path]) == {"Thing"}


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
    """The file that tells the story does not grow."""
    assert len((PACKAGE / "engine" / "train.py").read_text().splitlines()) <= STORY_LINES


def test_the_entry_for_launchers_is_thin():
    assert len((REPOSITORY / "launch" / "train.py").read_text().splitlines()) < 80
