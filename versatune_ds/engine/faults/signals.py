"""Stop requests: SIGTERM, SIGINT and SIGUSR1 set a flag; the ranks agree on it at the next step boundary.

A handler does nothing else, so that no rank leaves while others wait in a collective. A second SIGINT (an
impatient Ctrl-C) ends the process at once.

A stopped run leaves with code 0 like a finished one: a launcher that sees another code kills the ranks that
are still leaving. What tells a batch script the difference is a file that it names in VERSATUNE_STOP_FILE.

What is not covered: requeueing (batch scripts do that) and ranks that die without a signal handler running.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from versatune_ds.foundations import distributed
from versatune_ds.foundations.files import write_json_atomic

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE_VARIABLE = "VERSATUNE_STOP_FILE"


def note_stopped(step: int, total_steps: int) -> None:
    """Write the file that VERSATUNE_STOP_FILE names, if it does: the run stopped as asked and has saved.

    Args:
        step: finished steps; the checkpoint after them is complete.
    """
    path = os.environ.get(STOP_FILE_VARIABLE)
    if path and distributed.is_main():
        write_json_atomic(Path(path), {"step": step, "total_steps": total_steps})


class StopRequest:
    """Whether this rank has been asked to stop; use as a context manager to install the handlers."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    @property
    def reason(self) -> str:
        """The signal's name, for messages; another rank's when this one got none."""
        return self.requested.name if self.requested is not None else "a signal on another rank"

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)
