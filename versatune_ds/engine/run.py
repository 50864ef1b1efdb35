"""Opening a run: everything the loop needs, built in a fixed order, fresh or resumed.

Order: what was prepared (`engine/prepared.py`) -> state of the newest sound checkpoint, if any -> model and
optimizer -> files opened for appending. Nothing is written before all checks have passed.

What is not covered: the loop itself (`engine/train.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from versatune_ds.config.load import load_config, write_resolved
from versatune_ds.config.schema import Config
from versatune_ds.data.loader import StepLoader
from versatune_ds.data.plan.corpus import steps_per_epoch
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.backend.deepspeed_backend import build_backend
from versatune_ds.engine.backend.deepspeed_config import state_layout
from versatune_ds.engine.backend.parameters import parameter_counts
from versatune_ds.engine.checkpointing.folder import load_model_state, newest_sound_checkpoint, read_state
from versatune_ds.engine.checkpointing.saver import Saver
from versatune_ds.engine.evaluate import HeldOut
from versatune_ds.engine.faults.run_lock import unwritable
from versatune_ds.engine.model.adapters import trained_targets
from versatune_ds.engine.model.families import built_shape
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.preflight.dry_run import dry_run_when_asked
from versatune_ds.engine.prepared import Prepared, prepare_run
from versatune_ds.engine.provenance import accelerator_peak_tflops, describe_hardware, describe_versions
from versatune_ds.engine.state import TrainState
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.commit import git_commit
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import canonical_hash, write_json_atomic
from versatune_ds.foundations.log import get_logger
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

    def _saved_state(self) -> dict[str, Any]:
        """Everything of ours that a resumed run needs. File offsets are known on rank 0, which writes it."""
        return {
            "world_size": distributed.world_size(),
            "layout": self.backend.layout,
            **self.state.to_json(),
            "offsets": self.sinks.offsets(),
        }

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.loader.close()
        self.saver.close()
        self.progress.close()
        self.sinks.close()


def open_run(config: Config, device: torch.device, config_path: Path | None = None) -> Components:
    """Build a run from its settings; every rank calls it.

    Args:
        config_path: the settings' file, for error texts that name a command.

    Raises:
        ConfigError, DataError, StateError: settings, data or saved state that cannot be used.
    """
    prepared = prepare_run(config, device.type, config_path)
    saved: dict[str, Any] | None = None
    checkpoint: Path | None = None
    if config.run.resume == "auto":
        checkpoint = newest_sound_checkpoint(config.run.dir / constants.CHECKPOINTS_DIR)
    if checkpoint is not None:
        saved = read_state(checkpoint, state_layout(prepared.deepspeed, config.model))
    state = TrainState.of(prepared, saved)
    if state.planner.step == 0 and config.evaluation.every_n_steps is None:
        report_alarms(state.controller.starting_alarms(DomainSums.zeros(len(prepared.table))))
    backend = build_backend(config, prepared.deepspeed, prepared.ranks, device)
    if checkpoint is not None and saved is not None:
        load_model_state(checkpoint, backend, saved)
        log.info("resuming from %s", checkpoint)
    dry_run_when_asked(backend, config)
    if distributed.is_main():
        introduce(prepared, backend)
    sinks = open_files(prepared, backend, saved, state.planner.step + 1)
    names, is_main = prepared.table.names, distributed.is_main()
    progress = Progress(prepared.total_steps, names, done_steps=state.planner.step, is_main=is_main)
    return assemble(prepared, backend, state, sinks, progress)


def assemble(
    prepared: Prepared, backend: Backend, state: TrainState, sinks: Sinks, progress: Progress
) -> Components:
    """Put the parts together.

    Raises:
        DataError: held-out data is asked for and there is none.
    """
    config = prepared.config
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
            pin_memory=backend.device.type == "cuda",
        ),
        statistics=StepStatistics(
            len(prepared.table), backend.device, backend.model.routers, counts=prepared.ranks.sp.rank == 0
        ),
        saver=Saver(config.run.dir / constants.CHECKPOINTS_DIR, config.checkpoint, backend),
        held_out=held_out,
        probe=probe,
        sinks=sinks,
        progress=progress,
        shape=built_shape(backend.model.lm.config, *parameter_counts(backend.model)),
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
            _note_changes(config)
            write_resolved(config, config.run.dir / constants.RESOLVED_CONFIG_FILE)
            _write_run_info(prepared, backend)
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


def _note_changes(config: Config) -> None:
    """Say which settings differ from those the folder was last run with."""
    path = config.run.dir / constants.RESOLVED_CONFIG_FILE
    if not path.is_file():
        return
    try:
        old, new = (_flat(c.model_dump(mode="json")) for c in (load_config(path), config))
    except ConfigError:  # written by a version with other settings
        log.warning("%s cannot be read by this version; it will be replaced", path)
        return
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            log.warning("setting %s was %r and is now %r", key, old.get(key), new.get(key))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    items: dict[str, Any] = {}
    for key, inner in value.items():
        items.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return items


def _write_run_info(prepared: Prepared, backend: Backend) -> None:
    """run.json: what ran, on what, when; for the report and for people."""
    config = prepared.config
    total, outside_embeddings = parameter_counts(backend.model)
    write_json_atomic(
        config.run.dir / constants.RUN_INFO_FILE,
        {
            "name": config.run.dir.resolve().name,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": describe_versions(),
            "commit": git_commit(),
            "hardware": describe_hardware(backend.device),
            "world_size": distributed.world_size(),
            "model": {
                "source": config.model.source,
                "type": backend.model.lm.config.model_type,
                "dtype": config.model.dtype,
                "attention": backend.attention.implementation,
            },
            "num_parameters": total,
            "num_parameters_nonembedding": outside_embeddings,
            "domains": config.domains.names,
            "total_steps": prepared.total_steps,
            "config_fingerprint": canonical_hash(config.model_dump(mode="json")),
        },
    )


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
    for setting in preflight.ignored_settings(config):
        log.info("note: this setting has no effect: %s", setting)
    if epoch.unpacked >= 2 * epoch.packed:
        log.info(
            "note: a pass over the data takes %d steps packed and would take %d with one sample in each "
            "pack's place; learning rates and epochs tuned without packing may train too little",
            epoch.packed,
            epoch.unpacked,
        )
