"""Timing the phases of a step, and taking its domain statistics away, without touching the step.

`run_step` calls the engine, the statistics and the head; here these are replaced by stand-ins that
time the call and hand it on. On CUDA a span is two events on the current stream, so that nothing
waits while a step runs; on a CPU it is two readings of the clock.

What is not covered: when steps are taken and what becomes of the seconds (`apps/bench/trainer.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from versatune_ds.apps.bench.results import PHASES
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.engine.run import Run
from versatune_ds.engine.statistics import NO_FLAGS, Flags, StepStatistics, StepTotals
from versatune_ds.foundations import distributed


class Stopwatch:
    """Seconds by name: CUDA events on the current stream, or the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        self.begin(name)
        yield
        self.end(name)

    def begin(self, name: str) -> None:
        """Start a span of this name."""
        self._open[name] = self._now()

    def end(self, name: str) -> None:
        """End the open span of this name."""
        self._spans.append((name, self._open.pop(name), self._now()))

    def seconds(self) -> dict[str, float]:
        """Sums by name since the last call; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, begin, end in self._spans:
            took = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            sums[name] = sums.get(name, 0.0) + took
        self._spans.clear()
        return sums

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class TimedBackend:
    """A backend whose forward, backward and step are timed; everything else is the backend's own."""

    def __init__(self, backend: Any, watch: Stopwatch) -> None:
        self._backend = backend
        self._watch = watch

    def forward(self, **inputs: Any) -> Any:
        with self._watch.span("forward"):
            return self._backend.forward(**inputs)

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        with self._watch.span("backward"):
            return self._backend.backward(*args, **kwargs)

    def step(self, learning_rate: float) -> Any:
        with self._watch.span("optimizer"):
            return self._backend.step(learning_rate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class TimedStatistics:
    """Domain statistics, timed; ranks meet before the reduction."""

    def __init__(self, statistics: StepStatistics, watch: Stopwatch) -> None:
        self._statistics = statistics
        self._watch = watch

    def add(self, *args: Any) -> None:
        """As `StepStatistics.add`."""
        with self._watch.span("statistics"):
            self._statistics.add(*args)

    def reduce(self, flags: Flags = NO_FLAGS) -> StepTotals:
        """As `StepStatistics.reduce`."""
        with self._watch.span("rank_wait"):
            distributed.barrier()
        with self._watch.span("statistics"):
            return self._statistics.reduce(flags)


@contextlib.contextmanager
def timed_phases(run: Run) -> Iterator[Stopwatch]:
    """Within it, the calls of a step are timed."""
    watch = Stopwatch(run.backend.device)
    backend, statistics = run.backend, run.statistics
    head = backend.model.lm.get_output_embeddings()
    hooks = [
        head.register_forward_pre_hook(lambda *_: watch.begin("loss")),
        head.register_forward_hook(lambda *_: watch.end("loss")),
    ]
    run.backend = TimedBackend(backend, watch)  # type: ignore[assignment]
    run.statistics = TimedStatistics(statistics, watch)  # type: ignore[assignment]
    try:
        yield watch
    finally:
        run.backend, run.statistics = backend, statistics
        for hook in hooks:
            hook.remove()


def phases(step_s: float, data_wait_s: float, spans: dict[str, float]) -> dict[str, float]:
    """Spans that overlap made into phases that add up to the step: the head runs inside forward."""
    out = dict.fromkeys(PHASES, 0.0)
    out.update(spans, data_wait=data_wait_s)
    out["forward"] -= out["loss"]
    out["other"] = max(0.0, step_s - sum(value for name, value in out.items() if name != "other"))
    return out


class NoStatistics:
    """Statistics that are neither kept nor reduced; the step also loses its check for non-finite losses."""

    def __init__(self, num_domains: int) -> None:
        self._nothing = DomainSums.zeros(num_domains)

    def add(self, *args: Any) -> None:
        """Nothing."""

    def reduce(self, flags: Flags = NO_FLAGS) -> StepTotals:
        """No sums, and no collective."""
        return StepTotals(self._nothing, flags)


@contextlib.contextmanager
def without_statistics(run: Run) -> Iterator[None]:
    """Within it, the head computes the loss only, and nothing is added or reduced."""
    head, statistics = run.backend.model.lm.get_output_embeddings(), run.statistics
    forward = head.forward

    def loss_only(hidden: Any, labels: Any, sample_ids: Any, num_samples: int, *rest: Any) -> Any:
        return forward(hidden, labels, None, None, *rest)

    head.forward = loss_only
    run.statistics = NoStatistics(len(run.table))  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward  # the class's own is back in force
        run.statistics = statistics
