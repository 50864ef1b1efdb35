"""Steps that are skipped on all ranks: why, which samples, and when to give up.

A step is skipped before the optimizer sees it when a loss or gradient is not finite, or when the loss of the
step leaps up (`train.spike_factor`). The reasons are found in what the ranks have already reduced together,
so all of them decide alike without another collective.

What is not covered: fp16 overflows, through which DeepSpeed finds its loss scale; they are not counted.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from versatune_ds.data.plan.balance import rank_packs
from versatune_ds.data.plan.planner import StepPlan
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.run import Components
from versatune_ds.engine.state import SpikeGuard
from versatune_ds.engine.statistics import StepTotals
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import DivergenceError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

NONFINITE_LOSS = "non-finite loss"
NONFINITE_GRADIENT = "non-finite gradient"
LOSS_SPIKE = "loss spike"
FP16_OVERFLOW = "fp16 overflow"
SAMPLES_SHOWN = 16
"""Samples of a loss spike that are written down, those with the highest losses first."""


def reason_to_skip(totals: StepTotals, spikes: SpikeGuard, backend: Backend) -> str | None:
    """Why this step must not be applied, or None; the same on all ranks."""
    if totals.sums is None:
        return NONFINITE_LOSS
    if spikes.is_spike(totals.sums.total_loss()):
        return LOSS_SPIKE
    return None if backend.gradients_are_finite() else NONFINITE_GRADIENT


def report_skip(
    run: Components, plan: StepPlan, totals: StepTotals, sample_losses: list[torch.Tensor], reason: str
) -> DivergenceError | None:
    """Write down a skipped step and its samples; a collective.

    Args:
        sample_losses: per micro-batch of this rank, float[S]: summed loss of each sample in nats.

    Returns:
        The error to end with, once `train.max_skipped_steps` steps in a row have been skipped.
    """
    found = [
        s for mine in distributed.gather_objects(_samples(run, plan, sample_losses, reason)) for s in mine
    ]
    line: dict[str, Any] = {"step": plan.step + 1, "reason": reason}
    if reason == LOSS_SPIKE:
        assert totals.sums is not None
        found = sorted(found, key=lambda sample: -sample["loss"])[:SAMPLES_SHOWN]
        line |= {"loss": totals.sums.total_loss(), "median_loss": median(run.state.spikes.state())}
    run.sinks.skipped_step(line | {"samples": found})
    places = ", ".join(f"{s['domain']} {s['source']}" for s in found[:3]) or "no sample that can be named"
    log.warning("step %d skipped on all ranks: %s in %s", plan.step + 1, reason, places)
    if run.state.skipped_in_a_row < run.config.train.max_skipped_steps:
        return None
    return DivergenceError(
        f"{run.state.skipped_in_a_row} steps in a row were skipped, the last one for a {reason} in {places}; "
        f"see {run.folder / constants.SKIPPED_STEPS_FILE}. The last good state is saved. Lower optimizer.lr, "
        "or look at these samples"
    )


def _samples(
    run: Components, plan: StepPlan, sample_losses: list[torch.Tensor], reason: str
) -> list[dict[str, Any]]:
    """This rank's samples to blame and where they come from; a gradient cannot be traced to any."""
    if reason == NONFINITE_GRADIENT or run.backend.ranks.sp.rank > 0:  # who shares a pack has the same
        return []
    found = []
    packs = rank_packs(plan.packs, *run.backend.ranks.dp)
    for pack, losses in zip(packs, sample_losses, strict=True):
        for i, loss in enumerate(losses.tolist()):
            domain, sample = int(pack.domains[i]), int(pack.samples[i])
            is_finite = loss - loss == 0
            if reason == NONFINITE_LOSS and is_finite:
                continue
            path, line = run.prepared.train[domain].source_of(sample)
            entry = {"domain": run.table.names[domain], "sample": sample, "source": f"{path}:{line}"}
            if reason == LOSS_SPIKE:
                entry["loss"] = loss / max(1, int(run.prepared.train[domain].supervised[sample]))
            found.append(entry)
    return found
