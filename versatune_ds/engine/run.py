"""Opening a run: everything the loop needs, built in a fixed order, fresh or resumed.

Order: run folder checked -> data opened and verified -> weights -> model and engine -> state from the newest
sound checkpoint, if any -> files opened for appending. Mistakes that need no model are found before one is
built.

What is not covered: the loop itself (`engine/train.py`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from versatune_ds.config.load import load_config, write_resolved
from versatune_ds.config.schema import Config
from versatune_ds.data.balance import check_world_size
from versatune_ds.data.loader import StepLoader
from versatune_ds.data.planner import Corpus, PlannerSettings, PlannerState, steps_per_epoch, supply
from versatune_ds.data.prepare import open_caches
from versatune_ds.data.templating import ChatEncoder, load_tokenizer, set_chat_template
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.reference import Fingerprints, load_reference
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.build import Engine, build_engine, describe_hardware, describe_versions
from versatune_ds.engine.checkpoint import (
    list_checkpoints,
    load_model_state,
    newest_sound_checkpoint,
    read_state,
)
from versatune_ds.engine.evaluate import HeldOut
from versatune_ds.engine.model import parameter_counts
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import ConfigError, StateError
from versatune_ds.foundations.files import canonical_hash, write_json_atomic
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.progress import Progress
from versatune_ds.observability.sinks import Sinks, open_sinks
from versatune_ds.observability.throughput import ModelShape, peak_tflops

log = get_logger(__name__)


@dataclass
class Run:
    """A run in progress. What changes from step to step: `loader`, `controller`, `nonfinite_in_a_row`."""

    config: Config
    table: DomainTable
    corpus: Corpus
    caches: list[Any]
    engine: Engine
    loader: StepLoader
    controller: WeightController
    statistics: StepStatistics
    held_out: HeldOut | None
    probe: HeldOut | None
    tokenizer: Any
    sinks: Sinks
    progress: Progress
    shape: ModelShape
    peak_tflops: float | None
    total_steps: int
    first_step: int
    """Steps done before this process."""
    nonfinite_in_a_row: int

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run.dir

    def state(self) -> dict[str, Any]:
        """Everything of ours that a resumed run needs. File offsets are known on rank 0, which writes it."""
        return {
            "world_size": distributed.world_size(),
            "planner": self.loader.state.to_json(),
            "controller": self.controller.state(),
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "offsets": self.sinks.offsets(),
        }

    def close(self) -> None:
        """Stop the prefetch thread and close the files."""
        self.loader.close()
        self.progress.close()
        self.sinks.close()


def open_run(config: Config, device: torch.device, config_path: Path | None = None) -> Run:
    """Build a run from its settings; every rank calls it.

    Args:
        config_path: the settings' file, for error texts that name a command.

    Raises:
        ConfigError, DataError, StateError: settings, data or saved state that cannot be used.
    """
    # 1. The folder: all ranks look before rank 0 writes.
    checkpoints = config.run.dir / constants.CHECKPOINTS_DIR
    check_folder(config)
    distributed.barrier()
    # 2. Data and weights.
    table = DomainTable(config.domains.names)
    check_world_size(config.batch.packs_per_step, distributed.world_size())
    tokenizer = load_tokenizer(config)
    set_chat_template(tokenizer, config.data.chat_template)
    caches: dict[str, list[Any]] = open_caches(config, config_path=config_path)  # type: ignore[assignment]
    corpus = Corpus.from_caches(caches["train"], table.names)
    settings = planner_settings(config, table)
    corpus.check(settings)
    total_steps = count_steps(config, corpus, settings)
    encoder = ChatEncoder.build(tokenizer, config.data.chat_template)
    expected = Fingerprints(tokenizer=encoder.fingerprint)
    reference = load_reference(config.weights.reference, table, expected)
    controller = WeightController(table, config.domains, config.weights, reference)
    check_supply(corpus, settings, controller.weights, total_steps)
    # 3. Model and engine.
    engine = build_engine(config, device)
    # 4. Where to begin.
    checkpoint = newest_sound_checkpoint(checkpoints) if config.run.resume == "auto" else None
    state = None if checkpoint is None else read_state(checkpoint)
    if checkpoint is not None and state is not None:
        controller.load_state(state["controller"])
        load_model_state(checkpoint, engine)
        log.info("resuming from %s", checkpoint)
    planner = PlannerState.initial(len(table)) if state is None else PlannerState.from_json(state["planner"])
    first_step = 0 if state is None else int(state["step"])
    # 5. Files and console.
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    sinks, shape = Sinks(), ModelShape.from_config(engine.model.lm.config, parameter_counts(engine.model)[1])
    if distributed.is_main():
        config.run.dir.mkdir(parents=True, exist_ok=True)
        _note_changes(config)
        write_resolved(config, config.run.dir / constants.RESOLVED_CONFIG_FILE)
        _write_run_info(config, engine, total_steps)
        offsets = None if state is None else state["offsets"]
        sinks = open_sinks(
            config.run.dir,
            config.metrics,
            offsets=offsets,
            first_step=first_step + 1,
            config=config.model_dump(mode="json"),
        )
        _introduce(config, corpus, settings, engine, total_steps)
    held_out = probe = None
    if config.evaluation.every_n_steps is not None:
        limit = config.evaluation.max_samples_per_domain
        held_out = HeldOut(caches["eval"], config.batch.pack_len, limit, pad_id)
    if controller.needs_probe:
        probe = HeldOut(caches["eval"], config.batch.pack_len, config.weights.probe_samples, pad_id)
    return Run(
        config=config,
        table=table,
        corpus=corpus,
        caches=caches["train"],
        engine=engine,
        loader=StepLoader(
            corpus,
            caches["train"],
            settings,
            planner,
            distributed.rank(),
            distributed.world_size(),
            pad_id=pad_id,
            pin_memory=device.type == "cuda",
        ),
        controller=controller,
        statistics=StepStatistics(len(table), device),
        held_out=held_out,
        probe=probe,
        tokenizer=tokenizer,
        sinks=sinks,
        progress=Progress(total_steps, table.names, done_steps=first_step, is_main=distributed.is_main()),
        shape=shape,
        peak_tflops=config.metrics.peak_tflops or peak_tflops(describe_hardware(device)["device"]),
        total_steps=total_steps,
        first_step=first_step,
        nonfinite_in_a_row=0 if state is None else int(state["nonfinite_in_a_row"]),
    )


def check_folder(config: Config) -> None:
    """Refuse to overwrite a run: another one with `resume: never`, or a finished one without checkpoints.

    Raises:
        StateError: naming what was found.
    """
    folder = config.run.dir
    metrics = folder / constants.METRICS_FILE
    has_lines = metrics.is_file() and metrics.stat().st_size > 0
    has_checkpoints = bool(list_checkpoints(folder / constants.CHECKPOINTS_DIR))
    if config.run.resume == "never" and (has_lines or has_checkpoints):
        raise StateError(
            f"{folder} holds a run and run.resume is never; choose another run.dir, or resume: auto"
        )
    if (folder / constants.EXPORT_DIR).exists() and has_lines and not has_checkpoints:
        raise StateError(
            f"{folder} holds a finished run without checkpoints to go on from; starting again would replace "
            "it. Choose another run.dir or remove the folder"
        )


def planner_settings(config: Config, table: DomainTable) -> PlannerSettings:
    """The planner's part of the settings."""
    limit = config.domains.max_epochs
    by_name = limit if isinstance(limit, dict) else dict.fromkeys(table.names, limit)
    return PlannerSettings(
        pack_len=config.batch.pack_len,
        packs_per_step=config.batch.packs_per_step,
        weight_unit=config.domains.weight_unit,
        seed=config.run.seed,
        max_epochs=tuple(by_name.get(name) for name in table.names),
    )


