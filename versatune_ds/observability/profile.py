"""`train.profile`: a few steps under torch's profiler, for the report and for a trace viewer.

Rank 0 writes PROFILE_DIR of the run folder: trace.json.gz (every operator and kernel, with the phases of the
step by name), profile.json (where the time went, in a few numbers), and on CUDA memory.pickle (what was
allocated, and from where). Steps under the profiler are slower; nothing about the training changes.

What is not covered: the other ranks, and reading it (`report/profile.py`, docs/metrics.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from versatune_ds.foundations import constants
from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.log import get_logger

LOGGER = get_logger(__name__)
TOP = 10
NAME_CHARS = 120
MEMORY_EVENTS = 200_000
"""Newest allocations that the memory snapshot keeps; one event is well under 1 kB."""


class StepProfiler:
    """Profiles the steps that were asked for.

    Args:
        steps: the first and the last one, from 1; None: this rank profiles nothing.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self._folder = folder / constants.PROFILE_DIR
        self._steps = steps
        self._profile: Any = None
        self._first, self._began = 0, 0.0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Within it step `number` is done; it is profiled if that was asked for."""
        if self._steps is not None and number > self._steps[1]:
            self._steps = None  # a resumed run: an earlier process has profiled them
        if self._steps is None or number < self._steps[0]:
            yield
            return
        if self._profile is None:
            self._start(number)
        yield
        if number == self._steps[1]:
            self._stop(number)

    def close(self) -> None:
        """Say what was asked for and not done; a run that ends among these steps writes no profile."""
        if self._steps is not None:
            LOGGER.warning("train.profile: the run did not get through the steps %d to %d", *self._steps)
            if self._profile is not None:
                self._profile.stop()
                self._end()

    def _start(self, number: int) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()
        self._first, self._began = number, time.perf_counter()

    def _stop(self, last: int) -> None:
        """End and write; a full disk costs the profile, not the run."""
        import torch

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        wall_s = time.perf_counter() - self._began
        self._profile.stop()
        self._steps = None
        try:
            self._folder.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(self._folder / constants.PROFILE_TRACE_FILE))
            if cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / constants.PROFILE_MEMORY_FILE))
            found = summary(self._profile.key_averages(), wall_s, on_cuda=cuda)
            steps = {"steps": [self._first, last], "device": "cuda" if cuda else "cpu"}
            write_json_atomic(self._folder / constants.PROFILE_FILE, {**steps, **found})
            LOGGER.info("profile of the steps %d to %d: %s", self._first, last, self._folder)
        except (OSError, RuntimeError) as error:
            LOGGER.warning("the profile could not be written (%s); training goes on", error)
        finally:
            self._end()

    def _end(self) -> None:
        """Record nothing more: a later run of this process is not asked for."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None


def summary(averages: Iterable[Any], wall_s: float, *, on_cuda: bool) -> dict[str, Any]:
    """`wall_s`, the `phases` in host seconds, and the `TOP` items with the most seconds of their own.

    Args:
        averages: of torch's profiler, one an operator, kernel or phase.
        on_cuda: items are kernels and copies on the device; else operators on the host.
    """
    from torch.autograd import DeviceType

    phases, items = [], []
    for event in averages:
        on_host = event.device_type == DeviceType.CPU
        if event.is_user_annotation:
            if on_host:
                phases.append((event.key, event.cpu_time_total, event.count))
        elif on_host != on_cuda:
            own = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            items.append((event.key[:NAME_CHARS], own, event.count))

    def largest(found: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
        ordered = sorted(found, key=lambda row: -row[1])[:TOP]
        return [{"name": name, "seconds": us / 1e6, "calls": calls} for name, us, calls in ordered]

    return {"wall_s": wall_s, "phases": largest(phases), "items": largest(items)}
