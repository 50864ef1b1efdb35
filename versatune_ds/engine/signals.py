"""Stop requests: SIGTERM, SIGINT and SIGUSR1 set a flag; the ranks agree on it at the next step boundary.

A handler does nothing else, so that no rank leaves while others wait in a collective. A second SIGINT (an
impatient Ctrl-C) ends the process at once.

What is not covered: requeueing (batch scripts do that) and ranks that die without a signal handler running.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
