"""Running a program under a time limit, whatever it does: its output bounded, its children ended with it.

What is not covered: children that leave the program's process group, and what still runs when this process is
ended by SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

TAIL_CHARS = 4000
LOOK_S = 2.0
POLL_S = 0.1
GRACE_S = 5.0
READ_BYTES = 1 << 16


class Deadline:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        return max(0.0, self._end - time.monotonic())


class Ended(NamedTuple):
    code: int | None
    """Exit code; None: stopped here, at its time limit."""
    seconds: float
    tail: str
    """The last characters of what it printed."""

    @property
    def in_a_line(self) -> str | None:
        """Why it did not do its work, with the last line that it printed; None when it did."""
        if self.code == 0:
            return None
        lines = self.tail.strip().splitlines() or ["(it printed nothing)"]
        limit = f"stopped after {self.seconds:.0f} s, its time limit"
        return f"{limit if self.code is None else f'left with {self.code}'}: {lines[-1]}"


@contextlib.contextmanager
def ending_with_programs() -> Iterator[None]:
    """Inside SIGTERM ends this process as an exception does: with the program that it runs."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_program(
    command: Sequence[str],
    limit_s: float,
    environment: Mapping[str, str] | None = None,
    cwd: str | None = None,
    look: Callable[[], Any] = lambda: None,
    *,
    echo: bool = False,
) -> Ended:
    """Run a program in a session of its own, to its end or to its time limit.

    Args:
        limit_s: seconds after which it and its children are asked, then made, to end.
        environment: variables on top of this process's own.
        look: called every 2 s while it runs, and once after it.
        echo: copy what it prints to standard error as it comes.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        shown = 0
        try:
            looked = started
            while (code := process.poll()) is None and time.monotonic() - started < limit_s:
                if time.monotonic() - looked >= LOOK_S:
                    look()
                    looked = time.monotonic()
                shown = _show(output, shown) if echo else 0
                time.sleep(POLL_S)
        finally:
            _end_group(process)
        if echo:
            _show(output, shown)
        look()
        return Ended(code, time.monotonic() - started, _tail(output))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the program's process group."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
            if signal_number == signal.SIGTERM and not _group_lives(process.pid):
                return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _show(output: IO[bytes], shown: int) -> int:
    """Copy what came behind `shown` bytes to standard error; returns how many bytes there are now."""
    while data := os.pread(output.fileno(), READ_BYTES, shown):  # the program writes at the file's own offset
        sys.stderr.write(data.decode("utf-8", errors="replace"))
        shown += len(data)
    sys.stderr.flush()
    return shown


def _tail(output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - 4 * TAIL_CHARS))
    return output.read().decode("utf-8", errors="replace")[-TAIL_CHARS:]
