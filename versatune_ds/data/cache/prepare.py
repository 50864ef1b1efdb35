"""`prepare`: raw files become token caches, once, in parallel; `open_caches`: training opens them.

What is prepared together is a unit (`units.py`): one domain of one split, or a whole split. Its key is a hash
of everything the result depends on. In the cache folder lie

    <key>/                 a finished unit: unit.json, rejected.jsonl, and a token cache per domain
    <key>.partial/         a unit in preparation: its files, and a journal of how far it is
    <key>.lock             held while a process prepares the unit; others wait and then reuse it
    source_hashes.json     SHA-256 of source files by size and times: unchanged files are not read again

One process reads blocks of rows and appends results in order; the workers decode, check, render and tokenise.
Memory is bounded by the blocks in flight. Every few seconds the files are synced and the journal replaced;
after a kill, files are cut back to the journal and the work goes on from there. The last step is a rename, so
a unit is whole or absent.

Training never prepares: `open_caches` compares keys and refuses with the command to run. It checks sizes,
not content, and takes a source's hash from source_hashes.json while its size and times are unchanged.

What is not covered: deleting caches that no configuration uses any more; every folder here may be deleted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from versatune_ds.config.schema import Config
from versatune_ds.data.cache.cache import (
    CACHE_SCHEMA_VERSION,
    CacheWriter,
    TokenCache,
    check_file,
    file_entry,
    manifest_fingerprint,
    token_dtype,
)
from versatune_ds.data.cache.units import (
    SPLITS,
    UNIT_FILE,
    SourceFiles,
    SourceHashes,
    Unit,
    find_units,
    read_unit,
    unit_lock,
    why_missing,
)
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.encoder import (
    BlockResult,
    EncodeSettings,
    EncodeTask,
    Problem,
)
from versatune_ds.data.encode.tokenizer import load_tokenizer
from versatune_ds.data.encode.workers import EncodeWorkers, refuse_unguarded_import
from versatune_ds.data.rows import blocks
from versatune_ds.data.rows.blocks import Block, RowPlace
from versatune_ds.data.rows.files import InputFile
from versatune_ds.data.rows.readers import decode_block, read_blocks
from versatune_ds.data.rows.reasons import NEVER_FATAL, WHOLE_FILE, BadRow
from versatune_ds.data.rows.schemas import RowSchema
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.constants import RESOLVED_CONFIG_FILE
from versatune_ds.foundations.errors import DataError, StateError
from versatune_ds.foundations.files import folder_name, fsync_dir, write_json_atomic
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

REJECTED_FILE = "rejected.jsonl"
JOURNAL_FILE = "journal.json"
JOURNAL_EVERY_S = 5.0
INLINE_BYTES = 4 << 20
"""Less source than this is tokenised in this process: starting workers takes about a second each."""


# What callers see


@dataclass(frozen=True)
class UnitReport:
    """A prepared unit: its manifest (unit.json) and whether it had to be made."""

    split: str
    folder: Path
    manifest: dict[str, Any]
    reused: bool
    ignored: tuple[str, ...]
    """What lies beside the sources' files and is not read (`FoundFiles.ignored`)."""


@dataclass(frozen=True)
class PreparedData:
    """The result of `prepare`."""

    caches: dict[str, list[TokenCache | None]]
    """split -> cache of each domain in the table's order; None: no data."""
    reports: tuple[UnitReport, ...]

    @property
    def reused(self) -> bool:
        """True when nothing had to be prepared."""
        return all(report.reused for report in self.reports)

    def table(self) -> str:
        """Samples, tokens and rejections per split and domain, as text."""
        return "\n".join(_report_lines(self.reports))


