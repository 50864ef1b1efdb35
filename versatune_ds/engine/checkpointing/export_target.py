"""The folder that an export goes to: whose files lie there, and the change from the old ones to the new.

An export replaces its folder as a whole. It therefore leaves a list of its files there, and touches no folder
that holds others. Symbolic links are followed: the folder that they lead to is replaced, the link stays.

What is not covered: files of an export that were edited; they count as the export's.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from versatune_ds.config.model import Model
from versatune_ds.foundations.constants import CHECKPOINTS_DIR, EXPORT_DIR, EXPORT_FILE
from versatune_ds.foundations.errors import ConfigError, StateError
from versatune_ds.foundations.files import (
    fsync_dir,
    fsync_tree,
    read_json_object,
    write_json_atomic,
    write_text_atomic,
)
from versatune_ds.foundations.text import listed


def check_target(folder: Path) -> Path:
    """The folder that `folder` leads to, which an export may replace.

    Raises:
        StateError: it is a file, a link to nowhere, or holds files that no export of this program wrote.
    """
    real = Path(os.path.realpath(folder))
    if not real.is_dir():
        if real.exists() or folder.is_symlink():
            raise StateError(f"{folder} is no folder ({real}); remove it, or give another place")
        return real
    written = read_json_object(real / EXPORT_FILE).get("files", ())
    foreign = sorted({path.name for path in real.iterdir()} - {EXPORT_FILE, *written})
    if foreign:
        raise StateError(
            f"{folder} holds files that no export of this program wrote ({listed(foreign, 4)}), and would be "
            "replaced as a whole; move them away, or give another place"
        )
    return real


def unfinished(folder: Path) -> Path:
    """Where the files of an export lie until all of them are there."""
    return folder.with_name(f".unfinished-{folder.name}")


def make_empty(folder: Path) -> None:
    """An empty folder in place of what an earlier export left unfinished."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def replace(temporary: Path, folder: Path) -> None:
    """Give a finished export the name `folder`, in place of an earlier one; see `check_target`."""
    names = sorted(path.name for path in temporary.iterdir())
    write_json_atomic(temporary / EXPORT_FILE, {"format": "versatune_ds.export", "files": names})
    fsync_tree(temporary)
    if check_target(folder).exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    fsync_dir(folder.parent)


def add_file(folder: Path, name: str, text: str) -> None:
    """Write a file into an export as one of its own."""
    write_text_atomic(folder / name, text)
    about = read_json_object(folder / EXPORT_FILE)
    if about:  # exports did not always have a list
        write_json_atomic(folder / EXPORT_FILE, {**about, "files": sorted({*about["files"], name})})


def check_room(folder: Path, needed: int) -> None:
    """Refuse a disk without room for the finished model of so many bytes."""
    place = check_target(folder / EXPORT_DIR)
    free = shutil.disk_usage(next(parent for parent in place.parents if parent.is_dir())).free
    if free < needed:
        raise StateError(
            f"the finished model takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free for {place}; "
            "make room, choose another run.dir, or set checkpoint.export_at_end: false"
        )


def check_places(run_dir: Path, settings: Model) -> None:
    """Refuse a run that would write over the model that it starts from, or along a link to nowhere.

    Raises:
        StateError: naming the link.
        ConfigError: naming the setting and the folder.
    """
    checkpoints = run_dir / CHECKPOINTS_DIR
    if checkpoints.is_symlink() and not checkpoints.is_dir():
        raise StateError(f"{checkpoints} is a link to {os.path.realpath(checkpoints)}, which is no folder")
    adapters = settings.adapter.started if settings.adapter else {}
    given = [("model.source", settings.source), ("model.tokenizer", settings.tokenizer)]
    inside = Path(os.path.realpath(run_dir))
    for name, source in [*given, *(("model.adapter.start_from", folder) for folder in adapters)]:
        if source and os.path.isdir(source) and Path(os.path.realpath(source)).is_relative_to(inside):
            raise ConfigError(
                f"{name}: {source} lies in run.dir {run_dir}, where this run writes its own model; choose "
                "another run.dir, or move the model out of it"
            )
