"""The training loop: from settings to a trained model. With `config/schema.py` this file tells the story.

    take the step's batches, drawn from the weights in force
    forward and backward, one pack at a time; domain sums stay on the device
    one all-reduce: domain sums, was any loss not finite, was anyone asked to stop
    optimizer step, or the same skip on every rank
    when due: update the domain weights, evaluate, save
    record

Every rank runs the same lines. What they decide from is either the same by construction (settings, plan) or
the result of that one all-reduce.

Where the host waits for the device: once in `StepStatistics.reduce`, and in what DeepSpeed 0.19.8 does under
ZeRO-3 and offers no setting for: after each backward for the stream that reduces gradients (their buffers are
used again), before a parameter is fetched for an older fetch (which bounds memory; on one rank for the fetch
itself), and at the optimizer step for the norm, to see whether it is finite. With flash-attn transformers
looks in every forward whether position ids hold several sequences; torch's varlen kernel is spared that
(`attention.register_varlen`). `tests/engine/test_waits.py` counts what a CPU can show.

What is not covered: how a run is opened (`engine/run.py`), and what each part does inside.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from versatune_ds.config.schema import Config
from versatune_ds.data.collate import Batch
from versatune_ds.data.planner import StepPlan
from versatune_ds.engine.build import (
    close_process_group,
    discard_step,
    start_process_group,
)
from versatune_ds.engine.device_errors import explained
from versatune_ds.engine.evaluate import HeldOut, evaluate, model_inputs
from versatune_ds.engine.export import Companions, export_model
from versatune_ds.engine.heartbeat import Heartbeat
from versatune_ds.engine.liveness import mark
from versatune_ds.engine.optimizer import learning_rate, set_learning_rate
from versatune_ds.engine.run import Run, open_run
from versatune_ds.engine.run_lock import RunLock
from versatune_ds.engine.signals import StopRequest, note_stopped
from versatune_ds.engine.skipping import FP16_OVERFLOW, NONFINITE_GRADIENT, reason_to_skip, report_skip
from versatune_ds.engine.statistics import Flags, StepTotals
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import VersaTuneError
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.records import EvalRecord, StepRecord
from versatune_ds.observability.throughput import mfu, peak_memory_gib, step_flops, step_flops_6n

log = get_logger(__name__)


class StepTimes(NamedTuple):
    """Seconds of one step on this rank."""

    whole: float
    boundary: float
    update: float
    probe: float


# --- the run ------------------------------------------------------------------------------------------------


def train(config: Config, config_path: Path | None = None) -> None:
    """Train a model by its settings; returns when the run is finished or was asked to stop and has saved.

    Args:
        config_path: the settings' file, for error texts that name a command.

    Raises:
        VersaTuneError: bad settings, data or state, or a run that diverged.
    """
    device = start_process_group(config.run.collective_timeout_s)
    train_in_group(config, device, config_path)
    close_process_group()


def train_in_group(config: Config, device: torch.device, config_path: Path | None = None) -> bool:
    """`train` within a process group that is already there and stays; False when it was asked to stop."""
    watched = Heartbeat(config.run.hang_timeout_s)
    with StopRequest() as stop, watched, RunLock(config.run.dir), explained(config):
        run = open_run(config, device, config_path)
        try:
            finished = run_steps(run, stop)
            if finished:
                finish(run)
            return finished
        finally:
            run.close()


def run_steps(run: Run, stop: StopRequest) -> bool:
    """All remaining steps; False when the run was asked to stop before its last one."""
    if run.first_step == 0:
        record_weights(run, run.controller.initial_update().to_json())
    if not run.early_stopping.exhausted:
        evaluate_when_due(run, run.first_step)
    for step in range(run.first_step, run.total_steps):
        if run.early_stopping.exhausted:
            break
        agreed = run_step(run, step, stop)
        done = step + 1
        last = done == run.total_steps
        run.saver.settle(agreed)
        if run.saver.due(done, agreed, last):
            run.saver.save(done, run.state)
        if agreed.stop and not last:
            run.saver.finish()
            log.info(
                "stopped after step %d as asked (%s); start the same command to go on", done, stop.reason
            )
            note_stopped(done, run.total_steps)
            return False
        evaluate_when_due(run, done)
    run.saver.finish()
    return True


def run_step(run: Run, step: int, stop: StopRequest) -> Flags:
    """One optimizer step; returns what the ranks agreed on at its boundary."""
    started = time.perf_counter()
    rate = learning_rate(run.config.optimizer, step, run.total_steps)
    mark("waiting for data", step + 1)
    plan, batches = run.loader.take(run.controller.weights)
    sample_losses = accumulate(run, plan, batches)

    mark("reduction of the statistics", step + 1)
    reached_boundary = time.perf_counter()
    totals = run.statistics.reduce(run.saver.flags(stop=stop.requested is not None))
    left_boundary = time.perf_counter()

    mark("optimizer step", step + 1)
    reason = reason_to_skip(run, totals)
    applied = apply_step(run, reason, rate)
    if applied and totals.sums is not None:
        run.controller.observe(totals.sums)
        run.spikes.observe(totals.sums.total_loss())
    elif run.config.model.dtype != "fp16":  # fp16 adapts its loss scale
        reason = reason or NONFINITE_GRADIENT  # found by ZeRO
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if reason else 0
    stepped = time.perf_counter()
    updated = run.controller.due(step + 1, skipped=not applied)
    probe_s = update_weights(run, step + 1) if updated else 0.0
    ended = time.perf_counter()
    update_s = ended - stepped if updated else 0.0
    times = StepTimes(ended - started, left_boundary - reached_boundary, update_s, probe_s)
    record_step(run, plan, totals, rate, None if applied else reason or FP16_OVERFLOW, times)
    if reason and (error := report_skip(run, plan, totals, sample_losses, reason)):
        run.saver.save(step + 1, run.state)
        run.saver.finish()
        raise error
    return totals.flags


# --- the parts of a step ------------------------------------------------------------------------------------


def accumulate(run: Run, plan: StepPlan, batches: list[Batch]) -> list[torch.Tensor]:
    """Forward and backward over this rank's packs; returns the per-sample losses, still on the device.

    The loss of every pack is divided by the supervised tokens of the whole step over all ranks. DeepSpeed
    then averages gradients over ranks, hence the factor of the world size.
    """
    engine = run.engine
    normalizer = plan.supervised_tokens / distributed.world_size()
    sample_losses = []
    for i, batch in enumerate(batches):
        mark(f"forward and backward of pack {i + 1} of {len(batches)}", plan.step + 1)
        engine.deepspeed.set_gradient_accumulation_boundary(i == len(batches) - 1)
        on_device = batch.to(engine.device, non_blocking=True)
        out = engine.deepspeed(**model_inputs(on_device, normalizer))
        run.statistics.add(out, on_device.sample_domains)
        # clone: at ZeRO stage 0 DeepSpeed 0.19.8 divides the gradient of a model output by the accumulation
        # steps in spite of scale_wrt_gas; the hook that should prevent it runs too late on that very tensor
        engine.deepspeed.backward(out.loss.clone(), scale_wrt_gas=False)
        sample_losses.append(out.sample_loss)
    return sample_losses


def apply_step(run: Run, reason: str | None, rate: float) -> bool:
    """Take the optimizer step, or discard it on every rank when there is a reason to skip it."""
    if reason is not None:
        discard_step(run.engine)
        return False
    set_learning_rate(run.engine.deepspeed.optimizer, rate)
    run.engine.deepspeed.step()
    return bool(run.engine.deepspeed.was_step_applied())


def update_weights(run: Run, done: int) -> float:
    """Move the domain weights; the next batch is drawn from them.

    Returns:
        Seconds that the held-out probe took; 0 without one.

    Raises:
        VersaTuneError: ranks came to different weights.
    """
    probed = None if run.probe is None else evaluate(run.engine, run.probe, len(run.table))
    update = run.controller.update(done, None if probed is None else probed.sums)
    if not distributed.all_equal(run.controller.digest()):
        raise VersaTuneError(
            f"after step {done} the ranks hold different domain weights: this is a bug, report it"
        )
    record_weights(run, update.to_json())
    return 0.0 if probed is None else probed.seconds


# --- records ------------------------------------------------------------------------------------------------


def record_weights(run: Run, line: dict[str, Any]) -> None:
    """A line of weights.jsonl, and the console."""
    run.sinks.weight_update(line)
    if line["step"] > 0:
        run.progress.weight_update(line)


def record_step(
    run: Run, plan: StepPlan, totals: StepTotals, rate: float, why_skipped: str | None, times: StepTimes
) -> None:
    """A line of metrics.jsonl, and the console; rank 0 only."""
    if not distributed.is_main():
        return
    names, sums = run.table.names, totals.sums
    none = dict.fromkeys(names)
    units = ("samples", "tokens", "supervised_tokens")
    lengths = [pack.lengths.astype("int64") for pack in plan.packs]
    flops = step_flops(
        run.shape,
        real_tokens=plan.tokens,
        supervised_tokens=plan.supervised_tokens,
        sum_squared_lengths=sum(int((n * n).sum()) for n in lengths),
    )
    slots = plan.num_packs * plan.pack_len
    flops_6n = step_flops_6n(run.shape, slot_tokens=slots, pack_len=plan.pack_len)
    norm = run.engine.deepspeed.get_global_grad_norm() if why_skipped is None else None
    record = StepRecord(
        step=plan.step + 1,
        loss=None if sums is None else sums.total_loss(),
        lr=rate,
        grad_norm=None if norm is None else float(norm),
        skipped=why_skipped is not None,
        skip_reason=why_skipped,
        real_tokens=plan.tokens,
        slot_tokens=slots,
        supervised_tokens=plan.supervised_tokens,
        samples=plan.num_samples,
        domain_loss=none if sums is None else run.table.by_name(sums.mean_loss()),
        domain_supervised_tokens=dict(zip(names, plan.trained.supervised_tokens, strict=True)),
        weights=run.table.by_name(plan.weights),
        weight_unit=run.config.domains.weight_unit,
        target_shares=run.table.by_name(plan.target_shares),
        achieved_shares={u: run.table.by_name(getattr(plan.shares, u)) for u in units},
        cumulative_shares={
            u: run.table.by_name(getattr(plan.state_after.trained.shares(), u)) for u in units
        },
        epochs={
            name: trained / max(1, size)
            for name, trained, size in zip(
                names, plan.state_after.trained.samples, run.corpus.num_samples, strict=True
            )
        },
        step_s=times.whole,
        data_wait_s=run.loader.last_wait_s,
        plan_s=run.loader.last_plan_s,
        boundary_s=times.boundary,
        update_s=times.update,
        probe_s=times.probe,
        save_stall_s=run.saver.take_stall_s(),
        memory_gib=peak_memory_gib(),
        mfu=mfu(flops, times.whole, distributed.world_size(), run.peak_tflops),
        mfu_6n=mfu(flops_6n, times.whole, distributed.world_size(), run.peak_tflops),
    )
    run.sinks.step(record)
    run.progress.step(record)


def evaluate_when_due(run: Run, done: int) -> None:
    """Held-out losses before the first step, every n steps, and after the last."""
    every = run.config.evaluation.every_n_steps
    if run.held_out is None or every is None or not (done % every == 0 or done == run.total_steps):
        return
    record_evaluation(run, done, run.held_out)
    if run.early_stopping.exhausted and run.config.checkpoint.every_n_steps:
        run.saver.save(done, run.state)  # a restart then knows that the run is over


def record_evaluation(run: Run, done: int, held_out: HeldOut) -> None:
    """Evaluate on all ranks; a line of eval.jsonl and the console."""
    result = evaluate(run.engine, held_out, len(run.table))
    names = run.table.names
    record = EvalRecord(
        step=done,
        domain_loss=run.table.by_name(result.sums.mean_loss()),
        domain_supervised_tokens=dict(zip(names, map(int, result.sums.tokens), strict=True)),
        domain_samples=dict(zip(names, map(int, result.samples), strict=True)),
        domain_stderr=run.table.by_name(result.sums.stderr()),
        eval_s=result.seconds,
    )
    run.sinks.evaluation(record)
    run.progress.evaluation(record)
    run.after_evaluation(done, record.loss, result.sums)


# --- the end ------------------------------------------------------------------------------------------------


def finish(run: Run) -> None:
    """Export the model and say where things lie."""
    mark("export", is_limited=False)
    target = run.folder / constants.EXPORT_DIR
    if run.config.checkpoint.export_at_end:
        shard_bytes = int(run.config.checkpoint.export_shard_gb * 1e9)
        companions = Companions.of(run.config, run.tokenizer, run.engine.model.lm.config)
        export_model(run.engine.model, companions, target, shard_bytes)
        run.progress.note(f"model: {target}")
    run.progress.note(f"run folder: {run.folder} (versatune-ds report {run.folder})")