def prepare(config: Config, *, progress: bool = True) -> PreparedData:
    """Make the token caches that `config` needs and that are not there yet; then open all.

    Args:
        config: the run's settings; `data.num_workers` processes are used.
        progress: show a bar on a terminal.

    Raises:
        DataError: a file or row cannot be used (and the policy is not to skip it), a source gives no sample,
            or a source file changed meanwhile.
        ConfigError: the tokenizer or its template cannot be used, or the caller is a script without
            `if __name__ == "__main__":`, which workers would run again.
        StateError: the cache folder cannot be written.
    """
    refuse_unguarded_import()
    with _full_disk_named(config.data.cache_dir):
        return _prepare(config, progress)


@contextlib.contextmanager
def _full_disk_named(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StateError(
            f"no space left in data.cache_dir {cache_dir}; free some and run the command again: it goes on "
            "where it stopped"
        ) from error


def _prepare(config: Config, progress: bool) -> PreparedData:
    cache_dir = config.data.cache_dir
    _make_writable(cache_dir)
    encoder = ChatEncoder.build(load_tokenizer(config), config.data.chat_template)
    hashes = SourceHashes(cache_dir)
    units = find_units(config, encoder, hashes.update)
    _warn_about_shared_files(units)
    by_key = {unit.key: unit for unit in units}
    made: set[str] = set()
    with contextlib.ExitStack() as locks:
        for key in sorted(by_key):  # in one order everywhere, so that two processes cannot block each other
            locks.enter_context(unit_lock(cache_dir, key))
        missing = [unit for unit in by_key.values() if not _is_sound(unit)]
        if missing:
            made = {unit.key for unit in missing}
            _Preparation(config, encoder, missing, hashes, progress).run()
    reports = tuple(
        UnitReport(u.split, u.folder, read_unit(u.folder), u.key not in made, u.ignored) for u in units
    )
    return PreparedData(_open_all(config, units), reports)


def open_caches(
    config: Config, *, config_path: str | Path | None = None, all_domains: bool = True
) -> dict[str, list[TokenCache | None]]:
    """The caches that `prepare` made for exactly these settings and source files; makes nothing.

    Args:
        config: the run's settings.
        config_path: for the command in error texts; default: the run folder's resolved.yaml if there.
        all_domains: require training data for every domain with initial weight; False: the caller looks.

    Returns:
        `{"train": [...], "eval": [...]}`, a cache per domain in the table's order; None for a domain without
        data (in train only allowed when its initial weight is 0).

    Raises:
        StateError: a cache is missing, was made from other files or settings, or is damaged.
        DataError: a source file is missing; a domain with weight has no training data.
    """
    encoder = ChatEncoder.build(load_tokenizer(config), config.data.chat_template)
    units = find_units(config, encoder, SourceHashes(config.data.cache_dir).look_up)
    command = _prepare_command(config, config_path)
    for unit in units:
        if not unit.folder.is_dir():
            raise StateError(f"{why_missing(unit, config.data.cache_dir)}; run: {command}")
    try:
        caches = _open_all(config, units)
    except StateError as error:
        raise StateError(f"{error}\nrun: {command}") from None
    if all_domains:
        _require_train_data(config, caches["train"])
    return caches


def _prepare_command(config: Config, config_path: str | Path | None) -> str:
    resolved = config.run.dir / RESOLVED_CONFIG_FILE
    path = config_path or (resolved if resolved.is_file() else "CONFIG.yaml [the same overrides]")
    return f"versatune-ds prepare --config {path}"


def _require_train_data(config: Config, caches: Sequence[TokenCache | None]) -> None:
    from versatune_ds.domain.reference import initial_weights

    table = DomainTable(config.domains.names)
    weights = initial_weights(config.domains, config.weights, table)
    lacking = [
        name
        for name, weight, cache in zip(table.names, weights, caches, strict=True)
        if weight > 0 and cache is None
    ]
    if lacking:
        raise DataError(
            f"no training data for {', '.join(lacking)}, whose initial weight is above 0; add a source to "
            "data.train, or set its share in domains.initial to 0"
        )


def _open_all(config: Config, units: Sequence[Unit]) -> dict[str, list[TokenCache | None]]:
    names = config.domains.names
    caches: dict[str, list[TokenCache | None]] = {split: [None] * len(names) for split in SPLITS}
    for unit in units:
        for name, domain in read_unit(unit.folder)["domains"].items():
            cache = TokenCache.open(unit.folder / domain["folder"])
            if cache.fingerprint != domain["fingerprint"]:
                raise StateError(f"{cache.folder}: not the cache that {UNIT_FILE} was written for")
            caches[unit.split][names.index(name)] = cache
    return caches


def _is_sound(unit: Unit) -> bool:
    """True when the finished unit is there and every byte is right; a damaged one is removed, and said so."""
    if not unit.folder.is_dir():
        return False
    try:
        manifest = read_unit(unit.folder)
        check_file(unit.folder / REJECTED_FILE, manifest["rejected_file"], full=True)
        for domain in manifest["domains"].values():
            TokenCache.open(unit.folder / domain["folder"]).verify(full=True)
    except StateError as error:
        logger.warning("damaged cache, it is made again: %s", error)
        shutil.rmtree(unit.folder)
        return False
    return True


def _make_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as error:
        raise StateError(f"data.cache_dir {cache_dir} cannot be written: {error.strerror}") from None


def _warn_about_shared_files(units: Sequence[Unit]) -> None:
    held_out = {digest: file.path for u in units if u.split == "eval" for file, digest, _ in u.files}
    for unit in units:
        for file, digest, _ in unit.files:
            if unit.split == "train" and digest in held_out and file.kind != "hub":
                logger.warning(
                    "%s is trained on, and the same content is held out as %s", file.path, held_out[digest]
                )


# Preparation


class _UnitWork:
    """A unit in preparation: its partial folder, journal, writer and counts."""

    def __init__(self, unit: Unit, dtype: str, hashes: SourceHashes) -> None:
        self.unit = unit
        self.partial = unit.cache_dir / f"{unit.key}.partial"
        self.hashes = hashes
        self.next_file = self.next_block = 0
        self.formats: list[str | None] = [None] * len(unit.files)
        self.rows = [0] * len(unit.files)
        self.samples = [0] * len(unit.files)
        self.notes: dict[str, Counter[str]] = {}
        self.rejected: dict[str, Counter[str]] = {}
        self.examples: list[str] = []
        self.is_resumed = False
        self.last_sync = time.monotonic()
        sizes = self._read_journal()
        self.writer = CacheWriter(self.partial / "unit", dtype, sizes)
        self._folders = {domain: folder_name(domain) for domain in unit.domains}

    def _read_journal(self) -> dict[str, int]:
        """Go on from the journal, if there is a sound one; returns file sizes."""
        try:
            journal = json.loads((self.partial / JOURNAL_FILE).read_bytes())
            if journal["block_limits"] != self._block_limits():
                return {}
            for name, size in journal["sizes"].items():
                if (self.partial / "unit" / name).stat().st_size < size:
                    return {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        self.next_file, self.next_block = journal["next"]
        self.formats, self.rows, self.samples = journal["formats"], journal["rows"], journal["samples"]
        self.notes = {domain: Counter(counts) for domain, counts in journal["notes"].items()}
        self.rejected = {domain: Counter(counts) for domain, counts in journal["rejected"].items()}
        self.examples = journal["examples"]
        self.is_resumed = True
        sizes: dict[str, int] = journal["sizes"]
        return sizes

    @staticmethod
    def _block_limits() -> list[int]:
        """The journal counts blocks, so it holds only while they are cut in the same way."""
        return [blocks.BLOCK_BYTES, blocks.BLOCK_ROWS, blocks.MAX_ROW_BYTES]

    def tasks(self) -> Iterator[tuple[tuple[int, int, int], EncodeTask]]:
        """((file, block, bytes of the file read), task) for every block that is not done yet."""
        for i, (file, digest, source) in enumerate(self.unit.files):
            if i < self.next_file:
                continue
            if file.kind == "hub":
                file = InputFile(file.path, "hub", split=file.split, revision=digest)
            schema = self.unit.schema(source.source)
            format = self.formats[i]
            for j, block in enumerate(read_blocks(file, schema.needed_columns)):
                if format is None:
                    format = self.formats[i] = _detect(file, block, schema)
                if (i, j) >= (self.next_file, self.next_block):
                    yield (i, j, block.consumed), EncodeTask(file, schema, format, block)

    def add(self, file_index: int, block_index: int, result: BlockResult) -> None:
        """Append a block's result.

        Raises:
            DataError: the block has a problem that stops the preparation.
        """
        file, _, source = self.unit.files[file_index]
        if fatal := next((problem for problem in result.problems if problem.is_fatal), None):
            raise self._error(file, source, fatal)
        for domain, samples in result.samples.items():
            self.writer.append(self._folders[domain], file_index, samples)
            self.samples[file_index] += len(samples.lengths)
        for domain, counts in result.notes.items():
            self.notes.setdefault(domain, Counter()).update(counts)
        for problem in result.problems:
            self.rejected.setdefault(problem.domain, Counter())[problem.reason] += 1
            self.writer.write_text(REJECTED_FILE, _rejected_line(file, problem))
            if len(self.examples) < 3:
                self.examples.append(f"{_place_text(file, problem.place)}: {problem.message}")
        self.rows[file_index] += result.rows
        self.next_file, self.next_block = file_index, block_index + 1
        if time.monotonic() - self.last_sync >= JOURNAL_EVERY_S:
            self._journal()

    def _error(self, file: InputFile, source: SourceFiles, problem: Problem) -> DataError:
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

    def _journal(self) -> None:
        sizes = self.writer.sync()
        write_json_atomic(
            self.partial / JOURNAL_FILE,
            {
                "sizes": sizes,
                "block_limits": self._block_limits(),
                "next": [self.next_file, self.next_block],
                "formats": self.formats,
                "rows": self.rows,
                "samples": self.samples,
                "notes": self.notes,
                "rejected": self.rejected,
                "examples": self.examples,
            },
        )
        self.last_sync = time.monotonic()

    def finish(self) -> None:
        """Check, write the manifests, and give the unit its name.

        Raises:
            DataError: a source gave no sample, or a source file changed meanwhile.
        """
        self._check_sources()
        self.writer.write_text(REJECTED_FILE, "")
        self.writer.sync()
        domains: dict[str, dict[str, Any]] = {}
        for domain in self.unit.domains:
            folder = self._folders[domain]
            if not (self.writer.folder / folder).is_dir():
                continue
            manifest = self.writer.finish_domain(folder, self._about(domain))
            domains[domain] = {"folder": folder, **self._summary(domain, manifest)}
        unit = {
            "schema_version": CACHE_SCHEMA_VERSION,
            "key": self.unit.key,
            "inputs": self.unit.inputs,
            "sources": self._source_list(),
            "domains": domains,
            "rejected": {name: dict(sorted(self.rejected[name].items())) for name in sorted(self.rejected)},
            "rejected_file": file_entry(self.writer.folder / REJECTED_FILE),
        }
        unit["fingerprint"] = manifest_fingerprint(unit)
        write_json_atomic(self.writer.folder / UNIT_FILE, unit)
        for entry in domains.values():
            self.writer.drop_temporary(entry["folder"])
        fsync_dir(self.writer.folder)
        os.replace(self.writer.folder, self.unit.folder)
        fsync_dir(self.unit.cache_dir)
        shutil.rmtree(self.partial)

    def _about(self, domain: str) -> dict[str, Any]:
        return {"domain": domain, "key": self.unit.key, "sources": self._source_list()}

    def _source_list(self) -> list[dict[str, Any]]:
        return [
            {
                "path": file.path,
                "unit": file.unit,
                "sha256": digest,
                "format": self.formats[i],
                "rows": self.rows[i],
                "samples": self.samples[i],
            }
            for i, (file, digest, _) in enumerate(self.unit.files)
        ]

    def _summary(self, domain: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
        names = ("samples", "tokens", "supervised_tokens", "duplicates", "conflicting", "fingerprint")
        notes = dict(sorted(self.notes.get(domain, Counter()).items()))
        return {**{name: manifest[name] for name in names}, "notes": notes}

    def _check_sources(self) -> None:
        for file, digest, source in self.unit.files:
            if self.hashes.look_up(file) != digest:
                raise DataError("the file changed while it was read; run the command again", path=file.path)
            if file is source.files[-1]:
                own = [j for j, (_, _, other) in enumerate(self.unit.files) if other is source]
                if not any(self.samples[j] for j in own):
                    raise DataError(self._no_sample(source), path=file.path)

    def _no_sample(self, source: SourceFiles) -> str:
        reasons = sum(self.rejected.values(), Counter())
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        examples = "".join(f"\n  {example}" for example in self.examples)
        return f"{source.name} gives no usable sample ({counts or 'no rows'}). For example:{examples}"

    def discard(self) -> None:
        """Remove what was prepared, after an error in the data: it is of no use for the corrected files."""
        shutil.rmtree(self.partial, ignore_errors=True)


def _detect(file: InputFile, block: Block, schema: RowSchema) -> str | None:
    for _, row in decode_block(file, block):
        if not isinstance(row, BadRow) and (format := schema.detect(row)) is not None:
            return format
    return None


def _place_text(file: InputFile, place: RowPlace) -> str:
    line = f":{place.line}" if place.line is not None else ""
    row = f" row {place.row}" if place.row is not None else ""
    return f"{file.path}{line}{row}"


def _rejected_line(file: InputFile, problem: Problem) -> str:
    entry = {
        "path": file.path,
        "line": problem.place.line,
        "row": problem.place.row,
        "domain": problem.domain,
        "reason": problem.reason,
        "message": problem.message,
        "excerpt": problem.excerpt,
    }
    return json.dumps(entry) + "\n"


class _Preparation:
    """Makes several units with one set of workers, so that no core waits where one unit ends."""

    def __init__(
        self, config: Config, encoder: ChatEncoder, units: list[Unit], hashes: SourceHashes, progress: bool
    ) -> None:
        self.config = config
        self.settings = EncodeSettings(
            encoder=encoder,
            pack_len=config.batch.pack_len,
            overlong=config.data.overlong,
            stop_at_bad_row=config.data.on_bad_row == "error",
            dtype=token_dtype(encoder.vocab_size),
        )
        self.works = [_UnitWork(unit, self.settings.dtype, hashes) for unit in units]
        self.progress = progress

    def run(self) -> None:
        sizes = [[_size(file) for file, _, _ in work.unit.files] for work in self.works]
        total = sum(map(sum, sizes))
        count = self.config.data.num_workers or len(os.sched_getaffinity(0))
        if count == 1 or (total < INLINE_BYTES and not any(_is_hub(work.unit) for work in self.works)):
            count = 0
        for work in self.works:
            if work.is_resumed:
                done = sum(work.samples)
                logger.info("going on with %s after %d samples", ", ".join(work.unit.domains), done)
        bar = _ProgressBar(total, self.progress)
        workers = EncodeWorkers(count, self.settings)
        try:
            for (i, place), result in workers.run(self._tasks()):
                work = self.works[i]
                if result is None:
                    self._finish(work)
                    continue
                try:
                    work.add(place[0], place[1], result)
                except DataError:
                    work.discard()
                    raise
                bar.advance((i, place[0]), place[2], sum(len(s.lengths) for s in result.samples.values()))
        finally:
            bar.close()
            workers.close()

    def _tasks(self) -> Iterator[tuple[Any, EncodeTask | None]]:
        for i, work in enumerate(self.works):
            for place, task in work.tasks():
                yield (i, place), task
            yield (i, None), None

    def _finish(self, work: _UnitWork) -> None:
        try:
            work.finish()
        except DataError:
            work.discard()
            raise


def _is_hub(unit: Unit) -> bool:
    return any(file.kind == "hub" for file, _, _ in unit.files)


def _size(file: InputFile) -> int:
    return 0 if file.kind == "hub" else os.path.getsize(file.path)


class _ProgressBar:
    """Share of the source bytes read, samples per second, time left; on a terminal only."""

    FORMAT = "preparing {percentage:3.0f}%|{bar}| {postfix} [{elapsed}, {remaining} left]"

    def __init__(self, total: int, is_wanted: bool) -> None:
        from tqdm import tqdm

        disable = None if is_wanted else True  # None: off unless standard error is a terminal
        self.bar = tqdm(total=total or None, disable=disable, bar_format=self.FORMAT, leave=False)
        self.read: dict[Any, int] = {}
        self.samples = 0
        self.start = time.monotonic()

    def advance(self, file: Any, consumed: int, samples: int) -> None:
        """`consumed`: bytes of the file read so far; a new largest value moves the bar."""
        before = self.read.get(file, 0)
        self.read[file] = max(before, consumed)
        self.samples += samples
        rate = self.samples / max(1e-9, time.monotonic() - self.start)
        self.bar.set_postfix_str(f"{self.samples:,} samples, {rate:,.0f}/s", refresh=False)
        self.bar.update(self.read[file] - before)

    def close(self) -> None:
        self.bar.close()


# Reports

_NOTES = {
    "truncated": "truncated to batch.pack_len",
    "split": "split into pieces of batch.pack_len",
    "pieces_dropped": "pieces without supervised tokens dropped",
    "special_text": "with the text of a special token in a message",
    "rewritten": "with a message that the chat template changed",
}


def _report_lines(reports: Sequence[UnitReport]) -> Iterator[str]:
    rows = [["split", "domain", "samples", "tokens", "supervised", "rejected", "repeated", "conflicting", ""]]
    rejected: list[list[str]] = []
    notes: list[str] = []
    for report in reports:
        unit = report.manifest
        for domain in [*unit["domains"], *(d for d in unit["rejected"] if d not in unit["domains"])]:
            counts = unit["domains"].get(domain)
            reasons = unit["rejected"].get(domain, {})
            bad = sum(reasons.values())
            rejected += [[report.split, domain, reason, f"{n:,}"] for reason, n in reasons.items()]
            if counts is None:
                rows.append([report.split, domain, "0", "0", "", f"{bad:,}", "", "", ""])
                continue
            share = counts["supervised_tokens"] / max(1, counts["tokens"])
            rows.append(
                [report.split, domain, f"{counts['samples']:,}", f"{counts['tokens']:,}", f"{share:.1%}",
                 f"{bad:,}", f"{counts['duplicates']:,}", f"{counts['conflicting']:,}",
                 "reused" if report.reused else ""]
            )  # fmt: skip
            for name, text in _NOTES.items():
                if count := counts["notes"].get(name):
                    notes.append(f"note: {report.split} {domain}: {count:,} {text}")
        if report.ignored:
            shown = ", ".join(report.ignored[:3]) + (", ..." if len(report.ignored) > 3 else "")
            notes.append(
                f"note: {report.split}: {len(report.ignored)} beside the data not read (other kinds of file, "
                f"names that begin with . or _): {shown}"
            )
        if unit["rejected"]:
            notes.append(f"rejected rows of {report.split}: {report.folder / REJECTED_FILE}")
    yield from _columns(rows)
    if rejected:
        yield ""
        yield from _columns([["split", "domain", "reason", "rows"], *rejected])
    if notes:
        yield ""
        yield from notes


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows in aligned columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_number = [any(cell[:1].isdigit() for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        yield "  ".join(cells).rstrip()
