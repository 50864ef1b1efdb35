"""From a step to its line in metrics.jsonl.

What is not covered: the fields and what they mean (`observability/records.py`), and where the line goes
(`observability/sinks.py`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from versatune_ds.data.plan.planner import StepPlan
from versatune_ds.engine.phases import DATA_WAIT, PROBE, REDUCTION, WEIGHT_UPDATE, Recorder
from versatune_ds.engine.run import Components
from versatune_ds.engine.statistics import StepTotals
from versatune_ds.foundations import distributed
from versatune_ds.observability.records import StepRecord, by_domain, ratio
from versatune_ds.observability.throughput import mfu, peak_memory_gib


def record_step(
    run: Components,
    plan: StepPlan,
    totals: StepTotals,
    rate: float,
    why_skipped: str | None,
    times: Recorder,
) -> None:
    """A line of metrics.jsonl, and the console; rank 0 only.

    Args:
        rate: its learning rate, applied or not.
        times: its phases so far on this rank.
    """
    if not distributed.is_main():
        return
    names, sums, routers = run.table.names, totals.sums, run.backend.model.routers
    none = dict.fromkeys(names)
    kl = totals.base_kl
    weighted = totals.weighted if run.prepared.corpus.has_weights else None

    def quotients(sums: npt.NDArray[np.float64]) -> dict[str, float | None]:
        return by_domain(names, [ratio(*of_domain) for of_domain in sums.T])

    units = ("samples", "tokens", "supervised_tokens")
    step_s = times.age_s()
    flops = run.shape.step_flops(
        real_tokens=plan.tokens,
        supervised_tokens=plan.supervised_tokens,
        sum_squared_lengths=plan.sum_squared_lengths,
    )
    slots = plan.num_packs * plan.pack_len
    flops_6n = run.shape.step_flops_6n(slot_tokens=slots, pack_len=plan.pack_len)
    record = StepRecord(
        step=plan.step + 1,
        loss=None if sums is None else sums.total_loss(),
        lr=rate,
        grad_norm=run.backend.grad_norm() if why_skipped is None else None,
        skipped=why_skipped is not None,
        skip_reason=why_skipped,
        real_tokens=plan.tokens,
        slot_tokens=slots,
        supervised_tokens=plan.supervised_tokens,
        samples=plan.num_samples,
        domain_loss=none if sums is None else run.table.by_name(sums.mean_loss()),
        weighted_loss=ratio(*weighted.sum(1)) if weighted is not None else None,
        domain_weighted_loss=None if weighted is None else quotients(weighted),
        base_kl=None if kl is None else ratio(*kl.sum(1)),
        domain_base_kl=None if kl is None else quotients(kl),
        domain_supervised_tokens=dict(zip(names, plan.trained.supervised_tokens, strict=True)),
        weights=run.table.by_name(plan.weights),
        weight_unit=run.config.domains.weight_unit,
        target_shares=run.table.by_name(plan.target_shares),
        achieved_shares={u: run.table.by_name(getattr(plan.trained.shares(), u)) for u in units},
        cumulative_shares={
            u: run.table.by_name(getattr(plan.state_after.trained.shares(), u)) for u in units
        },
        epochs={
            name: trained / max(1, size)
            for name, trained, size in zip(
                names, plan.state_after.trained.samples, run.prepared.corpus.num_samples, strict=True
            )
        },
        step_s=step_s,
        data_wait_s=times.seconds(DATA_WAIT),
        plan_s=run.loader.last_plan_s,
        boundary_s=times.seconds(REDUCTION),
        update_s=times.seconds(WEIGHT_UPDATE),
        probe_s=times.seconds(PROBE),
        save_stall_s=run.saver.take_stall_s(),
        memory_gib=peak_memory_gib(),
        mfu=mfu(flops, step_s, distributed.world_size(), run.peak_tflops),
        mfu_6n=mfu(flops_6n, step_s, distributed.world_size(), run.peak_tflops),
        **(
            routers.measures(totals.routers, plan.num_packs) if routers and totals.routers is not None else {}
        ),
    )
    run.sinks.step(record)
    run.progress.step(record)
