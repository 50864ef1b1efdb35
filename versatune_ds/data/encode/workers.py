"""Processes that encode blocks of rows, with results in the order of the blocks.

So the outcome does not depend on how many processes there are.

What is not covered: what is done with a block (`encoder.py`) and writing results (`cache/prepare.py`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

from versatune_ds.data.encode import encoder
from versatune_ds.data.encode.encoder import BlockResult, EncodeSettings, EncodeTask
from versatune_ds.foundations.errors import ConfigError, VersaTuneError

TASKS_PER_WORKER = 2
"""One in work and one waiting."""
REORDER_TASKS_PER_WORKER = 4
"""Blocks that may be finished or in work ahead of the next one to write; bounds memory."""
WORKER_NAME = "versatune-prepare-worker"
UNGUARDED_EXIT = 88
"""Exit code of a worker that ran into the very call that started it; no other exit uses it."""


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


class EncodeWorkers:
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
                yield tag, None if task is None else encoder.encode_block(task, self.settings)
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
            pipe.send(encoder.encode_block(tasks.get(), settings))
    except (BrokenPipeError, ConnectionError):
        os._exit(0)
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(RuntimeError(f"a worker failed: {type(error).__name__}: {error}"))
        raise
