"""Everything that is known of a run before a model is built, found once: `Prepared`.

Settings that hold together, the DeepSpeed configuration, the tokenizer, opened and verified caches, the
corpus, the reference losses, the number of steps. Checks come in the order of what they cost: mistakes that
settings alone show are found before data is opened, and all of them before a model is built. Nothing is
written.

What is not covered: the checks themselves (`engine/preflight`), and what a checkpoint changes
(`engine/run.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from versatune_ds.config.schema import Config
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.tokenizer import load_tokenizer, set_chat_template
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.reference import ReferenceLosses, load_reference
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.answers.questions import Questions
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.backend.zero_sizes import with_sizes
from versatune_ds.engine.checkpointing.hf_export import Companions
from versatune_ds.engine.model.families import built_shape
from versatune_ds.engine.model.sequence import check_heads
from versatune_ds.engine.model.source import check_files, load_architecture
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.preflight.consistency import code_and_settings, require_consistency
from versatune_ds.engine.preflight.shared_files import check_shared_folder, open_caches_on_all_nodes
from versatune_ds.engine.references import open_reference


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run is made from; the same on all ranks but for `ranks`."""

    config: Config
    ranks: Ranks
    deepspeed: dict[str, Any]
    """The DeepSpeed configuration."""
    table: DomainTable
    tokenizer: Any = None
    """With its chat template; None where samples were given instead of caches."""
    architecture: Any
    """The transformers config of the model."""
    companions: Companions | None = None
    """What the finished model has beside its weights; None where nothing is exported."""
    train: Sequence[Any]
    """Token cache of each domain, None for one without."""
    held_out: Sequence[Any]
    """The same of held-out data."""
    evaluated: Sequence[Any]
    """Of `held_out`, the domains in evaluation.domains."""
    corpus: Corpus
    planner: PlannerSettings
    reference: ReferenceLosses | None
    questions: Questions | None = None
    """What the model is asked at every evaluation; None: nothing."""
    total_steps: int

    @property
    def pad_id(self) -> int:
        """Token id of padding, which is never read."""
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    def new_controller(self) -> WeightController:
        """The domain weights before the first step."""
        weights = self.config.weights
        return WeightController(self.table, self.config.domains, weights, self.reference, self.total_steps)


def prepare_run(config: Config, device_type: str) -> Prepared:
    """Open and check what a run needs; every rank calls it.

    Args:
        device_type: "cpu" or "cuda", where the model will run.

    Raises:
        ConfigError, DataError, StateError: settings, data or run folder that cannot be used.
    """
    require_consistency("code, settings and model", code_and_settings(config))
    ranks = Ranks.of_world(config.batch.sequence_parallel)
    settings = deepspeed_config(config, ranks.dp.size)
    preflight.check_folder(config)
    check_shared_folder(config.run.dir)
    preflight.check_trackers(config)
    preflight.check_adapter(config.model, settings, device_type)
    preflight.check_compile(config.model, settings)
    table = DomainTable(config.domains.names)
    architecture = load_architecture(config.model)
    check_heads(architecture.num_attention_heads, ranks.sp.size)
    zero = with_sizes(settings["zero_optimization"], built_shape(architecture), config.model.adapter)
    check_files(config.model)
    tokenizer = load_tokenizer(config)
    set_chat_template(tokenizer, config.data.chat_template)
    caches = open_caches_on_all_nodes(config)
    corpus = Corpus.from_caches(caches["train"], table.names)
    planner = planner_settings(config, table)
    corpus.check(planner)
    preflight.check_architecture(architecture, tokenizer, corpus)
    preflight.check_router(config.model, architecture)
    preflight.check_optimizer(config.optimizer, architecture)
    encoder = ChatEncoder.build(tokenizer, config.data.chat_template)
    exported = config.checkpoint.export_at_end
    evaluated = preflight.evaluated_caches(config, table, caches["eval"])
    questions = None
    if config.evaluation.generate is not None and config.evaluation.every_n_steps is not None:
        by_name = dict(zip(table.names, evaluated, strict=True))
        questions = Questions(config, by_name, tokenizer, architecture)
    prepared = Prepared(
        config=config,
        ranks=ranks,
        deepspeed=settings | {"zero_optimization": zero},
        table=table,
        tokenizer=tokenizer,
        architecture=architecture,
        companions=Companions.of(config, tokenizer, architecture) if exported else None,
        train=caches["train"],
        held_out=caches["eval"],
        evaluated=evaluated,
        corpus=corpus,
        planner=planner,
        questions=questions,
        reference=open_reference(config, table, tokenizer, encoder.fingerprint, caches),
        total_steps=count_steps(config, corpus, planner),
    )
    controller = prepared.new_controller()
    preflight.check_domains_have_data(config, table, corpus, controller)
    preflight.check_supply(corpus, planner, controller, prepared.total_steps)
    return prepared


def prepare_on_samples(config: Config, samples: Sequence[Any]) -> Prepared:
    """The same without run folder, tokenizer and held-out data, on given sources of samples.

    Args:
        samples: of each domain, what collate, corpus and error messages need of a token cache.

    Raises:
        ConfigError, DataError: settings or samples that cannot be used.
    """
    ranks, table = Ranks.of_world(config.batch.sequence_parallel), DomainTable(config.domains.names)
    corpus, planner = Corpus.from_caches(samples, table.names), planner_settings(config, table)
    corpus.check(planner)
    settings = deepspeed_config(config, ranks.dp.size)
    architecture = load_architecture(config.model)
    zero = with_sizes(settings["zero_optimization"], built_shape(architecture), config.model.adapter)
    return Prepared(
        config=config,
        ranks=ranks,
        deepspeed=settings | {"zero_optimization": zero},
        table=table,
        architecture=architecture,
        train=samples,
        held_out=[None] * len(table),
        evaluated=[None] * len(table),
        corpus=corpus,
        planner=planner,
        reference=load_reference(config.weights.reference, table),
        total_steps=count_steps(config, corpus, planner),
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
