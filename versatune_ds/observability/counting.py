"""How far a countable piece of work is: a bar on a terminal, else a line every few seconds.

What is not covered: training steps (`progress.py`).
"""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

from versatune_ds.observability.progress import duration, is_terminal


class WorkProgress:
    """Console of rank 0.

    Args:
        what: what is being done, e.g. "generating".
        unit: what is counted, in the plural.
        is_main: False on ranks other than 0: nothing is printed.
        interval_s: seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int,
        done: int = 0,
        *,
        is_main: bool = True,
        interval_s: float = 5.0,
    ) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done = self._done_at_start = done
        self._is_main = is_main
        self._interval_s = interval_s
        self._started_s = self._printed_s = time.monotonic()
        self._bar: Any = None
        if is_main and is_terminal(sys.stderr):
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if self._is_main and (now - self._printed_s >= self._interval_s or self._done >= self._total):
            self._printed_s = now
            elapsed = now - self._started_s
            rate = (self._done - self._done_at_start) / max(elapsed, 1e-9)
            end = (
                f"took {duration(elapsed)}"
                if self._done >= self._total
                else f"ETA {duration((self._total - self._done) / rate) if rate else '-'}"
            )
            line = f"{self._what}: {self._done}/{self._total} {self._unit} | {rate:.3g}/s | {end}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
