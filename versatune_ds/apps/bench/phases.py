"""The phases of a step as the benchmark shows them, and a run without its domain statistics.

The loop names its phases (`engine/phases.py`); here they are recorded with the device's clock, with a barrier
before the reduction, so that waiting for slower ranks is told apart from it.

What is not covered: when steps are taken and what becomes of the seconds (`apps/bench/trainer.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from versatune_ds.apps.bench.results import PHASES
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.engine import phases as loop
from versatune_ds.engine.phases import CudaClock, HostClock, Recorder, timed
from versatune_ds.engine.run import Components
from versatune_ds.engine.statistics import NO_FLAGS, Flags, StepTotals
from versatune_ds.foundations import distributed

RANK_WAIT = "rank_wait"
SHOWN_AS = {
    loop.DATA_WAIT: "data_wait",
    loop.FORWARD: "forward",
    loop.LOSS: "loss",
    loop.BACKWARD: "backward",
    loop.OPTIMIZER_STEP: "optimizer",
    loop.STATISTICS: "statistics",
    loop.REDUCTION: "statistics",
    RANK_WAIT: "rank_wait",
}
"""The loop's phases by their names in results; all else is "other"."""


def clock_of(device: torch.device) -> HostClock:
    return CudaClock() if device.type == "cuda" else HostClock()


class SplitRecorder(Recorder):
    """Records every phase, and lets the ranks meet before the reduction."""

    def enter(self, name: str) -> Any:
        if name == loop.REDUCTION:
            with timed(RANK_WAIT):
                distributed.barrier()
        return super().enter(name)


def split(step_s: float, own_seconds: Mapping[str, float]) -> dict[str, float]:
    """Phases that add up to the step."""
    out = dict.fromkeys(PHASES, 0.0)
    for name, seconds in own_seconds.items():
        if name in SHOWN_AS:
            out[SHOWN_AS[name]] += seconds
    out["other"] = max(0.0, step_s - sum(out.values()))
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
def without_statistics(run: Components) -> Iterator[Components]:
    """Gives a run that adds and reduces nothing, and whose head computes the loss only while this is open."""
    head = run.backend.model.lm.get_output_embeddings()
    forward = head.forward

    def loss_only(hidden: Any, labels: Any, sample_ids: Any, num_samples: int, *rest: Any) -> Any:
        return forward(hidden, labels, None, None, *rest)

    head.forward = loss_only
    nothing: Any = NoStatistics(len(run.table))
    try:
        yield dataclasses.replace(run, statistics=nothing)
    finally:
        del head.forward  # the class's own is back in force
