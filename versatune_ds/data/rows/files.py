"""Finding the files of a source: files, folders, globs, lists, URLs, hub names; in reading order.

What is not covered: data sets on the hub that need a configuration name.
"""

from __future__ import annotations

import dataclasses
import glob as globbing
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from versatune_ds.data.rows.remote import find_remote, is_url, open_file
from versatune_ds.data.rows.repositories import choose_files
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.files import expanded
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

HUB_PREFIX = "hub:"
EXTENSIONS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
TABLES = ("parquet", "arrow")
"""Kinds with typed columns and a compression of their own."""
CONVERTED_BY_PANDAS = {
    ".xlsx": "read_excel", ".xls": "read_excel", ".ods": "read_excel", ".orc": "read_orc", ".xml": "read_xml",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ALLOWED_FILES = (
    "allowed: .jsonl, .ndjson, .json, .csv, .tsv (each also with .gz, .zst, .bz2 or .xz), .parquet and .arrow"
)


@dataclass(frozen=True)
class InputFile:
    """One file (or hub data set) to read."""

    path: str
    """As found from the setting: a path, a URL, or `hub:owner/name`."""
    kind: str
    """`hub` or a value of `EXTENSIONS`."""
    compression: str = ""
    """One of `COMPRESSIONS` or nothing."""
    split: str = ""
    """Split, hub only."""
    revision: str = ""
    """Commit of the data set, hub only."""
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Columns of class labels, each with the names behind its numbers, as metadata beside the file say."""

    @property
    def identity(self) -> str:
        """Equal for two names of one file."""
        return self.path if self.kind == "hub" or is_url(self.path) else os.path.realpath(self.path)

    @property
    def unit(self) -> str:
        """What a place in this file counts: `line` or `row`, from 1."""
        return "line" if self.kind == "jsonl" else "row"


@dataclass(frozen=True)
class FoundFiles:
    """Files of a source in reading order, and what lay beside them and is not read.

    `ignored` are files of unknown kind, metadata of `datasets`, and inside folders names that begin with `.`
    or `_`; of a folder so named only its own name. `other_splits` are texts: a folder and splits in it.
    """

    files: tuple[InputFile, ...]
    ignored: tuple[str, ...]
    other_splits: tuple[str, ...] = ()


def find_files(path: str | Sequence[str], split: str = "train") -> FoundFiles:
    """Files of a source's `path`: in the order of the list, inside folders and globs sorted by path.

    Args:
        path: a file, a folder (searched recursively), a glob (`**` too), a URL of one of these,
            `hub:owner/name`, or a list.
        split: for hub names, and folders that hold several splits (`repositories.py`).

    Raises:
        DataError: nothing there, nothing readable, a file of an unknown kind is named outright, or a folder
            with several splits has not this one.
        ConfigError: a URL whose package is not installed.
    """
    files: dict[str, InputFile] = {}  # by what the path leads to
    ignored: list[str] = []
    others: list[str] = []
    for pattern in [path] if isinstance(path, str) else path:
        try:
            pattern = expanded(pattern)
        except ValueError as error:
            raise DataError(str(error)) from None
        found = _find(pattern, split)
        ignored += found.ignored
        others += found.other_splits
        for file in found.files:
            if files.setdefault(file.identity, file) is not file:
                logger.warning("%s is given twice by %s; it is read once", file.path, path)
        if not files:
            beside = f" (it holds {', '.join(ignored[:3])})" if ignored else ""
            raise DataError(f"no data file found{beside}; {ALLOWED_FILES}", path=pattern)
    named = {file.path for file in files.values()}
    unread = tuple(name for name in ignored if name not in named)
    return FoundFiles(tuple(files.values()), unread, tuple(others))


def _find(pattern: str, split: str) -> FoundFiles:
    """The files of one pattern; none of them if nothing there can be read."""
    if pattern.startswith(HUB_PREFIX):
        return FoundFiles((InputFile(pattern, "hub", split=split),), ())
    hidden: list[str] = []
    if is_url(pattern):
        folder, paths = find_remote(pattern)
        hidden = [path for path in paths if any(map(_is_hidden, path.removeprefix(f"{folder}/").split("/")))]
    elif os.path.isdir(pattern):
        folder = pattern.rstrip("/") or "/"
        paths, hidden = _walk(folder)
    else:
        folder, paths = "", [pattern] if os.path.isfile(pattern) else _glob(pattern)
    if folder:
        return _in_folder(folder, [path for path in paths if path not in hidden], hidden, split)
    files = {path: _input_file(path) for path in paths}
    if files.get(pattern, True) is None:  # named outright
        stem, extension = os.path.splitext(pattern)
        reader = CONVERTED_BY_PANDAS.get(extension.lower())
        written = f"to_json({stem + '.jsonl'!r}, orient='records', lines=True)"
        code = f"import pandas; pandas.{reader}({pattern!r}).{written}"
        cure = f"; convert it once: {shlex.join(['python', '-c', code])}" if reader else ""
        raise DataError(f"files of this kind cannot be read; {ALLOWED_FILES}{cure}", path=pattern)
    unknown = tuple(path for path, file in files.items() if file is None)
    return FoundFiles(tuple(file for file in files.values() if file), unknown)


def _in_folder(folder: str, paths: Sequence[str], hidden: Sequence[str], split: str) -> FoundFiles:
    """Of the files below a folder those that a source reads."""
    files = {path.removeprefix(f"{folder}/"): (path, _input_file(path)) for path in paths}

    def read(name: str) -> bytes:
        with open_file(files[name][0]) as file:
            return file.read()

    names = [name for name, (_, file) in files.items() if file or name == "README.md"]
    content = choose_files(folder, names, split, read)
    labels = tuple((column, tuple(texts)) for column, texts in sorted(content.labels.items()))
    chosen = [file for name in content.files if (file := files[name][1])]
    unread = [path for name, (path, file) in files.items() if file is None or name in content.left_out]
    splits = ", ".join(f"{name} ({count})" for name, count in content.other_splits.items())
    return FoundFiles(
        tuple(dataclasses.replace(file, labels=labels) for file in chosen),
        tuple(unread + list(hidden)),
        (f"{folder} ({split} is read): {splits}",) if splits else (),
    )


def _glob(pattern: str) -> list[str]:
    if globbing.has_magic(pattern):
        found = sorted(p for p in globbing.glob(pattern, recursive=True) if os.path.isfile(p))
        if not found:
            raise DataError("no file matches; check the pattern and the working folder", path=pattern)
        return found
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


def _input_file(path: str) -> InputFile | None:
    name = path.partition("?")[0] if is_url(path) else path
    stem, extension = os.path.splitext(name.lower())
    compression = ""
    if extension in COMPRESSIONS:
        compression = extension
        extension = os.path.splitext(stem)[1]
    kind = EXTENSIONS.get(extension)
    if kind is None or (kind in TABLES and compression):
        return None
    return InputFile(path, kind, compression)
