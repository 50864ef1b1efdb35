"""Knowledge detection from settings to knowledge.json, in three steps that each leave a file.

    1. generate    sequences.jsonl     a line per text
    2. judge       judgements.jsonl    a line per text with content
    3. aggregate   knowledge.json      and knowledge.png

detection.json says what the first two files were made with. A run that is started again does what is
missing: whole batches in step 1, single texts in step 2. With other settings it refuses rather than mixing
texts; another judge only needs judgements.jsonl moved away.

Steps 1 and 2 go in rounds over the ranks: each rank generates a batch (judges a share), rank 0 gathers and
writes. In the same exchange the ranks learn of errors and of requests to stop, so that they leave together.

What is not covered: how texts are made (`generate.py`) and judged (`judge.py` and the judges), and step 3
(`result.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from versatune_ds.apps.detect.classifier import MAX_TRAINING_SAMPLES, ClassifierJudge
from versatune_ds.apps.detect.embedding import Embedder, packaged_encoder
from versatune_ds.apps.detect.endpoint import EndpointJudge
from versatune_ds.apps.detect.generate import (
    GeneratedText,
    build_generator,
    choose_generator,
    load_text_tokenizer,
    max_new_tokens,
    other_model,
    subject,
    subject_fingerprint,
)
from versatune_ds.apps.detect.journal import DETECTION_FILE, Journal, open_journal, read_detection
from versatune_ds.apps.detect.judge import DomainJudge
from versatune_ds.apps.detect.local_model import ModelJudge
from versatune_ds.apps.detect.result import (
    JUDGEMENTS_FILE,
    KNOWLEDGE_FILE,
    Judged,
    aggregate_texts,
    warn_when_many,
)
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.encode.tokenizer import load_tokenizer
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.faults.signals import StopRequest
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError, VersaTuneError
from versatune_ds.foundations.files import canonical_hash, require_own, write_json_atomic
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.counting import WorkProgress

log = get_logger(__name__)

SEQUENCES_FILE = "sequences.jsonl"
SIGNS = {
    **dict.fromkeys((SEQUENCES_FILE, JUDGEMENTS_FILE), '"index"'),
    DETECTION_FILE: '"generation"',
    KNOWLEDGE_FILE: '"interval_95"',
}
"""See `require_own`."""

Job = TypeVar("Job")


class DetectionStopped(Exception):
    """The ranks agreed to stop, as they were asked to."""


class DetectContext(NamedTuple):
    folder: Path
    device: torch.device
    stop: StopRequest


def detect(config: Config, folder: Path) -> Path | None:
    """Detect a model's knowledge distribution; every rank calls it, alone or under a launcher.

    Args:
        folder: for the files; made when absent.

    Returns:
        Path of knowledge.json; None when the run was asked to stop before it was done.

    Raises:
        VersaTuneError: settings, model, data or endpoint that cannot be used, or no text could be judged.
    """
    launched = "RANK" in os.environ
    if launched:
        device = start_process_group()
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path: Path | None = folder / KNOWLEDGE_FILE
    with StopRequest() as stop:
        try:
            detect_in_group(config, DetectContext(folder, device, stop))
        except DetectionStopped:
            log.info("stopped as asked (%s); start the same command to go on", stop.reason)
            path = None
    if launched:
        close_process_group()
    return path


def detect_in_group(config: Config, context: DetectContext) -> None:
    """`detect` within a process group that is already there, or without one."""
    table = DomainTable(config.domains.names)
    distributed.together(require_own, context.folder, SIGNS)
    distributed.together(lambda: context.folder.mkdir(parents=True, exist_ok=True))
    judge = distributed.together(build_judge, config, table, context)
    try:
        generation = describe_generation(config, context.device)
        texts = generate_texts(config, context, generation)
        judged = judge_texts(config, context, table, judge, generation, texts)
    finally:
        if judge is not None:
            judge.close()
    distributed.on_main(aggregate_texts, config, context.folder, table, generation, texts, judged)


# --- step 1: generate ---------------------------------------------------------------------------------------


def describe_generation(config: Config, device: torch.device) -> dict[str, Any]:
    """What decides the texts; texts of different descriptions are not mixed."""
    settings = subject(config)
    return {
        "model": settings.source,
        "weights": settings.weights,
        "model_fingerprint": subject_fingerprint(settings, config.run.seed),
        "dtype": settings.dtype,
        "generator": choose_generator(config.detect.generator, device.type),
        **config.detect.model_dump(exclude={"model", "generator", "judge", "max_new_tokens"}),
        "max_new_tokens": max_new_tokens(config.detect, settings),
    }


def generate_texts(
    config: Config, context: DetectContext, generation: dict[str, Any]
) -> dict[int, GeneratedText]:
    """Step 1; returns all texts by index on rank 0, none elsewhere.

    Raises:
        StateError: the folder holds texts of other settings.
        VersaTuneError: all texts are blank.
    """
    detect, total = config.detect, config.detect.sequences * config.detect.rounds
    tokenizer = distributed.together(load_text_tokenizer, subject(config))
    journal = distributed.together(
        lambda: open_journal(context.folder, SEQUENCES_FILE, "generation", generation)
    )
    size = detect.batch_size
    done = journal.lines if journal is not None else {}
    batches = [
        (first // size, range(first, min(first + size, total)))
        for first in range(0, total, size)
        if any(i not in done for i in range(first, min(first + size, total)))
    ]
    batches = distributed.broadcast_object(batches)
    if batches:
        generator = distributed.together(
            lambda: build_generator(generation["generator"], config, tokenizer, context.device)
        )
        run_jobs(
            batches,
            lambda batch: (text.to_json() for text in generator.generate(*batch)),
            journal,
            context,
            WorkProgress("generating", "texts", total, len(done), is_main=distributed.is_main()),
        )
        del generator
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    return distributed.together(finish_texts, journal)


def finish_texts(journal: Journal | None) -> dict[int, GeneratedText]:
    """Close the journal and see whether there is anything to judge; rank 0 only, elsewhere nothing."""
    if journal is None:
        return {}
    journal.close()
    texts = {index: GeneratedText(**line) for index, line in journal.lines.items()}
    num_blank = sum(text.is_blank for text in texts.values())
    if num_blank == len(texts):
        tokens = sum(text.num_tokens for text in texts.values())
        raise VersaTuneError(
            f"all {len(texts)} generated texts are empty or whitespace ({tokens} tokens in all): the "
            "model says nothing from its BOS token, so it has no distribution to detect. Look into "
            f"{journal.path}; check that it is a base model with its own tokenizer"
        )
    warn_when_many("empty or whitespace, and not judged", num_blank, len(texts))
    return texts


# --- step 2: judge ------------------------------------------------------------------------------------------


def build_judge(config: Config, table: DomainTable, context: DetectContext) -> DomainJudge | None:
    """The judge that `detect.judge` names, not opened yet; None on ranks that do not judge.

    Raises:
        VersaTuneError: it cannot be used: no data, no key, no model.
    """
    settings = config.detect.judge
    if settings.kind == "model":
        assert settings.model is not None
        return ModelJudge(
            table.names, other_model(settings.model, config.model), settings.batch_size, context.device
        )
    if not distributed.is_main():
        return None
    if settings.kind == "endpoint":
        assert settings.endpoint is not None
        return EndpointJudge(table.names, settings.endpoint)
    caches = open_caches(config, all_domains=False)
    return ClassifierJudge(
        table.names,
        caches["train"],
        caches["eval"],
        load_tokenizer(config),
        config.detect.seed,
        settings.max_chars,
        embedders=build_embedders(config, context.device),
        topics=settings.topics,
        folder=context.folder,
        texts=settings.probe_texts or MAX_TRAINING_SAMPLES,
    )


def build_embedders(config: Config, device: torch.device) -> list[Embedder]:
    """The models whose vectors the classifier reads: the examined one, and an encoder, named or installed."""
    settings = config.detect.judge
    if not settings.probe_texts:
        return []
    found = [Embedder("base", subject(config), config.run.seed, device)]
    encoder = settings.encoder or packaged_encoder()
    if encoder is not None:
        log.info("classifier: also reads with the encoder in %s", encoder)
        found.append(Embedder("encoder", other_model(encoder, config.model), 0, device))
    else:
        log.info(
            "classifier: no encoder is installed; with one it tells domains of unseen sources better "
            "(pip install 'versatune-ds[judge]', or name a folder in detect.judge.encoder)"
        )
    return found


def judge_texts(
    config: Config,
    context: DetectContext,
    table: DomainTable,
    judge: DomainJudge | None,
    generation: dict[str, Any],
    texts: Mapping[int, GeneratedText],
) -> Judged:
    """Step 2; what it returns is complete on rank 0 and empty elsewhere.

    Raises:
        StateError: the folder holds judgements of other texts, domains or another judge.
        VersaTuneError: the judge gave up; its judgements so far are kept.
    """
    max_chars = config.detect.judge.max_chars
    identity: dict[str, Any] = {
        **(judge.identity() if judge is not None else {}),
        "domains": list(table.names),
        "max_chars": max_chars,
        "texts": canonical_hash(generation),
    }
    journal = distributed.together(open_journal, context.folder, JUDGEMENTS_FILE, "judge", identity)
    done = journal.lines if journal is not None else {}
    judgeable = [index for index, text in sorted(texts.items()) if not text.is_blank]
    missing = [(index, texts[index].text[:max_chars]) for index in judgeable if index not in done]
    if distributed.broadcast_object(bool(missing)):
        distributed.together(lambda: judge.open() if judge is not None else None)
        on_every_rank = judge is not None and judge.on_every_rank
        size = judge.texts_at_once if judge is not None else 1
        jobs = [missing[i : i + size] for i in range(0, len(missing), size)]
        if on_every_rank:
            jobs = distributed.broadcast_object(jobs)
        else:
            count = distributed.broadcast_object(len(jobs))
            jobs = jobs or [[]] * count
        if journal is not None and judge is not None:
            note_facts(context.folder, judge)
        run_jobs(
            jobs,
            lambda job: (j.to_json(table.names) for j in judge.judge(job)) if judge is not None else (),
            journal,
            context,
            WorkProgress("judging", "texts", len(judgeable), len(done), is_main=distributed.is_main()),
            on_every_rank=on_every_rank,
        )
        if journal is not None and judge is not None:
            note_facts(context.folder, judge)
    if journal is None:
        return Judged({}, {})
    journal.close()
    return Judged(journal.lines, {**identity, **read_detection(context.folder).get("judge_facts", {})})


def note_facts(folder: Path, judge: DomainJudge) -> None:
    """Keep what the judge knows of itself, for a run that goes on and finds nothing left to judge."""
    content = read_detection(folder)
    write_json_atomic(folder / DETECTION_FILE, {**content, "judge_facts": judge.facts()})


# --- shared -------------------------------------------------------------------------------------------------


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], Iterable[dict[str, Any]]],
    journal: Journal | None,
    context: DetectContext,
    progress: WorkProgress,
    *,
    on_every_rank: bool = True,
) -> None:
    """Do all jobs and append their lines to the journal of rank 0; a collective.

    Args:
        jobs: equally many on every rank.
        work: the lines of a job, as they come: those before an error are kept.
        on_every_rank: a job to each rank at a time, else one to rank 0.

    Raises:
        DetectionStopped: a rank was asked to stop.
        Exception: what `work` raised on any rank, on all of them.
    """
    width = distributed.world_size() if on_every_rank else 1
    try:
        for start in range(0, len(jobs), width):
            mine = start + distributed.rank()
            lines: list[dict[str, Any]] = []
            problem: Exception | None = None
            try:
                if distributed.rank() < width and mine < len(jobs):
                    lines.extend(work(jobs[mine]))
            except Exception as error:  # raised again below, when the others know
                problem = error
            answers = distributed.gather_objects((lines, context.stop.requested is not None))
            if journal is not None:
                found = [line for given, _ in answers for line in given]
                new = [line for line in found if line["index"] not in journal.lines]
                try:
                    journal.append(new)
                except StateError as error:
                    problem = error
                progress.advance(len(new))
            distributed.raise_together(problem)
            if any(asked for _, asked in answers) and start + width < len(jobs):
                raise DetectionStopped
    finally:
        progress.close()
