"""A unit in preparation: results are appended in order, journalled, checked, and given their name.

Every few seconds the files are synced and the journal is replaced. After a kill, files are cut back to the
journal and the work goes on from there. The last step is a rename, so a unit is whole or absent.

What is not covered: who makes the results (`encode`), and locks (`prepare.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from versatune_ds.data.cache.cache import (
    CACHE_SCHEMA_VERSION,
    CacheWriter,
    file_entry,
    manifest_fingerprint,
)
from versatune_ds.data.cache.units import (
    REJECTED_FILE,
    ROWS_VERSION,
    UNIT_FILE,
    SourceFiles,
    SourceHashes,
    Unit,
)
from versatune_ds.data.encode.encoder import BlockResult, EncodeTask, Problem
from versatune_ds.data.rows import blocks
from versatune_ds.data.rows.files import InputFile
from versatune_ds.data.rows.readers import decode_block, read_blocks
from versatune_ds.data.rows.reasons import NEVER_FATAL, WHOLE_FILE, BadRow, short
from versatune_ds.data.rows.schemas import RowSchema
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.files import folder_name, fsync_dir, write_json_atomic

JOURNAL_FILE = "journal.json"
JOURNAL_EVERY_S = 5.0
MAX_UNUSED = 50
"""Columns that are named as not used; rows may have keys without end."""
MAX_EXAMPLES = 3
"""Rejected rows that the error of a source without samples shows."""


@dataclass
class _Progress:
    """How far a unit is; lists have an entry per file."""

    next: tuple[int, int]
    """File and block that come next."""
    formats: list[str | None]
    rows: list[int]
    samples: list[int]
    notes: dict[str, Counter[str]]
    """By domain."""
    rejected: dict[str, Counter[str]]
    """By domain, then reason."""
    examples: list[str]
    unused: list[str]
    """Columns that no row format asks for, in the order found, at most `MAX_UNUSED`."""

    def __post_init__(self) -> None:
        self.next = (self.next[0], self.next[1])
        self.notes = {domain: Counter(counts) for domain, counts in self.notes.items()}
        self.rejected = {domain: Counter(counts) for domain, counts in self.rejected.items()}


class UnitWriter:
    """Makes one unit from the results of its blocks; goes on where its journal says.

    Args:
        unit: what to make; `tasks` gives the blocks that are still to be encoded.
        dtype: type of tokens.bin.
        hashes: to see that no source file changed meanwhile.
    """

    def __init__(self, unit: Unit, dtype: str, hashes: SourceHashes) -> None:
        self.unit = unit
        self.hashes = hashes
        self.partial = unit.cache_dir / f"{unit.key}.partial"
        self.files = unit.files
        count = len(self.files)
        self.progress = _Progress((0, 0), [None] * count, [0] * count, [0] * count, {}, {}, [], [])
        self.is_resumed = False
        self.last_sync = time.monotonic()
        self.writer = CacheWriter(self.partial / "unit", dtype, self._read_journal())
        self._folders = {domain: folder_name(domain) for domain in unit.domains}

    def _read_journal(self) -> dict[str, int]:
        """Go on from the journal, if there is a sound one; returns file sizes."""
        try:
            journal = json.loads((self.partial / JOURNAL_FILE).read_bytes())
            sizes: dict[str, int] = journal.pop("sizes")
            is_cut_otherwise = journal.pop("block_limits") != _block_limits()
            folder = self.partial / "unit"
            if is_cut_otherwise or any((folder / f).stat().st_size < size for f, size in sizes.items()):
                return {}
            self.progress = _Progress(**journal)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        self.is_resumed = True
        return sizes

    def _write_journal(self) -> None:
        journal = {"sizes": self.writer.sync(), "block_limits": _block_limits()}
        write_json_atomic(self.partial / JOURNAL_FILE, journal | vars(self.progress))
        self.last_sync = time.monotonic()

    def tasks(self) -> Iterator[tuple[int, int, EncodeTask]]:
        """(file, block, task) for every block that is not done yet."""
        progress = self.progress
        for i, (file, digest, source) in enumerate(self.files):
            if i < progress.next[0]:
                continue
            if file.kind == "hub":
                file = dataclasses.replace(file, revision=digest)
            schema = self.unit.schema(source.source)

            def select(names: list[str], schema: RowSchema = schema) -> list[str] | None:
                self._note_unused(schema, schema.detect(names), names)
                return schema.needed_columns(names)

            for j, block in enumerate(read_blocks(file, select)):
                if progress.formats[i] is None:  # the first row that fits one decides
                    rows = (row for _, row in decode_block(file, block) if not isinstance(row, BadRow))
                    progress.formats[i] = next(filter(None, map(schema.detect, rows)), None)
                if (i, j) >= progress.next:
                    yield i, j, EncodeTask(file, schema, progress.formats[i], block)

    def _note_unused(self, schema: RowSchema, format: str | None, names: Iterable[str]) -> None:
        if format is not None:
            noted = self.progress.unused
            new = [short(name)[1:-1] or "(no name)" for name in names if not schema.is_read(name, format)]
            noted += [name for name in dict.fromkeys(new) if name not in noted][: MAX_UNUSED - len(noted)]

    def add(self, file_index: int, block_index: int, result: BlockResult) -> None:
        """Append a block's result; DataError for a problem that stops the preparation."""
        file, _, source = self.files[file_index]
        if fatal := next((problem for problem in result.problems if problem.is_fatal), None):
            raise _stopping_error(file, source, fatal)
        progress = self.progress
        self._note_unused(self.unit.schema(source.source), progress.formats[file_index], result.columns)
        for domain, samples in result.samples.items():
            self.writer.append(self._folders[domain], file_index, samples)
            progress.samples[file_index] += len(samples.lengths)
        for domain, counts in result.notes.items():
            progress.notes.setdefault(domain, Counter()).update(counts)
        for problem in result.problems:
            progress.rejected.setdefault(problem.domain, Counter())[problem.reason] += 1
            line, row = problem.place.line, problem.place.row
            about = {name: getattr(problem, name) for name in ("domain", "reason", "message", "excerpt")}
            entry = {"path": file.path, "line": line, "row": row, **about}
            self.writer.write_text(REJECTED_FILE, json.dumps(entry) + "\n")
            if len(progress.examples) < MAX_EXAMPLES:
                progress.examples.append(str(DataError(problem.message, path=file.path, line=line, row=row)))
        progress.rows[file_index] += result.rows
        progress.next = (file_index, block_index + 1)
        if time.monotonic() - self.last_sync >= JOURNAL_EVERY_S:
            self._write_journal()

    def finish(self) -> None:
        """Check, write the manifests, and give the unit its name.

        Raises:
            DataError: a source gave no sample, or a source file changed meanwhile.
        """
        self._check_sources()
        self.writer.write_text(REJECTED_FILE, "")
        self.writer.sync()
        progress = self.progress
        sources = [
            {
                "path": file.path,
                "unit": file.unit,
                "sha256": digest,
                "format": progress.formats[i],
                "rows": progress.rows[i],
                "samples": progress.samples[i],
            }
            for i, (file, digest, _) in enumerate(self.files)
        ]
        counts = ("samples", "tokens", "supervised_tokens", "duplicates", "conflicting", "fingerprint")
        domains: dict[str, dict[str, Any]] = {}
        for domain, folder in self._folders.items():
            if not (self.writer.folder / folder).is_dir():
                continue
            about = {"domain": domain, "key": self.unit.key, "sources": sources}
            manifest = self.writer.finish_domain(folder, about)
            notes = dict(sorted(progress.notes.get(domain, {}).items()))
            domains[domain] = {"folder": folder, **{name: manifest[name] for name in counts}, "notes": notes}
        unit = {
            "schema_version": CACHE_SCHEMA_VERSION,
            "key": self.unit.key,
            "rows_version": ROWS_VERSION,
            "inputs": self.unit.inputs,
            "sources": sources,
            "domains": domains,
            "rejected": {name: dict(sorted(n.items())) for name, n in sorted(progress.rejected.items())},
            "rejected_file": file_entry(self.writer.folder / REJECTED_FILE),
        }
        if progress.unused:
            unit["unused_columns"] = progress.unused
        unit["fingerprint"] = manifest_fingerprint(unit)
        write_json_atomic(self.writer.folder / UNIT_FILE, unit)
        for entry in domains.values():
            self.writer.drop_temporary(entry["folder"])
        fsync_dir(self.writer.folder)
        os.replace(self.writer.folder, self.unit.folder)
        fsync_dir(self.unit.cache_dir)
        shutil.rmtree(self.partial)

    def _check_sources(self) -> None:
        samples = iter(self.progress.samples)
        for source in self.unit.sources:
            for file, digest in source.files:
                if self.hashes.look_up(file) != digest:
                    changed = "the file changed while it was read; run the command again"
                    raise DataError(changed, path=file.path)
            if sum(itertools.islice(samples, len(source.files))) == 0:
                reasons = sum(self.progress.rejected.values(), Counter())
                counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
                examples = "".join(f"\n  {example}" for example in self.progress.examples)
                raise DataError(
                    f"{source.name} gives no usable sample ({counts or 'no rows'}). For example:{examples}",
                    path=file.path,
                )

    def discard(self) -> None:
        """Remove what was prepared, after an error in the data: it is of no use for the corrected files."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _block_limits() -> list[int]:
    """The journal counts blocks, so it holds only while they are cut in the same way."""
    return [blocks.BLOCK_BYTES, blocks.BLOCK_ROWS, blocks.MAX_ROW_BYTES]


def _stopping_error(file: InputFile, source: SourceFiles, problem: Problem) -> DataError:
    hint = ""
    if problem.reason in WHOLE_FILE:
        hint = "\nOr set data.on_bad_row: skip to go on with what can be read (the loss is recorded)"
    elif problem.reason not in NEVER_FATAL:
        hint = "\nFix the row, or set data.on_bad_row: skip to leave such rows out (each is recorded)"
    found = f"\nThe row begins: {problem.excerpt}" if problem.excerpt else ""
    return DataError(
        f"{problem.message} ({problem.reason}, {source.name}){found}{hint}",
        path=file.path,
        line=problem.place.line,
        row=problem.place.row,
    )