def count_steps(config: Config, corpus: Corpus, settings: PlannerSettings) -> int:
    """Optimizer steps of the run, known before it starts."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    assert config.train.epochs is not None
    return math.ceil(config.train.epochs * sum(corpus.num_tokens) / settings.tokens_per_step)


def check_supply(corpus: Corpus, settings: PlannerSettings, weights: Any, total_steps: int) -> None:
    """Refuse a run that `domains.max_epochs` would starve before its last step."""
    steps = supply(corpus, settings, weights).steps
    if steps < total_steps:
        raise ConfigError(
            f"the data lasts for {steps:.0f} steps under domains.max_epochs, and {total_steps} are asked "
            "for; raise max_epochs, add data, or train for fewer steps"
        )


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


def _write_run_info(config: Config, engine: Engine, total_steps: int) -> None:
    """run.json: what ran, on what, when; for the report and for people."""
    total, outside_embeddings = parameter_counts(engine.model)
    write_json_atomic(
        config.run.dir / constants.RUN_INFO_FILE,
        {
            "name": config.run.dir.resolve().name,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": describe_versions(),
            "hardware": describe_hardware(engine.device),
            "world_size": distributed.world_size(),
            "model": {
                "source": config.model.source,
                "type": engine.model.lm.config.model_type,
                "dtype": config.model.dtype,
                "attention": engine.attention.implementation,
            },
            "num_parameters": total,
            "num_parameters_nonembedding": outside_embeddings,
            "domains": config.domains.names,
            "total_steps": total_steps,
            "config_fingerprint": canonical_hash(config.model_dump(mode="json")),
        },
    )


def _introduce(
    config: Config, corpus: Corpus, settings: PlannerSettings, engine: Engine, total_steps: int
) -> None:
    """The first lines of a run: what is trained, with which backends, on how much."""
    from versatune_kernels import resolve_backend

    loss = resolve_backend(config.model.loss_backend, engine.device.type)
    epoch = steps_per_epoch(corpus, settings)
    log.info(
        "model %s (%.3g parameters, %s) on %d rank(s); ZeRO stage %s",
        config.model.source,
        parameter_counts(engine.model)[0],
        config.model.dtype,
        distributed.world_size(),
        engine.settings["zero_optimization"].get("stage", 0),
    )
    log.info("attention: %s (%s)", engine.attention.implementation, engine.attention.reason)
    log.info("loss: %s (%s)", loss.name, loss.reason)
    log.info("liger: %s; torch.compile: %s", engine.model.liger, config.model.compile)
    log.info(
        "data: %d samples, %d tokens; %d packs of %d tokens a step; %d steps",
        sum(corpus.num_samples),
        sum(corpus.num_tokens),
        settings.packs_per_step,
        settings.pack_len,
        total_steps,
    )
    if epoch.unpacked >= 2 * epoch.packed:
        log.info(
            "note: a pass over the data takes %d steps packed and would take %d with one sample in each "
            "pack's place; learning rates and epochs tuned without packing may train too little",
            epoch.packed,
            epoch.unpacked,
        )
