"""Finding the files of a source: files, folders, globs, lists, hub names; in reading order.

What is not covered: CSV, TSV, Arrow files and data sets on the hub that need a configuration name.
"""

from __future__ import annotations

import glob as globbing
import os
from collections.abc import Sequence
from dataclasses import dataclass

from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

HUB_PREFIX = "hub:"
EXTENSIONS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
ALLOWED_FILES = "allowed: .jsonl, .ndjson, .json (each also with .gz or .zst) and .parquet"


@dataclass(frozen=True)
class InputFile:
    """One file (or hub data set) to read."""

    path: str
    """As found from the setting; for the hub `hub:owner/name`."""
    kind: str
    """`jsonl`, `json`, `parquet` or `hub`."""
    compression: str = ""
    """`.gz`, `.zst` or nothing."""
    split: str = ""
    """Split, hub only."""
    revision: str = ""
    """Commit of the data set, hub only."""

    @property
    def identity(self) -> str:
        """Equal for two names of one file."""
        return self.path if self.kind == "hub" else os.path.realpath(self.path)

    @property
    def unit(self) -> str:
        """What a place in this file counts: `line` or `row`, from 1."""
        return "line" if self.kind == "jsonl" else "row"


@dataclass(frozen=True)
class FoundFiles:
    """Files of a source in reading order, and what lay beside them and is not read.

    The latter are files of unknown kind, and inside folders names that begin with `.` or `_`; of a folder so
    named only its own name.
    """

    files: tuple[InputFile, ...]
    ignored: tuple[str, ...]


def find_files(path: str | Sequence[str], split: str = "train") -> FoundFiles:
    """Files of a source's `path`: in the order of the list, inside folders and globs sorted by path.

    Args:
        path: a file, a folder (searched recursively), a glob (`**` too), `hub:owner/name`, or a list.
        split: for hub names.

    Raises:
        DataError: nothing there, nothing readable, or a file of an unknown kind is named outright.
    """
    files: dict[str, InputFile] = {}  # by what the path leads to
    ignored: list[str] = []
    for pattern in [path] if isinstance(path, str) else path:
        pattern = os.path.expanduser(pattern)
        is_named, candidates, hidden = _candidates(pattern)
        ignored += hidden
        for candidate in candidates:
            file = _input_file(candidate, split)
            if file is None and is_named:
                raise DataError(f"files of this kind cannot be read; {ALLOWED_FILES}", path=candidate)
            if file is None:
                ignored.append(candidate)
            elif files.setdefault(file.identity, file) is not file:
                logger.warning("%s is given twice by %s; it is read once", file.path, path)
        if not files:
            beside = f" (it holds {', '.join(ignored[:3])})" if ignored else ""
            raise DataError(f"no data file found{beside}; {ALLOWED_FILES}", path=pattern)
    named = {file.path for file in files.values()}
    return FoundFiles(tuple(files.values()), tuple(name for name in ignored if name not in named))


def _candidates(pattern: str) -> tuple[bool, list[str], list[str]]:
    """(was a file named outright?, files that `pattern` stands for, hidden names in a folder)."""
    if pattern.startswith(HUB_PREFIX) or os.path.isfile(pattern):
        return True, [pattern], []
    if os.path.isdir(pattern):
        return False, *_walk(pattern)
    if globbing.has_magic(pattern):
        found = sorted(p for p in globbing.glob(pattern, recursive=True) if os.path.isfile(p))
        if not found:
            raise DataError("no file matches; check the pattern and the working folder", path=pattern)
        return False, found, []
    if os.path.exists(pattern):
        raise DataError("neither a file nor a folder; " + ALLOWED_FILES, path=pattern)
    raise DataError(
        f"no such file or folder (working folder: {os.getcwd()}); check `path` of the source", path=pattern
    )


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """Files below a folder, and hidden files and folders there (these with a slash at the end); sorted."""

    def refuse(error: OSError) -> None:
        raise DataError(f"folder cannot be read: {error.strerror}", path=error.filename)

    files: list[str] = []
    hidden: list[str] = []
    visited: set[str] = set()  # links may lead back up
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        visited.add(os.path.realpath(parent))
        for name in sorted(names):
            (hidden if _is_hidden(name) else files).append(os.path.join(parent, name))
        hidden += [os.path.join(parent, name, "") for name in sorted(filter(_is_hidden, folders))]
        folders[:] = sorted(
            name
            for name in folders
            if not _is_hidden(name) and os.path.realpath(os.path.join(parent, name)) not in visited
        )
    return files, hidden


def _is_hidden(name: str) -> bool:
    """What tools name so is no data: .git, .cache, _SUCCESS, _metadata."""
    return name.startswith((".", "_"))


def _input_file(path: str, split: str) -> InputFile | None:
    if path.startswith(HUB_PREFIX):
        return InputFile(path, "hub", split=split)
    stem, extension = os.path.splitext(path.lower())
    compression = ""
    if extension in COMPRESSIONS:
        compression = extension
        extension = os.path.splitext(stem)[1]
    kind = EXTENSIONS.get(extension)
    if kind is None or (kind == "parquet" and compression):
        return None
    return InputFile(path, kind, compression)
