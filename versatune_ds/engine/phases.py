"""Where a run is: one context manager that tells the watchdog, and keeps the time for who wants it.

    with phase("forward", step, f"of pack {i} of {n}"):
        ...

The watchdog gets a mark, torch's profiler (`train.profile`) the name. Every open `Recorder` gets the span:
the loop opens one for each step and takes from it what metrics.jsonl says about time; the benchmark opens one
with a clock of CUDA events for its split. Nothing here waits for the device or for another rank while a step
runs.

What is not covered: other threads; phases belong to the main one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from versatune_ds.engine.faults import watchdog

DATA_WAIT = "waiting for data"
FORWARD = "forward"
LOSS = "loss"
BACKWARD = "backward"
STATISTICS = "statistics"
REDUCTION = "reduction of the statistics"
OPTIMIZER_STEP = "optimizer step"
WEIGHT_UPDATE = "weight update"
PROBE = "probe"


class HostClock:
    """Moments of the process, in seconds."""

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin)


class CudaClock(HostClock):
    """Moments of the current stream: events, which the device passes when it gets there."""

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """From one event to another; waits until the device has passed the latter."""
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class PhaseTiming(NamedTuple):
    name: str
    depth: int
    """Phases around it."""
    begin: Any
    end: Any


class Recorder:
    """The phases that end while it is open (`recording`)."""

    def __init__(self, clock: HostClock) -> None:
        self.clock = clock
        self.spans: list[PhaseTiming] = []
        """In the order of their ends."""
        self._began = time.perf_counter()

    def enter(self, name: str) -> Any:
        """Called as a phase begins; gives its first moment."""
        return self.clock.now()

    def age_s(self) -> float:
        """Seconds of the host since it was made."""
        return time.perf_counter() - self._began

    def seconds(self, name: str) -> float:
        """Of all phases of this name, with the phases inside them; 0 without any."""
        return sum(self.clock.seconds(span.begin, span.end) for span in self.spans if span.name == name)

    def own_seconds(self) -> dict[str, float]:
        """Seconds by name without those of the phases inside; waits for the device if the clock is its."""
        own: dict[str, float] = defaultdict(float)
        inside: dict[int, float] = defaultdict(float)
        """By depth: ended phases whose outer one has not ended yet."""
        for span in self.spans:
            took = self.clock.seconds(span.begin, span.end)
            own[span.name] += took - inside.pop(span.depth + 1, 0.0)
            inside[span.depth] += took
        return own


_recorders: list[Recorder] = []
_depth = 0


@contextmanager
def recording(recorder: Recorder | None = None) -> Iterator[Recorder]:
    """Within it `recorder` (by default a new one with the host's clock) gets every phase."""
    recorder = recorder or Recorder(HostClock())
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """A phase within another that the watchdog need not know."""
    global _depth
    begun = [(recorder, recorder.enter(name)) for recorder in _recorders]
    _depth += 1
    try:
        with record_function(name):
            yield
    finally:
        _depth -= 1
        for recorder, begin in begun:
            recorder.spans.append(PhaseTiming(name, _depth, begin, recorder.clock.now()))


@contextmanager
def phase(name: str, step: int | None = None, detail: str = "", is_limited: bool = True) -> Iterator[None]:
    """What runs inside is this phase.

    Args:
        step: optimizer step from 1; None outside the steps.
        detail: further words for the watchdog's message, such as "of pack 2 of 4".
        is_limited: whether staying here too long is a hang (`faults/watchdog.py`).
    """
    watchdog.mark(f"{name} {detail}" if detail else name, step, is_limited)
    with timed(name):
        yield
