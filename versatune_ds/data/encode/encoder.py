"""Blocks of raw rows become samples: a pure function, and the processes that run it.

`encode_block` decodes, checks, renders and tokenises one block. `Workers` runs it in processes and gives the
results back in the order of the blocks, so the outcome does not depend on how many there are.

What is not covered: reading blocks (`readers.py`) and writing results (`prepare.py`, `cache.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.data.cache.cache import Samples
from versatune_ds.data.encode.templating import ChatEncoder, EncodedSample
from versatune_ds.data.rows.blocks import Block, RowPlace
from versatune_ds.data.rows.files import InputFile
from versatune_ds.data.rows.readers import decode_block
from versatune_ds.data.rows.reasons import NEVER_FATAL, BadRow, Reason, short
from versatune_ds.data.rows.schemas import Conversation, RowSchema, TokenRow
from versatune_ds.foundations.errors import ConfigError, VersaTuneError

TASKS_PER_WORKER = 2
"""One in work and one waiting."""
REORDER_TASKS_PER_WORKER = 4
"""Blocks that may be finished or in work ahead of the next one to write; bounds memory."""
EXCERPT_CHARS = 200
NO_DOMAIN = "(unknown)"
"""Stands for the domain of a row that has none."""
WORKER_NAME = "versatune-prepare-worker"
UNGUARDED_EXIT = 88
"""Exit code of a worker that ran into the very call that started it; no other exit uses it."""


@dataclass(frozen=True)
class EncodeSettings:
    """What a worker needs for all blocks."""

    encoder: ChatEncoder
    pack_len: int
    overlong: str
    stop_at_bad_row: bool
    dtype: str


@dataclass(frozen=True)
class EncodeTask:
    """A block of rows to encode."""

    file: InputFile
    schema: RowSchema
    format: str | None
    block: Block


@dataclass(frozen=True)
class Problem:
    """A row that is not trained on."""

    place: RowPlace
    domain: str
    reason: str
    message: str
    excerpt: str


@dataclass
class BlockResult:
    """What became of a block."""

    rows: int = 0
    samples: dict[str, Samples] = field(default_factory=dict)
    """By domain."""
    problems: list[Problem] = field(default_factory=list)
    """In the order of the rows."""
    fatal: Problem | None = None
    """The first problem that stops the preparation."""
    notes: dict[str, Counter[str]] = field(default_factory=dict)
    """By domain: rows, truncated, split, pieces_dropped, special_text, rewritten."""


@dataclass(frozen=True)
class _Encoded:
    """A row that became tokens."""

    domain: str
    place: RowPlace
    digests: tuple[int, int]
    sample: EncodedSample


def encode_block(task: EncodeTask, settings: EncodeSettings) -> BlockResult:
    """Decode, check, render and tokenise a block: a pure function of its arguments."""
    return _BlockEncoder(task, settings).run()


class _BlockEncoder:
    def __init__(self, task: EncodeTask, settings: EncodeSettings) -> None:
        self.task = task
        self.settings = settings
        self.result = BlockResult()
        self.problems: list[tuple[int, Problem, bool]] = []

    def run(self) -> BlockResult:
        rows = self._check_rows()
        encoded = self._encode(rows)
        self._collect(encoded)
        self.problems.sort(key=lambda item: item[0])
        self.result.problems = [problem for _, problem, _ in self.problems]
        self.result.fatal = next((problem for _, problem, fatal in self.problems if fatal), None)
        return self.result

    def _note(self, domain: str, what: str, count: int = 1) -> None:
        self.result.notes.setdefault(domain, Counter())[what] += count

    def _reject(
        self, place: RowPlace, domain: str, error: BadRow, row: Any, fatal: bool | None = None
    ) -> None:
        block = self.task.block
        if block.items and place.number < block.first + len(block.items):
            raw = block.items[place.number - block.first]
            row = "" if isinstance(raw, BadRow) else raw
        if fatal is None:
            fatal = self.settings.stop_at_bad_row and error.reason not in NEVER_FATAL
        excerpt = short(row, EXCERPT_CHARS) if row != "" else ""
        problem = Problem(place, domain, error.reason.value, error.message, excerpt)
        self.problems.append((place.number, problem, fatal))

    def _check_rows(self) -> list[tuple[RowPlace, str, Conversation | TokenRow, Any]]:
        """Rows that fit their schema, each with place, domain and raw form."""
        schema, good = self.task.schema, []
        end = self.task.block.first + self.task.block.num_rows
        for place, row in decode_block(self.task.file, self.task.block):
            domain = schema.domain or NO_DOMAIN
            try:
                if isinstance(row, BadRow):
                    raise row
                domain = schema.domain_of(row)
                good.append((place, domain, schema.parse(row, self.task.format), row))
            except BadRow as error:
                self._reject(place, domain, error, "" if isinstance(row, BadRow) else row)
            if place.number < end:  # else it stands for damage to the file
                self.result.rows += 1
                self._note(domain, "rows")
        return good

    def _encode(self, rows: list[tuple[RowPlace, str, Conversation | TokenRow, Any]]) -> Iterator[_Encoded]:
        encoder = self.settings.encoder
        conversations = [row for _, _, row, _ in rows if isinstance(row, Conversation)]
        rendered = iter(encoder.encode(conversations))
        for place, domain, row, raw in rows:
            try:
                if isinstance(row, TokenRow):
                    sample, digests = encoder.check_tokens(row), _token_digests(row)
                else:
                    outcome = next(rendered)
                    if isinstance(outcome, BadRow):
                        raise outcome
                    sample, digests = outcome, _text_digests(row)
            except BadRow as error:
                self._reject(place, domain, error, raw)
                continue
            if sample.has_special_text:
                self._note(domain, "special_text")
            if sample.was_rewritten:
                self._note(domain, "rewritten")
            if len(sample.tokens) > self.settings.pack_len:
                yield from self._shorten(_Encoded(domain, place, digests, sample), raw)
            else:
                yield _Encoded(domain, place, digests, sample)

    def _shorten(self, item: _Encoded, raw: Any) -> list[_Encoded]:
        """Apply `data.overlong` to a sample that does not fit a pack."""
        limit, policy, sample = self.settings.pack_len, self.settings.overlong, item.sample
        found = f"the sample has {len(sample.tokens)} tokens, batch.pack_len is {limit}"
        if policy == "error":
            error = BadRow(
                Reason.OVERLONG,
                f"{found}; set data.overlong to drop, truncate or split, or raise batch.pack_len",
            )
            self._reject(item.place, item.domain, error, raw, fatal=True)
            return []
        if policy == "drop":
            self._reject(item.place, item.domain, BadRow(Reason.OVERLONG, f"{found}; dropped"), raw)
            return []
        stop = limit if policy == "truncate" else len(sample.tokens)
        pieces = [
            EncodedSample(sample.tokens[i : i + limit], sample.mask[i : i + limit])
            for i in range(0, stop, limit)
        ]
        kept = [piece for piece in pieces if piece.mask[1:].any()]
        if not kept:
            error = BadRow(Reason.OVERLONG_NOTHING_LEFT, f"{found}; {policy} leaves nothing supervised")
            self._reject(item.place, item.domain, error, raw)
            return []
        self._note(item.domain, "truncated" if policy == "truncate" else "split")
        self._note(item.domain, "pieces_dropped", len(pieces) - len(kept))
        return [_Encoded(item.domain, item.place, item.digests, piece) for piece in kept]

    def _collect(self, encoded: Iterable[_Encoded]) -> None:
        by_domain: dict[str, list[_Encoded]] = {}
        for item in encoded:
            by_domain.setdefault(item.domain, []).append(item)
        for domain, items in by_domain.items():
            samples = [item.sample for item in items]
            self.result.samples[domain] = Samples(
                tokens=np.concatenate([s.tokens for s in samples]).astype(self.settings.dtype),
                mask=np.concatenate([s.mask for s in samples]).view(np.uint8),
                lengths=np.array([len(s.tokens) for s in samples], dtype="<i4"),
                supervised=np.array([np.count_nonzero(s.mask[1:]) for s in samples], dtype="<i4"),
                source_number=np.array([item.place.number for item in items], dtype="<i8"),
                digests=np.array(_first_pieces(items), dtype="<u8").reshape(-1, 2),
            )


def _first_pieces(items: Sequence[_Encoded]) -> list[tuple[int, int]]:
    """Hashes of the rows: one per row, also where a row was split into several samples."""
    return [
        item.digests
        for i, item in enumerate(items)
        if i == 0 or items[i - 1].place.number != item.place.number
    ]


def _digest_pair(prompt: bytes, rest: bytes) -> tuple[int, int]:
    first = hashlib.blake2b(prompt, digest_size=8)
    prompt_digest = int.from_bytes(first.digest(), "little")
    first = hashlib.blake2b(first.digest() + rest, digest_size=8)
    return prompt_digest, int.from_bytes(first.digest(), "little")


def _text_digests(row: Conversation) -> tuple[int, int]:
    """Hashes of the prompt (all before the last response) and of the whole row."""
    last = max(i for i, (role, _) in enumerate(row.turns) if role == "assistant")
    prompt = "".join(f"{role} {len(content)} {content}" for role, content in row.turns[:last])
    rest = "".join(f"{role} {len(content)} {content}" for role, content in row.turns[last:])
    return _digest_pair(prompt.encode("utf-8"), rest.encode("utf-8"))


def _token_digests(row: TokenRow) -> tuple[int, int]:
    return _digest_pair(row.tokens[~row.mask].tobytes(), row.tokens.tobytes() + row.mask.tobytes())


# Workers


def refuse_unguarded_import() -> None:
    """Stop a process that is only being started and imports the user's script again.

    A spawned process first runs the main script, under another name than `__main__`. If that calls us again,
    the process would wait for the locks of the one that started it, and this one for its worker, for ever.

    Raises:
        SystemExit: in one of our workers; its parent then says what is wrong, once.
        ConfigError: in a process that something else started.
    """
    process = multiprocessing.current_process()
    if not getattr(process, "_inheriting", False):  # what multiprocessing itself asks before it starts one
        return
    if process.name.startswith(WORKER_NAME):
        raise SystemExit(UNGUARDED_EXIT)
    raise _unguarded()


def _unguarded() -> ConfigError:
    script = getattr(sys.modules["__main__"], "__file__", "the main script")
    return ConfigError(
        f"{script} prepares data when it is imported, and every worker process imports it: put what it does "
        'under `if __name__ == "__main__":`, or set data.num_workers to 1'
    )


class Workers:
    """Processes that encode blocks; results come back in the order of the tasks.

    Each worker has a pipe of its own. When this process dies, however it dies, the pipe ends and the worker
    leaves at once; when a worker dies, its pipe ends and we say so.

    Args:
        count: processes; 0: encode in this process.
    """

    def __init__(self, count: int, settings: EncodeSettings) -> None:
        self.settings = settings
        self.connections: list[connection.Connection] = []
        self.processes: list[Any] = []
        self._file = None
        if count == 0:
            return
        # A file, because a start by argument would wait for each worker to read some 10 MB of tokenizer.
        with tempfile.NamedTemporaryFile(prefix="versatune-", suffix=".settings", delete=False) as file:
            self._file = file.name
            pickle.dump(settings, file)
        context = multiprocessing.get_context("spawn")
        for i in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_worker_main, name=f"{WORKER_NAME}-{i}", args=(theirs, self._file), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, tasks: Iterator[tuple[Any, EncodeTask | None]]) -> Iterator[tuple[Any, BlockResult | None]]:
        """(tag, result) for every (tag, task), in order; a task None has the result None."""
        if not self.connections:
            for tag, task in tasks:
                yield tag, None if task is None else encode_block(task, self.settings)
            return
        window: deque[list[Any]] = deque()
        """[tag, is finished, result] of tasks that were taken and not yet given back, in order."""
        load = {i: deque[list[Any]]() for i in range(len(self.connections))}
        limit = REORDER_TASKS_PER_WORKER * len(self.connections)
        is_exhausted = False
        while True:
            while not is_exhausted and len(window) < limit:
                worker = min(load, key=lambda i: len(load[i]))
                if len(load[worker]) >= TASKS_PER_WORKER:
                    break
                item = next(tasks, None)
                if item is None:
                    is_exhausted = True
                    break
                tag, task = item
                entry = [tag, task is None, None]
                window.append(entry)
                if task is not None:
                    self._send(worker, task)
                    load[worker].append(entry)
            while window and window[0][1]:
                tag, _, result = window.popleft()
                yield tag, result
            if is_exhausted and not window:
                return
            if any(load.values()):
                self._receive(load)

    def _send(self, worker: int, task: EncodeTask) -> None:
        try:
            self.connections[worker].send(task)
        except OSError:
            raise self._death(worker) from None

    def _receive(self, load: dict[int, deque[list[Any]]]) -> None:
        for ready in connection.wait(self.connections):
            worker = self.connections.index(ready)  # type: ignore[arg-type]
            try:
                outcome = self.connections[worker].recv()
            except (EOFError, OSError):
                raise self._death(worker) from None
            if isinstance(outcome, BaseException):
                raise outcome
            entry = load[worker].popleft()
            entry[1:] = [True, outcome]

    def _death(self, worker: int) -> VersaTuneError:
        process = self.processes[worker]
        process.join(5)
        code = process.exitcode
        if code == UNGUARDED_EXIT:
            return _unguarded()
        why = f"exit code {code}"
        if code is not None and code < 0:
            why = f"killed by {signal.Signals(-code).name}"
        return VersaTuneError(
            f"a worker process died ({why}); if memory ran out, set data.num_workers lower. Run the command "
            "again: it goes on where it stopped"
        )

    def close(self) -> None:
        for pipe in self.connections:
            pipe.close()
        for process in self.processes:
            process.terminate()
            process.join()
        if self._file is not None:
            Path(self._file).unlink(missing_ok=True)


def _worker_main(pipe: connection.Connection, settings_file: str) -> None:
    """Encode what comes in until the pipe ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends the pipe
    tasks: queue.Queue[EncodeTask] = queue.Queue()

    def receive() -> None:
        # Always reading keeps the parent's send from blocking while our own send waits for the parent.
        try:
            while True:
                tasks.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)

    try:
        with open(settings_file, "rb") as file:
            settings = pickle.load(file)
        threading.Thread(target=receive, daemon=True).start()
        while True:
            pipe.send(encode_block(tasks.get(), settings))
    except (BrokenPipeError, ConnectionError):
        os._exit(0)
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(RuntimeError(f"a worker failed: {type(error).__name__}: {error}"))
        raise
