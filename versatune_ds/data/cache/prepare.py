"""`prepare`: raw files become token caches, once, in parallel; `open_caches`: training opens them.

What is prepared together is a unit (`units.py`): one domain of one split, or a whole split. Its key is a hash
of everything the result depends on. In the cache folder lie

    <key>/                 a finished unit: unit.json, rejected.jsonl, and a token cache per domain
    <key>.partial/         a unit in preparation: its files, and a journal of how far it is
    <key>.lock             held while a process prepares the unit; others wait and then reuse it
    source_hashes.json     SHA-256 of source files by size and times: unchanged files are not read again

One process reads blocks of rows and appends results in order; the workers decode, check, render and tokenise.
Memory is bounded by the blocks in flight. After a kill the work goes on from the journal (`unit_writer.py`).

Training never prepares: `open_caches` compares keys and refuses with the command to run. It checks sizes,
not content, and takes a source's hash from source_hashes.json while its size and times are unchanged.

What is not covered: deleting caches that no configuration uses any more; every folder here may be deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from versatune_ds.config.schema import Config
from versatune_ds.data.cache.cache import TokenCache, check_file, token_dtype
from versatune_ds.data.cache.summary import UnitReport, summary_lines
from versatune_ds.data.cache.unit_writer import UnitWriter
from versatune_ds.data.cache.units import (
    REJECTED_FILE,
    SPLITS,
    UNIT_FILE,
    SourceHashes,
    Unit,
    find_units,
    is_outdated,
    read_unit,
    unit_lock,
    why_missing,
)
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.encoder import EncodeSettings, EncodeTask
from versatune_ds.data.encode.tokenizer import embedding_rows, load_tokenizer
from versatune_ds.data.encode.workers import EncodeWorkers, refuse_unguarded_import
from versatune_ds.data.rows.remote import file_stamp
from versatune_ds.domain.reference import initial_weights
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import DataError, StateError
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

INLINE_BYTES = 4 << 20
"""Less source than this is tokenised in this process: starting workers takes about a second each."""
BAR_FORMAT = "preparing {percentage:3.0f}%|{bar}| {postfix} [{elapsed}, {remaining} left]"


@dataclass(frozen=True)
class PreparedData:
    caches: dict[str, list[TokenCache | None]]
    """split -> cache of each domain in the table's order; None: no data."""
    reports: tuple[UnitReport, ...]

    @property
    def reused(self) -> bool:
        """True when nothing had to be prepared."""
        return all(report.reused for report in self.reports)

    def table(self) -> str:
        """Samples, tokens and rejections per split and domain, as text."""
        return "\n".join(summary_lines(self.reports))


