"""`versatune-ds evaluate`: held-out losses and scored answers of a finished model, on one rank or many.

Held-out data are those of the settings, prepared with the settings' tokenizer; a model that comes with
another vocabulary is refused. Under ZeRO-3 the model is partitioned over the ranks.

What is not covered: benchmark tasks (`apps/evaluate/lm_eval.py`), what is compared how
(`domain/evaluation.py`), and what a model may be given as (`apps/evaluate/targets.py`).
"""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from versatune_ds.apps.evaluate.lm_eval import Scores, check_benchmarks_can_run, run_benchmarks
from versatune_ds.apps.evaluate.targets import resolve_target
from versatune_ds.config.benchmarks import Benchmarks
from versatune_ds.config.derive import with_model
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.tokenizer import load_tokenizer
from versatune_ds.data.plan.corpus import Corpus
from versatune_ds.domain.evaluation import (
    EVALUATION_FORMAT,
    Change,
    ModelEvaluation,
    ScoreChange,
    compare,
    compare_scores,
)
from versatune_ds.domain.reference import Fingerprints
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.answers.questions import Questions, ask
from versatune_ds.engine.backend.deepspeed_backend import build_for_evaluation
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.evaluate import HeldOut, evaluate_samples
from versatune_ds.engine.faults.device_errors import explained
from versatune_ds.engine.fingerprints import data_fingerprint, model_fingerprint
from versatune_ds.engine.model.sequence import check_heads
from versatune_ds.engine.model.source import load_architecture
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.provenance import describe_hardware, describe_versions
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import ConfigError, DivergenceError
from versatune_ds.foundations.files import require_own, writing
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Evaluated(NamedTuple):
    after: ModelEvaluation
    before: ModelEvaluation | None
    changes: list[Change]
    score_changes: list[ScoreChange]
    out: Path
    """Folder with evaluation.json."""


def run_evaluation(
    config: Config,
    model: str,
    *,
    against: str | None = None,
    tasks: Benchmarks | None = None,
    out: Path | None = None,
) -> Evaluated:
    """Evaluate a model and write evaluation.json; every rank calls it.

    Args:
        model: folder, run folder, checkpoint folder or hub name.
        against: what to compare with: an evaluation.json, or a model, which is then evaluated first.

    Raises:
        VersaTuneError: settings, data or models cannot be used, or the two cannot be compared.
    """
    if tasks is not None:
        check_benchmarks_can_run(tasks)
    device = start_process_group()
    before = None
    if against is not None and Path(against).is_file():
        before = ModelEvaluation.read(Path(against))
    elif against is not None:
        before, _ = evaluate_in_group(config, against, device, tasks=tasks)
    after, folder = evaluate_in_group(config, model, device, tasks=tasks, out=out)
    changes = [] if before is None else compare(after, before)
    score_changes = [] if before is None else compare_scores(after, before)
    close_process_group()
    return Evaluated(after, before, changes, score_changes, folder)


def evaluate_in_group(
    config: Config,
    model: str,
    device: torch.device,
    *,
    tasks: Benchmarks | None = None,
    out: Path | None = None,
) -> tuple[ModelEvaluation, Path]:
    """Evaluate one model within a process group and write evaluation.json; returns also its folder.

    Benchmarks take hours: the file is written before the first of them and after each.
    """
    target = resolve_target(model, config)
    folder = out or target.out
    distributed.together(require_own, folder, {constants.EVALUATION_FILE: EVALUATION_FORMAT})
    evaluation = measure(config, target.source, device)
    write_evaluation(evaluation, folder)
    if tasks is None:
        return evaluation, folder

    def with_scores(found: Scores) -> ModelEvaluation:
        provenance = {**evaluation.provenance, "benchmarks_not_run": found.not_run}
        return dataclasses.replace(evaluation, benchmarks=found.scores, provenance=provenance)

    found = run_benchmarks(
        target.source,
        tasks,
        config.model,
        device,
        keep=lambda so_far: write_evaluation(with_scores(so_far), folder),
    )
    write_evaluation(with_scores(found), folder)
    return with_scores(found), folder


def write_evaluation(evaluation: ModelEvaluation, folder: Path) -> None:
    """Write evaluation.json on rank 0; a collective. StateError on every rank where it cannot be written."""
    distributed.on_main(_write, evaluation, folder)


