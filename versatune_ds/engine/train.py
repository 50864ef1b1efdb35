"""The training loop: from settings to a trained model. With `config/schema.py` this file tells the story.

    take the step's batches, drawn from the weights in force
    forward and backward, one pack at a time; domain sums stay on the device
    one all-reduce: domain sums, was any loss not finite, was anyone asked to stop
    optimizer step, or the same skip on every rank
    when due: update the domain weights, evaluate, save
    record

Every rank runs the same lines. What they decide from is either the same by construction (settings, plan) or
the result of that one all-reduce.

The host waits for the device once a step, in `StepStatistics.reduce`, and where the backend has to
(`backend/deepspeed_backend.py` says where). `tests/engine/test_waits.py` counts what a CPU can show.

What is not covered: how a run is opened (`engine/run.py`), and what each part does inside.
"""

from __future__ import annotations

from typing import Any

import torch

from versatune_ds.config.schema import Config
from versatune_ds.data.collate import Batch
from versatune_ds.data.plan.planner import StepPlan
from versatune_ds.engine import phases
from versatune_ds.engine.answers.questions import ask
from versatune_ds.engine.backend.optimizer import learning_rate
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.evaluate import HeldOut, evaluate, probe_losses
from versatune_ds.engine.faults.device_errors import explained
from versatune_ds.engine.faults.heartbeat import Heartbeat
from versatune_ds.engine.faults.run_lock import RunLock
from versatune_ds.engine.faults.signals import StopRequest, note_stopped
from versatune_ds.engine.model.packed_lm import model_inputs
from versatune_ds.engine.phases import phase, recording
from versatune_ds.engine.run import Components, open_run, report_alarms
from versatune_ds.engine.skipping import FP16_OVERFLOW, NONFINITE_GRADIENT, reason_to_skip, report_skip
from versatune_ds.engine.statistics import Flags
from versatune_ds.engine.step_record import record_step
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import VersaTuneError
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.text import command
from versatune_ds.observability.records import EvalRecord

log = get_logger(__name__)


# --- the run ------------------------------------------------------------------------------------------------


def train(config: Config) -> None:
    """Train a model by its settings; returns when the run is finished or was asked to stop and has saved.

    Raises:
        VersaTuneError: bad settings, data or state, or a run that diverged.
    """
    device = start_process_group(config.run.collective_timeout_s)
    train_in_group(config, device)
    close_process_group()


def train_in_group(config: Config, device: torch.device) -> bool:
    """`train` within a process group that is already there and stays; False when it was asked to stop."""
    watched = Heartbeat(config.run.hang_timeout_s)
    with StopRequest() as stop, watched, RunLock(config.run.dir), explained(config):
        run = open_run(config, device)
        try:
            finished = run_steps(run, stop)
            if finished:
                finish(run)
            return finished
        finally:
            run.close()


def run_steps(run: Components, stop: StopRequest) -> bool:
    """All remaining steps; False when the run was asked to stop before its last one."""
    if run.first_step == 0:
        record_weights(run, run.state.controller.initial_update().to_json())
    if not run.state.early_stopping.exhausted:
        evaluate_when_due(run, run.first_step)
    for step in range(run.first_step, run.prepared.total_steps):
        if run.state.early_stopping.exhausted:
            break
        agreed = run_step(run, step, stop)
        done = step + 1
        last = done == run.prepared.total_steps
        run.saver.settle(agreed)
        run.go_back_when_overfitted(done)
        if run.saver.due(done, agreed, last):
            run.save(done)
        if agreed.stop and not last:
            run.saver.finish()
            log.info(
                "stopped after step %d as asked (%s); start the same command to go on", done, stop.reason
            )
            note_stopped(done, run.prepared.total_steps)
            return False
        evaluate_when_due(run, done)
    run.saver.finish()
    return True


def run_step(run: Components, step: int, stop: StopRequest) -> Flags:
    """One optimizer step; returns what the ranks agreed on at its boundary."""
    done, state = step + 1, run.state
    with run.profiler.step(done), recording() as times:
        rate = learning_rate(run.config.optimizer, step, run.prepared.total_steps)
        with phase(phases.DATA_WAIT, done):
            plan, batches = run.loader.take(state.controller.weights)
            state.planner = plan.state_after
        sample_losses = accumulate(run, plan, batches)
        with phase(phases.REDUCTION, done):
            totals = run.statistics.reduce(run.saver.flags(stop=stop.requested is not None))
        with phase(phases.OPTIMIZER_STEP, done):
            reason = reason_to_skip(totals, state.spikes, run.backend)
            applied = apply_step(run, reason, rate)
        if applied and totals.sums is not None:
            state.controller.observe(totals.sums)
            state.spikes.observe(totals.sums.total_loss())
        elif run.config.model.dtype != "fp16":  # fp16 adapts its loss scale
            reason = reason or NONFINITE_GRADIENT  # found by ZeRO
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if reason else 0
        if state.controller.due(done, skipped=not applied):
            with phase(phases.WEIGHT_UPDATE, done):
                update_weights(run, done)
        record_step(run, plan, totals, rate, None if applied else reason or FP16_OVERFLOW, times)
    if reason and (error := report_skip(run, plan, totals, sample_losses, reason)):
        run.save(done)
        run.saver.finish()
        raise error
    return totals.flags


