"""Units of preparation: what is prepared and cached together, and the key that it is cached under.

A *unit* is one domain of one split, or a whole split when one of its sources has a `domain_column`. Its key
is a hash of everything the result depends on: content of the source files, format and columns, tokenizer and
chat template, pack length and policies, and the versions of cache and code. Paths are not part of it, so
moved data and copied caches are found again.

What is not covered: making units (`prepare.py`) and what a cache holds (`cache.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from versatune_ds.config.schema import Config, Data, Source
from versatune_ds.data.cache.cache import CACHE_SCHEMA_VERSION, read_manifest
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.rows.files import InputFile, find_files
from versatune_ds.data.rows.hub import hub_revision
from versatune_ds.data.rows.remote import file_stamp, is_url, open_file
from versatune_ds.data.rows.schemas import RowSchema
from versatune_ds.foundations.errors import DataError, StateError
from versatune_ds.foundations.files import canonical_hash, read_json_object, sha256_stream, write_json_atomic
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

PREPARE_VERSION = 2
"""Part of every key: raise it when the same input gives other tokens, masks or rejections."""
ROWS_VERSION = 4
"""Of what is read of a row, written into units: raise it when more is. `prepare` makes units of an earlier
one again, under the same key, and says so; training takes them, with a warning."""
SPLITS = ("train", "eval")
UNIT_FILE = "unit.json"
REJECTED_FILE = "rejected.jsonl"
HASHES_FILE = "source_hashes.json"


@dataclass(frozen=True)
class SourceFiles:
    """A source of the settings with its files."""

    name: str
    """`data.train[0]`, for error texts."""
    source: Source
    files: tuple[tuple[InputFile, str], ...]
    """Each with the hash of its content."""
    ignored: tuple[str, ...]
    """See `FoundFiles`, as the next one."""
    other_splits: tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    split: str
    sources: tuple[SourceFiles, ...]
    domains: tuple[str, ...]
    inputs: dict[str, Any]
    """Everything the result depends on; its hash is the key."""
    cache_dir: Path

    @property
    def key(self) -> str:
        """Hash of `inputs`, shortened: 96 bits."""
        return canonical_hash(self.inputs)[:24]

    @property
    def folder(self) -> Path:
        return self.cache_dir / self.key

    @property
    def files(self) -> list[tuple[InputFile, str, SourceFiles]]:
        """(file, its hash, its source), in reading order; the position is the source index of samples."""
        return [(file, digest, source) for source in self.sources for file, digest in source.files]

    @property
    def ignored(self) -> tuple[str, ...]:
        """What lies beside the files of the sources and is not read."""
        return tuple(name for source in self.sources for name in source.ignored)

    @property
    def other_splits(self) -> tuple[str, ...]:
        """Splits in the folders of the sources that are not read."""
        return tuple(text for source in self.sources for text in source.other_splits)

    def schema(self, source: Source) -> RowSchema:
        return RowSchema(source.format, source.columns, source.domain, source.domain_column, self.domains)


def find_units(config: Config, encoder: ChatEncoder, hash_file: Callable[[InputFile], str]) -> list[Unit]:
    """All units of a configuration, with their keys; `hash_file` gives content hashes.

    Raises:
        DataError: a source has no files.
    """
    units = []
    for split in SPLITS:
        given = enumerate(getattr(config.data, split))
        sources = [_source_files(f"data.{split}[{i}]", source, hash_file) for i, source in given]
        names = tuple(config.domains.names)
        if any(source.source.domain_column for source in sources):
            groups = [(names, sources)]
        else:
            groups = [((d,), [s for s in sources if s.source.domain == d]) for d in names]
        for domains, members in groups:
            if members:
                inputs = _unit_inputs(config, encoder, domains, members)
                units.append(Unit(split, tuple(members), domains, inputs, config.data.cache_dir))
    return units


def _source_files(name: str, source: Source, hash_file: Callable[[InputFile], str]) -> SourceFiles:
    try:
        found = find_files(source.path, source.split)
    except DataError as error:
        raise DataError(f"{error.reason} ({name})", path=error.path) from None
    files = tuple((file, hash_file(file)) for file in found.files)
    return SourceFiles(name, source, files, found.ignored, found.other_splits)


def _unit_inputs(
    config: Config, encoder: ChatEncoder, domains: Sequence[str], sources: Sequence[SourceFiles]
) -> dict[str, Any]:
    # Settings that came later stand here where they are not the default: older caches keep their keys.
    later = {
        f"data.{name}": getattr(config.data, name)
        for name in ("reasoning", "train_on")
        if getattr(config.data, name) != Data.model_fields[name].default
    }
    return {
        "versions": [CACHE_SCHEMA_VERSION, PREPARE_VERSION],
        "domains": list(domains),
        "tokenizer_and_template": encoder.fingerprint,
        "batch.pack_len": config.batch.pack_len,
        "data.overlong": config.data.overlong,
        "data.on_bad_row": config.data.on_bad_row,
        **later,
        "sources": [
            {
                "domain": member.source.domain,
                "domain_column": member.source.domain_column,
                "format": member.source.format,
                "columns": dict(member.source.columns),
                "files": [
                    [file.kind, file.compression, digest, *([file.labels] if file.labels else [])]
                    for file, digest in member.files
                ],
            }
            for member in sources
        ],
    }


def why_missing(unit: Unit, cache_dir: Path) -> str:
    """No such cache: is there a similar one, and what is different?"""
    what = f"{unit.split} data of {', '.join(unit.domains)}"
    best: list[str] | None = None
    prepared: dict[str, str] = {}
    for path in sorted(cache_dir.glob(f"*/{UNIT_FILE}")):
        with contextlib.suppress(StateError):
            manifest = read_unit(path.parent)
            inputs = manifest["inputs"]
            differing = [name for name in unit.inputs if inputs.get(name) != unit.inputs[name]]
            if "domains" not in differing and (best is None or len(differing) < len(best)):
                best, prepared = differing, {s["path"]: s["sha256"] for s in manifest["sources"]}
    if best:
        other = [file.path for file, digest, _ in unit.files if prepared.get(file.path, digest) != digest]
        sources = f"{', '.join(other)} (changed since)" if other else "source files or columns"
        changed = [sources if name == "sources" else name for name in best]
        return f"the prepared {what} in {cache_dir} differs in: {', '.join(changed)}"
    return f"the {what} is not prepared (nothing for it in {cache_dir})"


class SourceHashes:
    """Content hashes of source files, remembered by size and times in the cache folder: a memo only, what is
    lost is computed again."""

    def __init__(self, cache_dir: Path) -> None:
        self.path = cache_dir / HASHES_FILE

    def update(self, file: InputFile) -> str:
        """The hash, computed where it is not known, and remembered."""
        if file.kind != "hub" and (known := self._known(file)) is not None:
            return known
        # One process reads a file; the others that started with it find its hash here.
        with FileLock(f"{self.path}.lock"):
            known = self._known(file)
            if known is not None and file.kind != "hub":
                return known
            stamp = _stamp(file)
            digest = _hub_commit(file, known) if file.kind == "hub" else _hash(file)
            write_json_atomic(self.path, read_json_object(self.path) | {self._name(file): [stamp, digest]})
        return digest

    def look_up(self, file: InputFile) -> str:
        """The hash; a file that changed or is not known is read, a hub data set must be known."""
        if (known := self._known(file)) is not None:
            return known
        if file.kind == "hub":
            raise StateError(f"{file.path} is not prepared; that takes the hub in reach")
        return _hash(file)

    def _known(self, file: InputFile) -> str | None:
        entry = read_json_object(self.path).get(self._name(file))
        return entry[1] if entry is not None and entry[0] == _stamp(file) else None

    def _name(self, file: InputFile) -> str:
        if file.kind == "hub":
            return f"{file.path}@{file.split}"
        return file.path if is_url(file.path) else os.path.abspath(file.path)


def _hub_commit(file: InputFile, known: str | None) -> str:
    try:
        return hub_revision(file.path)
    except DataError as error:
        if known is None:
            raise
        logger.warning("%s; going on with commit %s, which was used before", error, known)
        return known


def _stamp(file: InputFile) -> list[Any]:
    """What any write changes (`file_stamp`). Empty for hub data sets, which have commits."""
    return [] if file.kind == "hub" else file_stamp(file.path)


def _hash(file: InputFile) -> str:
    try:
        with open_file(file.path) as stream:
            return sha256_stream(stream)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=file.path) from None


def is_outdated(manifest: Mapping[str, Any]) -> bool:
    """Whether an earlier version read less of the rows: flags, weights, thoughts, system prompts, calls."""
    return bool(manifest.get("rows_version", 2) < ROWS_VERSION)


def read_unit(folder: Path) -> dict[str, Any]:
    return read_manifest(folder, UNIT_FILE, "prepared data")


@contextlib.contextmanager
def unit_lock(cache_dir: Path, key: str) -> Iterator[None]:
    """Hold a unit; says that it waits, at once and then every minute."""
    lock = FileLock(cache_dir / f"{key}.lock")
    still = ""
    while not lock.is_locked:
        try:
            lock.acquire(timeout=60 if still else 0)
        except Timeout:
            logger.info("another process prepares this data; %swaiting for it (%s)", still, lock.lock_file)
            still = "still "
    try:
        yield
    finally:
        lock.release()
