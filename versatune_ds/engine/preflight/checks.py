"""Checks before a model is built: mistakes that can be known from settings, data and folder alone.

Building a 32B model takes minutes; none of these should be found after that. Every rank runs the same checks;
what only one rank can see is raised on all (`distributed.on_main`).

What is not covered: settings against each other (`config/schema.py`), sample lengths (`Corpus.check`), saved
state (`engine/checkpointing/folder.py`) and memory.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.config.model import Model
from versatune_ds.config.schema import Config, Optimizer
from versatune_ds.config.weights import Weights
from versatune_ds.data.cache.cache import check_file
from versatune_ds.data.cache.prepare import naming_the_command, open_caches
from versatune_ds.data.encode.tokenizer import require_rows
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings, token_supply, too_short
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.replay import resolve_schedule
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.optimizer import learning_rate
from versatune_ds.engine.checkpointing.export_target import check_places
from versatune_ds.engine.checkpointing.folder import list_checkpoints
from versatune_ds.engine.model.adapters import require_peft
from versatune_ds.engine.model.families import EXPERT_FIELDS, MIXTURES, logit_rule
from versatune_ds.engine.model.router import experts_of
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import ConfigError, DataError, StateError
from versatune_ds.foundations.files import read_json_object
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.sinks import LOG_FILES
from versatune_ds.observability.trackers import wanted_trackers
from versatune_ds.strategies.rules import STRATEGIES, settings_of_others

log = get_logger(__name__)

COMPILED_RECOMPUTE = (2, 13)
"""The torch from which compiled layers can be recomputed under ZeRO-3."""
EARLY_UPDATES = 3
"""Fewer updates of the weights while the learning rate is high are worth a warning."""


def check_folder(config: Config) -> None:
    """Refuse to overwrite a run (any with `resume: never`, or a finished one without checkpoints), or what no
    run wrote.

    Raises:
        StateError: the folder holds such a run, or other files that the run would write.
        ConfigError: the model to start from lies in it.
    """
    distributed.on_main(check_places, config.run.dir, config.model)
    distributed.on_main(_check_folder, config.run.dir, config.run.resume)


def _check_folder(folder: Path, resume: str) -> None:
    names = (constants.RUN_INFO_FILE, *LOG_FILES, constants.EXPORT_DIR, constants.CHECKPOINTS_DIR)
    paths = [folder / name for name in names]
    found = [path.name for path in paths if any(path.iterdir() if path.is_dir() else [path.exists()])]
    if found and "config_fingerprint" not in read_json_object(folder / constants.RUN_INFO_FILE):
        raise StateError(
            f"run.dir {folder} holds {', '.join(found)}, which no run of this program wrote and this one "
            "would replace; move that away, or choose another run.dir"
        )
    metrics = folder / constants.METRICS_FILE
    has_lines = metrics.is_file() and metrics.stat().st_size > 0
    has_checkpoints = bool(list_checkpoints(folder / constants.CHECKPOINTS_DIR))
    if resume == "never" and (has_lines or has_checkpoints):
        raise StateError(
            f"{folder} holds a run and run.resume is never; choose another run.dir, or resume: auto"
        )
    if (folder / constants.EXPORT_DIR).exists() and has_lines and not has_checkpoints:
        raise StateError(
            f"{folder} holds a finished run without checkpoints to go on from; starting again would "
            "replace it. Choose another run.dir or remove the folder"
        )


def open_verified_caches(config: Config) -> dict[str, list[Any]]:
    """The token caches, every byte of this rank's share of them checked.

    The ranks of a node share out the files, so that each node proves its own copy; about 1 GB/s a rank.

    Raises:
        DataError, StateError: caches are missing, stale or damaged.
    """
    caches: dict[str, list[Any]] = open_caches(config)  # type: ignore[assignment]
    present = [cache for of_split in caches.values() for cache in of_split if cache is not None]
    files = {c.folder / name: entry for c in present for name, entry in c.manifest["files"].items()}
    by_size = sorted(files, key=lambda path: (-files[path]["bytes"], path))
    with naming_the_command(config):
        for path in by_size[distributed.local_rank() :: distributed.local_size()]:
            check_file(path, files[path], full=True)
    return caches


def check_trackers(config: Config) -> None:
    """Refuse trackers that are asked for and not installed."""
    for tracker in wanted_trackers(config.metrics).values():
        package = tracker.__name__
        if importlib.util.find_spec(package) is None:
            extra = "tracking" if package in ("tensorboard", "wandb") else package
            raise ConfigError(
                f"metrics: {package} is asked for and not installed; pip install 'versatune-ds[{extra}]'"
            )


def check_adapter(settings: Model, deepspeed: Mapping[str, Any], device_type: str) -> None:
    """Refuse an adapter that could not be trained here, or would be of no use afterwards."""
    if settings.adapter is None:
        return
    require_peft()
    if settings.weights == "random":
        raise ConfigError(
            "model.adapter with model.weights: random: the adapter's file would be for a model that is "
            "written nowhere; train on a pretrained model, or leave out model.adapter"
        )
    if settings.adapter.kind == "qlora":
        if device_type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "model.adapter.kind qlora needs CUDA and bitsandbytes (pip install 'versatune-ds[qlora]'), "
                f"whose 4-bit layers are CUDA kernels; this is {device_type}. Use kind: lora"
            )
        if deepspeed["zero_optimization"].get("stage") == 3:
            raise ConfigError(
                "model.adapter.kind qlora: 4-bit weights cannot be divided by ZeRO-3 here; every rank holds "
                "them whole: set zero_optimization.stage to 2"
            )


def check_compile(settings: Model, deepspeed: Mapping[str, Any]) -> None:
    """Refuse compiled layers that are recomputed under ZeRO-3 before torch 2.13: with torch 2.11 their losses
    are wrong (`tests/engine/test_step.py`).
    """
    old = tuple(map(int, metadata.version("torch").split(".")[:2])) < COMPILED_RECOMPUTE
    recomputes = settings.compile != "off" and settings.activation_checkpointing != "off"
    if old and recomputes and deepspeed["zero_optimization"].get("stage") == 3:
        raise ConfigError(
            "model.compile with model.activation_checkpointing under ZeRO-3 needs torch 2.13 or newer; set "
            "one of the two off, or zero_optimization.stage to 2"
        )


def check_supply(
    corpus: Corpus, settings: PlannerSettings, controller: WeightController, total_steps: int
) -> None:
    """Refuse a run that `domains.max_epochs` would starve before its last step."""
    tokens = sum(token_supply(corpus, settings, controller.weights))
    if tokens / settings.tokens_per_step <= total_steps - 1:
        raise too_short(math.ceil(tokens / settings.tokens_per_step), total_steps)


def check_domains_have_data(
    config: Config, table: DomainTable, corpus: Corpus, controller: WeightController
) -> None:
    """Refuse a domain without training samples that has, or may be given, a weight."""
    strategy = STRATEGIES[config.weights.strategy]
    could_rise = np.zeros(len(table), dtype=bool)
    why = "its weight is above 0 (domains.initial, domains.min_weight)"
    if strategy.is_scheduled:
        for weights in resolve_schedule(config.weights.schedule, table).values():
            could_rise |= weights > 0
        why = "weights.schedule gives it a weight"
    elif "target" in strategy.requires:
        could_rise[table.id_of(config.weights.target or "")] = True
        why = "it is weights.target"
    elif strategy.revives_by is not None and getattr(config.weights, strategy.revives_by) > 0:
        could_rise[:] = True
        why = f"{config.weights.strategy}'s {strategy.revives_by} gives every domain a weight"
    for name, size, weight, rises in zip(
        table.names, corpus.num_samples, controller.weights, could_rise, strict=True
    ):
        if size == 0 and (weight > 0 or rises):
            reason = why if rises else "its weight is above 0 (domains.initial, domains.min_weight)"
            raise DataError(f"domain {name} has no training data, and {reason}; add a source to data.train")


def evaluated_caches(config: Config, table: DomainTable, caches: Sequence[Any]) -> list[Any]:
    """Held-out caches of the domains in `evaluation.domains`, None for the others.

    Raises:
        DataError: a domain named there, or in `evaluation.select`, has no held-out data.
    """
    wanted = config.evaluation.domains
    for key, names in (("domains", wanted or ()), ("select", sorted(config.evaluation.selected))):
        lacking = [name for name in names if caches[table.id_of(name)] is None]
        if lacking:
            raise DataError(
                f"evaluation.{key} names {', '.join(lacking)}, without held-out data; add a source to "
                "data.eval"
            )
    if wanted is None:
        return list(caches)
    return [cache if name in wanted else None for name, cache in zip(table.names, caches, strict=True)]


def check_architecture(architecture: Any, tokenizer: Any, corpus: Corpus) -> None:
    """Refuse models whose loss we would compute wrongly or whose embedding is too small for the tokenizer.

    Args:
        corpus: for the longest sample; one beyond the model's positions is a warning.
    """
    logit_rule(architecture)
    if getattr(architecture, "quantization_config", None):
        raise ConfigError(
            "model.source holds quantised weights (quantization_config in its config.json), which cannot be "
            "trained; use the model's bf16 weights"
        )
    if not experts_of(architecture) and any(
        (getattr(architecture, key, 0) or 0) > 1 for key in EXPERT_FIELDS
    ):
        raise ConfigError(
            f"{architecture.model_type} is a mixture of experts whose routers are not known here; those of "
            f"{', '.join(MIXTURES)} are"
        )
    require_rows(tokenizer, architecture.vocab_size)
    positions = getattr(architecture, "max_position_embeddings", None)
    longest = max((int(lengths.max()) for lengths in corpus.lengths if len(lengths)), default=0)
    if positions is not None and longest > positions:
        log.warning(
            "the longest sample has %d tokens, and the model was made for %d positions; set "
            "data.overlong and "
            "batch.pack_len, or model.yarn",
            longest,
            positions,
        )


def check_router(settings: Model, architecture: Any) -> None:
    """Refuse settings of routers that would do nothing."""
    given = {"router": settings.router != "train", "router_aux_loss": settings.router_aux_loss is not None}
    names = " and ".join(f"model.{name}" for name, is_given in given.items() if is_given)
    if names and not experts_of(architecture):
        raise ConfigError(f"{names}: {architecture.model_type} has no routers; leave it out")
    if names and settings.adapter is not None:
        raise ConfigError(
            f"{names}: with model.adapter routers are frozen like all of the model; leave it out"
        )
    if all(given.values()):
        raise ConfigError("model.router frozen: routers that do not train need no model.router_aux_loss")


def check_optimizer(settings: Optimizer, architecture: Any) -> None:
    """Refuse Muon for a mixture of experts, whose tensors have three dimensions."""
    if settings.kind == "muon" and experts_of(architecture):
        raise ConfigError(
            f"optimizer.kind muon: {architecture.model_type} has experts, which it is not for here; use adamw"
        )


def late_weights(config: Config, total_steps: int) -> str | None:
    """A warning where weights that move would hardly do so while the learning rate is still high."""
    strategy, every = STRATEGIES[config.weights.strategy], config.weights.interval(total_steps)
    updates = range(every, total_steps, every)
    peak = config.optimizer.lr
    early = sum(learning_rate(config.optimizer, step, total_steps) >= peak / 2 for step in updates)
    if not strategy.moves_with_losses or early >= EARLY_UPDATES:
        return None
    return (
        f"weights: {len(updates)} updates in {total_steps} steps, {early} of them while the learning rate is "
        "at least half its peak: shares that arrive late change little; lower weights.every_n_steps, or keep "
        "the rate longer (optimizer.schedule wsd_linear)"
    )


def ignored_settings(config: Config) -> list[str]:
    """Settings that were given and have no effect with the others; for the first lines of a run."""
    strategy = config.weights.strategy
    ignored = [
        f"weights.{name} (strategy is {strategy})"
        for name, field in Weights.model_fields.items()
        if name in settings_of_others(strategy) and getattr(config.weights, name) != field.default
    ]
    for name in ("max_samples_per_domain", "domains", "generate"):
        if getattr(config.evaluation, name) is not None and config.evaluation.every_n_steps is None:
            ignored.append(f"evaluation.{name} (evaluation.every_n_steps is not set)")
    if config.weights.loss_unit == "byte" and config.weights.reference is None:
        ignored.append("weights.loss_unit (there is no weights.reference)")
    return ignored