def _write(evaluation: ModelEvaluation, folder: Path) -> None:
    with writing(folder, "give another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        evaluation.write(folder / constants.EVALUATION_FILE)


def measure(config: Config, source: str, device: torch.device) -> ModelEvaluation:
    """Held-out losses and answers of a model, sample by sample; a collective.

    Args:
        config: the run's settings: data, tokenizer, pack length, dtype, attention, DeepSpeed file.
        source: Hugging Face folder or hub name.

    Raises:
        ConfigError, DataError, StateError: settings, model or data cannot be used.
        DivergenceError: losses that are not finite.
    """
    start = time.perf_counter()
    derived = with_model(config, source)
    table = DomainTable(config.domains.names)
    tokenizer = load_tokenizer(derived)
    _check_vocabulary(source, derived, tokenizer)
    caches = preflight.evaluated_caches(config, table, open_caches(derived)["eval"])
    architecture = load_architecture(derived.model)
    preflight.check_architecture(architecture, tokenizer, Corpus.from_caches(caches, table.names))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # never read
    ranks = Ranks.of_world(config.batch.sequence_parallel)
    check_heads(architecture.num_attention_heads, ranks.sp.size)
    held_out = HeldOut(caches, config.batch.pack_len, config.evaluation.max_samples_per_domain, pad_id, ranks)
    lacking = [name for name, cache in zip(table.names, caches, strict=True) if cache is None]
    if lacking:
        log.warning("not evaluated, for lack of held-out data or by choice: %s", ", ".join(lacking))
    questions = None
    if config.evaluation.generate is not None:
        by_name = dict(zip(table.names, caches, strict=True))
        questions = Questions(derived, by_name, tokenizer, architecture)
    with explained(derived):
        backend = build_for_evaluation(derived, device)
        losses, tokens = evaluate_samples(backend, held_out)
        said = ask(backend, questions)
    del backend
    free_memory()
    _check_finite(source, table, caches, losses)
    encoder = ChatEncoder.build(tokenizer, config.data.chat_template)
    return ModelEvaluation(
        model=source,
        losses={name: losses[i] for i, name in enumerate(table.names) if caches[i] is not None},
        tokens={
            name: tokens[i].astype(np.float64) for i, name in enumerate(table.names) if caches[i] is not None
        },
        fingerprints=Fingerprints(
            model=model_fingerprint(derived.model),
            tokenizer=encoder.fingerprint,
            data=data_fingerprint(caches, table.names),
        ),
        answers=tuple(map(dataclasses.asdict, said.answers)),
        provenance={
            **provenance(device),
            "dtype": config.model.dtype,
            "eval_s": round(time.perf_counter() - start, 3),
        },
    )


def provenance(device: torch.device) -> dict[str, Any]:
    """When, on what and with which versions something was measured."""
    return {
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": distributed.world_size(),
        "hardware": describe_hardware(device),
        "versions": describe_versions(),
    }


def free_memory() -> None:
    """Let go of engines that nobody holds any more: they are full of reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_vocabulary(source: str, derived: Config, tokenizer: Any) -> None:
    """Refuse a model folder that comes with another vocabulary than the data were prepared with."""
    folder = Path(source)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    own = load_tokenizer(
        derived.model_copy(update={"model": derived.model.model_copy(update={"tokenizer": source})})
    )
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{source} comes with another vocabulary ({len(own)} entries) than the tokenizer of these "
            f"settings, {derived.model.tokenizer} ({len(tokenizer)}): its losses on these tokens would mean "
            f"nothing. Add model.tokenizer={source} and prepare the data with it"
        )


def _check_finite(source: str, table: DomainTable, caches: list[Any], losses: list[np.ndarray]) -> None:
    bad = [
        f"{table.names[domain]} {':'.join(map(str, caches[domain].source_of(int(i))))}"
        for domain, values in enumerate(losses)
        for i in np.flatnonzero(~np.isfinite(values))
    ]
    if bad:
        raise DivergenceError(
            f"{source} gives losses that are not finite on {len(bad)} held-out samples "
            f"({', '.join(bad[:3])}); its weights are damaged, or "
            "model.dtype is too narrow for it: try model.dtype=fp32"
        )
