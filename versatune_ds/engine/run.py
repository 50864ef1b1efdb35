"""Opening a run: everything the loop needs, built in a fixed order, fresh or resumed.

Order: what was prepared (`engine/prepared.py`) -> state of the newest sound checkpoint, if any -> model and
optimizer -> files opened for appending. Nothing is written before all checks have passed.

What is not covered: the loop itself (`engine/train.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from versatune_ds.config.load import write_resolved
from versatune_ds.config.schema import Config
from versatune_ds.data.loader import StepLoader
from versatune_ds.data.plan.corpus import steps_per_epoch
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.backend.deepspeed_backend import build_backend
from versatune_ds.engine.backend.deepspeed_config import state_layout
from versatune_ds.engine.backend.parameters import live_shape, parameter_counts
from versatune_ds.engine.backend.zero_sizes import describe_sizes
from versatune_ds.engine.checkpointing import folder as folders
from versatune_ds.engine.checkpointing.export_target import check_room
from versatune_ds.engine.checkpointing.hf_export import export_model, try_export
from versatune_ds.engine.checkpointing.saver import Saver
from versatune_ds.engine.evaluate import HeldOut, pads_packs
from versatune_ds.engine.faults.run_lock import unwritable
from versatune_ds.engine.model.adapters import trained_targets
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.engine.model.source import DTYPES, facts
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.preflight.dry_run import dry_run_when_asked
from versatune_ds.engine.prepared import Prepared, prepare_run
from versatune_ds.engine.provenance import (
    accelerator_peak_tflops,
    describe_run,
    note_changes,
)
from versatune_ds.engine.state import TrainState
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import SaveError, StateError
from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.text import command
from versatune_ds.observability.profile import StepProfiler
from versatune_ds.observability.progress import Progress
from versatune_ds.observability.sinks import Sinks, open_sinks

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts of a run in progress. They stay for its whole length; what changes is in `state`."""

    prepared: Prepared
    backend: Backend
    state: TrainState
    first_step: int
    """Steps done before this process."""
    loader: StepLoader
    statistics: StepStatistics
    saver: Saver
    held_out: HeldOut | None
    """What is evaluated; None where that was not asked for."""
    probe: HeldOut | None
    """What the losses that drive the weights are measured on; None where training batches do."""
    sinks: Sinks
    progress: Progress
    profiler: StepProfiler
    shape: ModelShape
    peak_tflops: float | None

    @property
    def config(self) -> Config:
        """The settings."""
        return self.prepared.config

    @property
    def table(self) -> DomainTable:
        """The domains."""
        return self.prepared.table

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run.dir

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps; a collective."""
        self.saver.save(done, self._saved_state)

    def export(self) -> Path:
        """Write the finished model and return its folder; a collective.

        Raises:
            SaveError: on all ranks, why it could not be written, where its weights are kept, and the command
                that writes it from them.
        """
        target, companions = self.folder / constants.EXPORT_DIR, self.prepared.companions
        assert companions is not None
        step = self.state.planner.step
        try:
            step = self.load_best()
            export_model(self.backend, companions, target, int(self.config.checkpoint.export_shard_gb * 1e9))
        except Exception as error:  # whatever it is, the weights are not to be lost
            kept = self._checkpoint(step)
            try:
                if not distributed.on_main(kept.is_dir):
                    self.save(step)
                    self.saver.finish()
            except SaveError as second:
                raise SaveError(f"the run is finished, but {error}; {second}") from error
            finish = command("export", self.folder, "--step", step, "--out", target)
            raise SaveError(
                f"the run is finished and its weights are kept in {kept}, but {error}. Then write the model "
                f"by:\n{finish}"
            ) from error
        return target

    def save_evaluated(self, done: int) -> None:
        """Keep the state after `done` steps if its evaluation, just made, was the best one or ends the run,
        which a restart has to know; a collective."""
        best = self.state.early_stopping
        if self.config.evaluation.select is not None and 0 < done == best.best_step:
            self.saver.keep_best(best.note(), self._saved_state)
        if best.exhausted and self.saver.is_periodic:
            self.save(done)

    def load_best(self) -> int:
        """Go back to the best state where one is kept; the step that the model is of; a collective.

        Raises:
            StateError: its checkpoint is damaged.
        """
        best, last = self.state.early_stopping, self.state.planner.step
        if self.config.evaluation.select is None or best.best_step == last:
            return last
        if best.best_step == 0:
            self.progress.note("no evaluation gave the loss of evaluation.select: the last parameters it is")
            return last
        self._load(best.best_step)
        self.progress.note(
            f"parameters after step {best.best_step} of {last}, whose held-out loss {best.best_loss:.4f} is "
            "the lowest (evaluation.select)"
        )
        return best.best_step

    def go_back_when_overfitted(self, done: int) -> None:
        """Parameters and optimizer of an earlier step, if the guard asks for that after `done` steps: steps,
        learning rate, data and weights go on from here. A collective.

        Raises:
            StateError: the checkpoint is damaged.
        """
        step = self.state.controller.back_to(done)
        if step is None:
            return
        self.saver.finish()
        if distributed.on_main(self._checkpoint(step).is_dir):
            self._load(step)
            self.progress.note(f"back to the parameters and the optimizer after step {step} (weights.guard)")
        elif distributed.is_main():
            log.warning("the checkpoint of step %d is gone: training goes on from here", step)

    def _checkpoint(self, step: int) -> Path:
        return self.folder / constants.CHECKPOINTS_DIR / folders.checkpoint_name(step)

    def _load(self, step: int) -> None:
        """Parameters, optimizer and random generators after `step`."""
        checkpoint = self._checkpoint(step)
        folders.require_sound(checkpoint)
        saved = folders.read_state(checkpoint, self.backend.layout, facts(self.prepared.architecture))
        folders.load_model_state(checkpoint, self.backend, saved)

    def _saved_state(self) -> dict[str, Any]:
        """Everything of ours that a resumed run needs. File offsets are known on rank 0, which writes it."""
        return {
            "world_size": distributed.world_size(),
            "layout": self.backend.layout,
            "architecture": facts(self.prepared.architecture),
            **self.state.to_json(),
            "offsets": self.sinks.offsets(),
        }

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.loader.close()
        self.saver.close()
        self.profiler.close()
        self.progress.close()
        self.sinks.close()


def open_run(config: Config, device: torch.device) -> Components:
    """Build a run from its settings; every rank calls it.

    Raises:
        ConfigError, DataError, StateError: settings, data or saved state that cannot be used.
    """
    prepared = prepare_run(config, device.type)
    if prepared.companions is not None:
        distributed.on_main(try_export, config, prepared.architecture, prepared.companions)
    checkpoint: Path | None = None
    checkpoints = config.run.dir / constants.CHECKPOINTS_DIR
    if config.run.resume == "auto":
        checkpoint = folders.newest_sound_checkpoint(checkpoints)
    saved, state = read_saved(checkpoint, prepared)
    if state.planner.step == 0 and config.evaluation.every_n_steps is None:
        report_alarms(state.controller.starting_alarms(DomainSums.zeros(len(prepared.table))))
    backend = build_backend(config, prepared.deepspeed, prepared.ranks, device)
    if checkpoint is not None and saved is not None:
        with going_on(checkpoint, config):
            folders.load_model_state(checkpoint, backend, saved)
        log.info("resuming from %s", checkpoint)
    if config.checkpoint.export_at_end and config.model.adapter is None:
        needed = parameter_counts(backend.model)[0] * DTYPES[config.model.dtype].itemsize
        distributed.on_main(check_room, config.run.dir, needed)
    dry_run_when_asked(backend, config)
    if distributed.is_main():
        introduce(prepared, backend)
    best = state.early_stopping
    kept = best.note() if config.evaluation.select is not None and best.best_step else None
    if not distributed.on_main(folders.restore_best, checkpoints, kept) and kept is not None:
        log.warning("the best checkpoint, of step %d, is gone: another one will be", best.best_step)
        best.forget_best()
    sinks = open_files(prepared, backend, saved, state.planner.step + 1)
    names, is_main = prepared.table.names, distributed.is_main()
    progress = Progress(prepared.total_steps, names, done_steps=state.planner.step, is_main=is_main)
    return assemble(prepared, backend, state, sinks, progress)


def read_saved(checkpoint: Path | None, prepared: Prepared) -> tuple[dict[str, Any] | None, TrainState]:
    """Our own state of the checkpoint to go on from, if any, and the state that the run begins with.

    Raises:
        StateError: it belongs to a run of other data, model or settings, or to a longer one.
    """
    if checkpoint is None:
        return None, TrainState.of(prepared, None)
    with going_on(checkpoint, prepared.config):
        layout = state_layout(prepared.deepspeed, prepared.config)
        saved = folders.read_state(checkpoint, layout, facts(prepared.architecture))
        state = TrainState.of(prepared, saved)
        if state.planner.step > prepared.total_steps:
            raise StateError(
                f"{state.planner.step} steps are done, and train.max_steps or train.epochs asks for "
                f"{prepared.total_steps}; ask for as many or more"
            )
    return saved, state


@contextmanager
def going_on(checkpoint: Path, config: Config) -> Iterator[None]:
    """Errors about a checkpoint get the ways out: its own weights as a model, and another folder."""
    try:
        yield
    except StateError as error:
        export = command("export", config.run.dir, "--step", folders.step_of(checkpoint))
        raise StateError(
            f"cannot go on from {checkpoint}: {error}. Or choose another run.dir for a new run; to start it "
            f"from the weights of this one, write them as a model first:\n{export}"
        ) from error


def assemble(
    prepared: Prepared, backend: Backend, state: TrainState, sinks: Sinks, progress: Progress
) -> Components:
    """Put the parts together.

    Raises:
        DataError: held-out data is asked for and there is none.
    """
    config, asked = prepared.config, prepared.config.train.profile
    held_out, probe = open_held_out(prepared, needs_probe=state.controller.needs_probe)
    return Components(
        prepared=prepared,
        backend=backend,
        state=state,
        first_step=state.planner.step,
        loader=StepLoader(
            prepared.corpus,
            prepared.train,
            prepared.planner,
            state.planner,
            *prepared.ranks.dp,
            pad_id=prepared.pad_id,
            part=prepared.ranks.sp,
            compared_share=config.model.compared_share,
            pads=pads_packs(backend),
            pin_memory=backend.device.type == "cuda",
        ),
        statistics=StepStatistics(
            len(prepared.table),
            backend.device,
            backend.model.routers,
            counts=prepared.ranks.sp.rank == 0,
            base_kl=backend.model.base_kl,
        ),
        saver=Saver(
            config.run.dir / constants.CHECKPOINTS_DIR,
            config.checkpoint,
            backend,
            newest=state.planner.step,
            needed=lambda: state.controller.kept_steps,
        ),
        held_out=held_out,
        probe=probe,
        sinks=sinks,
        progress=progress,
        profiler=StepProfiler(config.run.dir, asked.steps if asked and distributed.is_main() else None),
        shape=live_shape(backend.model),
        peak_tflops=accelerator_peak_tflops(config, backend.device),
    )


def report_alarms(alarms: list[str]) -> None:
    """Say what is wrong with the reference losses, on rank 0."""
    for alarm in alarms:
        log.warning("reference losses: %s", alarm)


def open_files(prepared: Prepared, backend: Backend, saved: dict[str, Any] | None, first_step: int) -> Sinks:
    """Write what describes the run and open its logs, cut back to the checkpoint, on rank 0; a collective.

    Args:
        saved: our own state of the checkpoint, if any.
        first_step: number of the first step that will be recorded, from 1.

    Raises:
        StateError: on every rank, where they cannot be written or are not those of the checkpoint.
    """
    config = prepared.config

    def open_on_main() -> Sinks:
        if not distributed.is_main():
            return Sinks()
        try:
            note_changes(config)
            write_resolved(config, config.run.dir / constants.RESOLVED_CONFIG_FILE)
            info = describe_run(config, backend, prepared.total_steps)
            write_json_atomic(config.run.dir / constants.RUN_INFO_FILE, info)
            return open_sinks(
                config.run.dir,
                config.metrics,
                offsets=None if saved is None else saved["offsets"],
                first_step=first_step,
                config=config.model_dump(mode="json"),
            )
        except OSError as error:
            raise unwritable(config.run.dir, error) from error

    return distributed.together(open_on_main)


def open_held_out(prepared: Prepared, *, needs_probe: bool) -> tuple[HeldOut | None, HeldOut | None]:
    """Held-out samples to evaluate on, and those whose losses drive the weights; None where not asked for.

    Raises:
        DataError: there is no held-out data.
    """
    config, held_out, probe = prepared.config, None, None
    common: dict[str, Any] = {
        "pack_len": config.batch.pack_len,
        "pad_id": prepared.pad_id,
        "ranks": prepared.ranks,
    }
    if config.evaluation.every_n_steps is not None:
        held_out = HeldOut(prepared.evaluated, max_samples=config.evaluation.max_samples_per_domain, **common)
    if needs_probe:
        probe = HeldOut(prepared.held_out, max_samples=config.weights.probe_samples, **common)
    return held_out, probe


def introduce(prepared: Prepared, backend: Backend) -> None:
    """The first lines of a run: what is trained, with which backends, on how much."""
    from versatune_kernels import resolve_backend

    config, corpus, settings = prepared.config, prepared.corpus, prepared.planner
    loss = resolve_backend(config.model.loss_backend, backend.device.type)
    epoch = steps_per_epoch(corpus, settings)
    log.info(
        "model %s (%.3g parameters, %s) on %d rank(s); ZeRO stage %s",
        config.model.source,
        parameter_counts(backend.model)[0],
        config.model.dtype,
        distributed.world_size(),
        backend.layout["ZeRO stage"],
    )
    if backend.layout["ZeRO stage"]:
        log.info("ZeRO: %s", describe_sizes(prepared.deepspeed["zero_optimization"]))
    if config.model.adapter is not None:
        adapter, targets = config.model.adapter, trained_targets(backend.model.lm)
        log.info(
            "adapter: %s of rank %d on %s; %.3g parameters are trained",
            adapter.kind,
            adapter.rank,
            ", ".join(targets),
            parameter_counts(backend.model, trained=True)[0],
        )
    log.info("attention: %s (%s)", backend.attention.implementation, backend.attention.reason)
    log.info("loss: %s (%s)", loss.name, loss.reason)
    log.info("liger: %s; torch.compile: %s", backend.model.liger, config.model.compile)
    log.info(
        "data: %d samples, %d tokens; %d packs of %d tokens a step; %d steps",
        sum(corpus.num_samples),
        sum(corpus.num_tokens),
        settings.packs_per_step,
        settings.pack_len,
        prepared.total_steps,
    )
    if (late := preflight.late_weights(config, prepared.total_steps)) is not None:
        log.warning("%s", late)
    for setting in preflight.ignored_settings(config):
        log.info("note: this setting has no effect: %s", setting)
    if epoch.unpacked >= 2 * epoch.packed:
        log.info(
            "note: a pass over the data takes %d steps packed and would take %d with one sample in each "
            "pack's place; learning rates and epochs tuned without packing may train too little",
            epoch.packed,
            epoch.unpacked,
        )
