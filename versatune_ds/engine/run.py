"""Opening a run: everything the loop needs, built in a fixed order, fresh or resumed.

Order: run folder checked -> data opened and verified -> weights -> state of the newest sound checkpoint, if
any -> model and engine -> files opened for appending. Mistakes that need no model are found before one is
built (`engine/preflight/checks.py`), and nothing is written before all checks have passed.

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
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.tokenizer import load_tokenizer, set_chat_template
from versatune_ds.data.loader import StepLoader
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings, steps_per_epoch
from versatune_ds.data.plan.state import PlannerState
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.early_stopping import EarlyStopping
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.build import (
    Engine,
    build_engine,
    describe_hardware,
    describe_versions,
    git_commit,
)
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config, offloads_optimizer, zero_stage
from versatune_ds.engine.checkpointing.folder import load_model_state, newest_sound_checkpoint, read_state
from versatune_ds.engine.checkpointing.saver import Saver
from versatune_ds.engine.evaluate import HeldOut
from versatune_ds.engine.faults.run_lock import unwritable
from versatune_ds.engine.model.packed_lm import load_architecture, parameter_counts
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.preflight.consistency import code_and_settings, require_sameness
from versatune_ds.engine.preflight.dry_run import rehearse_when_asked
from versatune_ds.engine.preflight.shared_files import check_shared_folder, open_caches_on_all_nodes
from versatune_ds.engine.references import open_reference
from versatune_ds.engine.skipping import SpikeGuard
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
    """A run in progress. What changes from step to step: `loader`, `controller`, `skipped_in_a_row`,
    `spikes`."""

    config: Config
    table: DomainTable
    corpus: Corpus
    caches: list[Any]
    engine: Engine
    loader: StepLoader
    controller: WeightController
    statistics: StepStatistics
    saver: Saver
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
    skipped_in_a_row: int
    spikes: SpikeGuard
    early_stopping: EarlyStopping

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.run.dir

    def state(self) -> dict[str, Any]:
        """Everything of ours that a resumed run needs. File offsets are known on rank 0, which writes it."""
        return {
            "world_size": distributed.world_size(),
            "layout": state_layout(self.config),
            "planner": self.loader.state.to_json(),
            "controller": self.controller.state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "losses": self.spikes.state(),
            "early_stopping": self.early_stopping.state(),
            "offsets": self.sinks.offsets(),
        }

    def after_evaluation(self, done: int, loss: float | None, sums: DomainSums) -> None:
        """Alarms of the reference losses before the first step; whether to stop early, on all ranks alike."""
        if done == 0:
            report_alarms(self.controller.starting_alarms(sums))
        stopping = self.early_stopping
        stopping.observe(done, loss)
        if stopping.exhausted and done < self.total_steps:
            log.info(
                "stopping early after step %d: %d evaluations in a row without a lower held-out loss than "
                "%.4f after step %d (evaluation.patience)",
                done,
                stopping.waited,
                stopping.best_loss,
                stopping.best_step,
            )

    def close(self) -> None:
        """Stop the threads and close the files."""
        self.loader.close()
        self.saver.close()
        self.progress.close()
        self.sinks.close()


def open_run(config: Config, device: torch.device, config_path: Path | None = None) -> Run:
    """Build a run from its settings; every rank calls it.

    Args:
        config_path: the settings' file, for error texts that name a command.

    Raises:
        ConfigError, DataError, StateError: settings, data or saved state that cannot be used.
    """
    # 1. The same everywhere, and the folder, before anything is written into it.
    require_sameness("code, settings and model", code_and_settings(config))
    deepspeed_config(config, distributed.world_size())  # refuses what DeepSpeed would not know
    preflight.check_folder(config)
    check_shared_folder(config.run.dir)
    preflight.check_trackers(config)
    # 2. Data and weights.
    table = DomainTable(config.domains.names)
    tokenizer = load_tokenizer(config)
    set_chat_template(tokenizer, config.data.chat_template)
    caches = open_caches_on_all_nodes(config, config_path)
    corpus = Corpus.from_caches(caches["train"], table.names)
    settings = planner_settings(config, table)
    corpus.check(settings)
    preflight.check_architecture(load_architecture(config.model), tokenizer, corpus)
    total_steps = count_steps(config, corpus, settings)
    encoder = ChatEncoder.build(tokenizer, config.data.chat_template)
    reference = open_reference(config, table, tokenizer, encoder.fingerprint, caches)
    controller = WeightController(table, config.domains, config.weights, reference)
    preflight.check_domains_have_data(config, table, corpus, controller)
    preflight.check_supply(corpus, settings, controller, total_steps)
    # 3. Where to begin.
    resuming = config.run.resume == "auto"
    checkpoint = newest_sound_checkpoint(config.run.dir / constants.CHECKPOINTS_DIR) if resuming else None
    state: dict[str, Any] | None = None
    planner = PlannerState.initial(len(table))
    early_stopping = EarlyStopping(config.evaluation.patience)
    if checkpoint is not None:
        state = read_state(checkpoint, state_layout(config))
        planner = PlannerState.from_json(state["planner"])
        planner.check(corpus, settings)
        controller.load_state(state["controller"])
        early_stopping.load_state(state["early_stopping"])
    first_step = planner.step
    if first_step == 0 and config.evaluation.every_n_steps is None:
        report_alarms(controller.starting_alarms(DomainSums.zeros(len(table))))
    # 4. Model and engine.
    engine = build_engine(config, device)
    if checkpoint is not None and state is not None:
        load_model_state(checkpoint, engine, state, state_layout(config))
        log.info("resuming from %s", checkpoint)
    rehearse_when_asked(engine, config)
    # 5. Files and console.
    if distributed.is_main():
        introduce(config, corpus, settings, engine, total_steps)
    sinks = open_files(config, engine, total_steps, state, first_step)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # never read
    held_out, probe = open_held_out(config, table, caches["eval"], controller, pad_id)
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
        saver=Saver(config.run.dir / constants.CHECKPOINTS_DIR, config.checkpoint, engine),
        held_out=held_out,
        probe=probe,
        tokenizer=tokenizer,
        sinks=sinks,
        progress=Progress(total_steps, table.names, done_steps=first_step, is_main=distributed.is_main()),
        shape=ModelShape.from_config(engine.model.lm.config, parameter_counts(engine.model)[1]),
        peak_tflops=config.metrics.peak_tflops or peak_tflops(describe_hardware(device)["device"]),
        total_steps=total_steps,
        first_step=first_step,
        skipped_in_a_row=0 if state is None else int(state["skipped_in_a_row"]),
        spikes=SpikeGuard(
            config.train.spike_factor, config.train.spike_window, () if state is None else state["losses"]
        ),
        early_stopping=early_stopping,
    )


def report_alarms(alarms: list[str]) -> None:
    """Say what is wrong with the reference losses, on rank 0."""
    for alarm in alarms:
        log.warning("reference losses: %s", alarm)


def state_layout(config: Config) -> dict[str, Any]:
    """What decides how DeepSpeed lays out saved state, beside the number of ranks."""
    settings = deepspeed_config(config, distributed.world_size())
    return {
        "ZeRO stage": zero_stage(settings),
        "model.dtype": config.model.dtype,
        "optimizer offload": offloads_optimizer(settings),
    }


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


def open_files(
    config: Config, engine: Engine, total_steps: int, state: dict[str, Any] | None, first_step: int
) -> Sinks:
    """Write what describes the run and open its logs, cut back to the checkpoint, on rank 0; a collective.

    Raises:
        StateError: on every rank, where they cannot be written or are not those of the checkpoint.
    """
    sinks, problem = Sinks(), None
    if distributed.is_main():
        try:
            _note_changes(config)
            write_resolved(config, config.run.dir / constants.RESOLVED_CONFIG_FILE)
            _write_run_info(config, engine, total_steps)
            sinks = open_sinks(
                config.run.dir,
                config.metrics,
                offsets=None if state is None else state["offsets"],
                first_step=first_step + 1,
                config=config.model_dump(mode="json"),
            )
        except StateError as error:
            problem = error
        except OSError as error:
            problem = unwritable(config.run.dir, error)
    distributed.raise_together(problem)
    return sinks


def open_held_out(
    config: Config,
    table: DomainTable,
    caches: list[Any],
    controller: WeightController,
    pad_id: int,
) -> tuple[HeldOut | None, HeldOut | None]:
    """Held-out samples to evaluate on, and those whose losses drive the weights; None where not asked for.

    Raises:
        DataError: a domain in evaluation.domains has no held-out data.
    """
    pack_len, held_out, probe = config.batch.pack_len, None, None
    evaluated = preflight.evaluated_caches(config, table, caches)
    if config.evaluation.every_n_steps is not None:
        held_out = HeldOut(evaluated, pack_len, config.evaluation.max_samples_per_domain, pad_id)
    if controller.needs_probe:
        probe = HeldOut(caches, pack_len, config.weights.probe_samples, pad_id)
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


def _write_run_info(config: Config, engine: Engine, total_steps: int) -> None:
    """run.json: what ran, on what, when; for the report and for people."""
    total, outside_embeddings = parameter_counts(engine.model)
    write_json_atomic(
        config.run.dir / constants.RUN_INFO_FILE,
        {
            "name": config.run.dir.resolve().name,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": describe_versions(),
            "commit": git_commit(),
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


def introduce(
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
    for setting in preflight.ignored_settings(config):
        log.info("note: this setting has no effect: %s", setting)
    if epoch.unpacked >= 2 * epoch.packed:
        log.info(
            "note: a pass over the data takes %d steps packed and would take %d with one sample in each "
            "pack's place; learning rates and epochs tuned without packing may train too little",
            epoch.packed,
            epoch.unpacked,
        )