# --- the parts of a step ------------------------------------------------------------------------------------


def accumulate(run: Components, plan: StepPlan, batches: list[Batch]) -> list[torch.Tensor]:
    """Forward and backward over this rank's packs; returns the per-sample losses, still on the device.

    The loss of every pack is divided by the weight of all labels of the step over all ranks. The backend
    then averages gradients over all ranks, hence the factor of their number.
    """
    backend = run.backend
    normalizer, passes = plan.loss_weight / backend.ranks.size, len(batches) / backend.ranks.sp.size
    sample_losses = []
    for i, batch in enumerate(batches):
        place = plan.step + 1, f"of pack {i + 1} of {len(batches)}"
        with phase(phases.FORWARD, *place):
            on_device = batch.to(backend.device, non_blocking=True)
            drawn = plan.step, i, *backend.ranks.dp
            out = backend.forward(**model_inputs(on_device, normalizer, passes, drawn))
        with phase(phases.STATISTICS, *place):
            run.statistics.add(out, on_device.sample_domains, on_device.sample_ids, on_device.token_weight)
        with phase(phases.BACKWARD, *place):
            backend.backward(out.loss, is_last=i == len(batches) - 1)
        sample_losses.append(out.sample_loss)
    return sample_losses


def apply_step(run: Components, reason: str | None, rate: float) -> bool:
    """Take the optimizer step, or discard it on every rank when there is a reason to skip it."""
    if reason is not None:
        run.backend.discard()
        return False
    return run.backend.step(rate)


def update_weights(run: Components, done: int) -> None:
    """Move the domain weights; the next batch is drawn from them.

    Raises:
        VersaTuneError: ranks came to different weights.
    """
    losses, controller = None, run.state.controller
    if run.probe is not None:
        with phase(phases.PROBE, done):
            losses = probe_losses(run.backend, run.probe, each_sample=controller.needs_samples)
    update = controller.update(done, losses)
    if not distributed.all_equal(controller.digest()):
        raise VersaTuneError(
            f"after step {done} the ranks hold different domain weights: this is a bug, report it"
        )
    record_weights(run, update.to_json())


# --- records ------------------------------------------------------------------------------------------------


def record_weights(run: Components, line: dict[str, Any]) -> None:
    """A line of weights.jsonl, and the console."""
    run.sinks.weight_update(line)
    if line["step"] > 0:
        run.progress.weight_update(line)


def evaluate_when_due(run: Components, done: int) -> None:
    """Held-out losses before the first step, every n steps, and after the last."""
    every, known = run.config.evaluation.every_n_steps, run.state.early_stopping.last_step
    is_due = every is not None and (done % every == 0 or done == run.prepared.total_steps)
    if run.held_out is None or not is_due or done == known:
        return
    record_evaluation(run, done, run.held_out)
    run.save_evaluated(done)


def record_evaluation(run: Components, done: int, held_out: HeldOut) -> None:
    """Evaluate on all ranks; a line of eval.jsonl, answers.jsonl and the console."""
    result = evaluate(run.backend, held_out, len(run.table))
    said = ask(run.backend, run.prepared.questions)
    record = EvalRecord(
        step=done,
        domain_loss=run.table.by_name(result.sums.mean_loss()),
        domain_supervised_tokens=dict(zip(run.table.names, map(int, result.sums.tokens), strict=True)),
        domain_samples=dict(zip(run.table.names, map(int, result.samples), strict=True)),
        domain_stderr=run.table.by_name(result.sums.stderr()),
        eval_s=result.seconds,
        domain_score=said.means(),
        domain_answers=said.counts(),
        generate_s=said.seconds,
    )
    run.sinks.answers(said.lines(done))
    run.sinks.evaluation(record)
    run.progress.evaluation(record)
    if done == 0:
        report_alarms(run.state.controller.starting_alarms(result.sums))
    run.state.observe_evaluation(record, run.prepared.total_steps)


# --- the end ------------------------------------------------------------------------------------------------


def finish(run: Components) -> None:
    """Export the model and say where things lie."""
    if run.config.checkpoint.export_at_end:
        with phase("export", is_limited=False):
            run.progress.note(f"model: {run.export()}")
    run.progress.note(f"run folder: {run.folder} ({command('report', run.folder)})")