def prepare(config: Config, *, progress: bool = True) -> PreparedData:
    """Make the token caches that `config` needs and that are not there yet; then open all.

    Args:
        config: the run's settings; `data.num_workers` processes are used.

    Raises:
        DataError: a file or row cannot be used (and the policy is not to skip it), a source gives no sample,
            or a source file changed meanwhile.
        ConfigError: the tokenizer or its template cannot be used, or the caller is a script without
            `if __name__ == "__main__":`, which workers would run again.
        StateError: the cache folder cannot be written.
    """
    refuse_unguarded_import()
    try:
        return _prepare(config, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StateError(
            f"no space left in data.cache_dir {config.data.cache_dir}; free some and run the command again: "
            "it goes on where it stopped"
        ) from error


def _prepare(config: Config, progress: bool) -> PreparedData:
    cache_dir = config.data.cache_dir
    _make_writable(cache_dir)
    encoder = ChatEncoder.build(load_tokenizer(config), config.data.chat_template, embedding_rows(config))
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
            _make(config, encoder, missing, hashes, progress)
    reports = tuple(
        UnitReport(u.split, u.folder, read_unit(u.folder), u.key not in made, u.ignored, u.other_splits)
        for u in units
    )
    return PreparedData(_open_all(config, units), reports)


def open_caches(config: Config, *, all_domains: bool = True) -> dict[str, list[TokenCache | None]]:
    """The caches that `prepare` made for exactly these settings and source files; makes nothing.

    Args:
        all_domains: require training data for every domain with initial weight; False: the caller looks.

    Returns:
        `{"train": [...], "eval": [...]}`, a cache per domain in the table's order; None for a domain without
        data (in train only allowed when its initial weight is 0).

    Raises:
        StateError: a cache is missing, was made from other files or settings, or is damaged.
        DataError: a source file is missing; a domain with weight has no training data.
    """
    encoder = ChatEncoder.build(load_tokenizer(config), config.data.chat_template, embedding_rows(config))
    with naming_the_command(config):
        units = find_units(config, encoder, SourceHashes(config.data.cache_dir).look_up)
        for unit in units:
            if not unit.folder.is_dir():
                raise StateError(why_missing(unit, config.data.cache_dir))
        caches = _open_all(config, units)
    if all_domains:
        _require_train_data(config, caches["train"])
    return caches


@contextlib.contextmanager
def naming_the_command(config: Config) -> Iterator[None]:
    """Errors about prepared data end with the command that prepares it."""
    try:
        yield
    except StateError as error:
        raise StateError(f"{error}\nrun: {config.command('prepare')}") from None


def _require_train_data(config: Config, caches: Sequence[TokenCache | None]) -> None:
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
        manifest = read_unit(unit.folder)
        if is_outdated(manifest):
            logger.warning(
                "%s was prepared by an earlier version, which read less of a row (weights, flags, thoughts, "
                "system prompts in columns); `versatune-ds prepare` makes it again",
                unit.folder,
            )
        for name, domain in manifest["domains"].items():
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
        if is_outdated(manifest):
            logger.info(
                "%s: prepared by an earlier version, which read less of a row; it is made again", unit.folder
            )
            shutil.rmtree(unit.folder)
            return False
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


def _make(
    config: Config, encoder: ChatEncoder, units: Sequence[Unit], hashes: SourceHashes, progress: bool
) -> None:
    """Make several units with one set of workers, so that no core waits where one unit ends."""
    settings = EncodeSettings(
        encoder=encoder,
        pack_len=config.batch.pack_len,
        overlong=config.data.overlong,
        stop_at_bad_row=config.data.on_bad_row == "error",
        dtype=token_dtype(encoder.num_ids),
        reasoning=config.data.reasoning,
        train_on=config.data.train_on,
    )
    writers = [UnitWriter(unit, settings.dtype, hashes) for unit in units]
    for writer in writers:
        if writer.is_resumed:
            done = sum(writer.progress.samples)
            logger.info("going on with %s after %d samples", ", ".join(writer.unit.domains), done)
    files = [file for unit in units for file, _, _ in unit.files]
    total = sum(file_stamp(file.path)[0] for file in files if file.kind != "hub")
    count = config.data.num_workers or len(os.sched_getaffinity(0))
    if count == 1 or (total < INLINE_BYTES and not any(file.kind == "hub" for file in files)):
        count = 0
    read: dict[tuple[int, int], int] = {}  # bytes of each file
    samples = 0
    # None: off unless standard error is a terminal
    bar = tqdm(total=total or None, disable=None if progress else True, bar_format=BAR_FORMAT, leave=False)
    workers = EncodeWorkers(count, settings)
    try:
        for (i, file, block, consumed), result in workers.run(_tasks(writers)):
            try:
                if result is None:
                    writers[i].finish()
                    continue
                writers[i].add(file, block, result)
            except DataError:
                writers[i].discard()
                raise
            samples += sum(len(part.lengths) for part in result.samples.values())
            rate = samples / max(1e-9, bar.format_dict["elapsed"])
            bar.set_postfix_str(f"{samples:,} samples, {rate:,.0f}/s", refresh=False)
            bar.update(consumed - read.get((i, file), 0))
            read[i, file] = consumed
    finally:
        bar.close()
        workers.close()


def _tasks(writers: Sequence[UnitWriter]) -> Iterator[tuple[tuple[int, int, int, int], EncodeTask | None]]:
    """((unit, file, block, bytes of the file read), task); None once all tasks of a unit are given."""
    for i, writer in enumerate(writers):
        for file, block, task in writer.tasks():
            yield (i, file, block, task.block.consumed), task
        yield (i, 0, 0, 0), None
