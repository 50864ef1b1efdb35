"""Running a study: the trainer itself, in worker processes that train one run after another.

    model folder and data made -> every run's settings checked -> base -> reference -> arms -> results

A worker is a process of one rank; it starts once and trains many runs with `engine.train.train_in_group`, so
that imports are paid once. A finished run leaves `finished.json` with the hash of everything that decides its
result; the next start of the study keeps it when the hash is the same and trains it again when not. Workers
write what runs print into `workers/*.log`.

What is not covered: which runs there are (`apps/study/jobs.py`), tables (`apps/study/tables.py`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from versatune_ds.apps.sample import llama_config, strings_in, train_tokenizer, unpack_sample
from versatune_ds.apps.study.config import Study
from versatune_ds.apps.study.jobs import BASE_RUN, Job, StudyPlan
from versatune_ds.apps.study.results import (
    RunResult,
    last_evaluation,
    read_result,
    reference_losses,
    summarise,
)
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import PreparedData, prepare
from versatune_ds.data.rows.files import find_files
from versatune_ds.data.rows.readers import decode_block, read_blocks
from versatune_ds.domain.reference import REFERENCE_FORMAT, REFERENCE_VERSION
from versatune_ds.engine.faults.signals import StopRequest
from versatune_ds.engine.fingerprints import model_fingerprint
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import DataError, StateError, VersaTuneError
from versatune_ds.foundations.files import canonical_hash, require_own, write_json_atomic, write_text_atomic
from versatune_ds.foundations.log import get_logger, setup_logging
from versatune_ds.observability.progress import duration

log = get_logger(__name__)

CORPUS_VARIABLE = "VERSATUNE_CORPUS"
BEGUN_FILE, FINISHED_FILE = "begun.json", "finished.json"
OTHER = "choose another `dir`"
POLL_S = 1.0
STOP_WAIT_S = 120.0


class StudyStopped(VersaTuneError):
    """The study was asked to stop; what is finished is kept."""

    exit_code = constants.EXIT_OK


class Outcome(NamedTuple):
    name: str
    error: str | None
    finished: bool
    seconds: float


@dataclass(frozen=True)
class StudyRuns:
    reference: dict[str, float]
    """Reference loss by domain, nats per supervised token."""
    arms: list[RunResult]
    domains: list[str]
    seconds: float
    """Wall time of this call; finished runs of earlier calls are not in it."""


def require_made(folder: Path, mark: str) -> None:
    """Refuse to replace a folder with files that no study wrote.

    Args:
        mark: file that a study writes there first of all, or last.

    Raises:
        StateError: there are others.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise StateError(f"{folder} holds files that no study wrote; move them away, or {OTHER}")


def run_study(study: Study) -> StudyRuns:
    """Train whatever is not finished and read all results.

    Raises:
        VersaTuneError: settings or data that cannot be used, a run that failed, or a request to stop.
    """
    started = time.perf_counter()
    require_own(study.dir, {"reference.json": REFERENCE_FORMAT}, OTHER)
    results = {"index.html": "VersaTune</title>", "summary.json": '"baselines"', "results.md": "# Study"}
    require_own(study.dir / "results", results, OTHER)
    study.dir.mkdir(parents=True, exist_ok=True)
    plan = make_plan(study)
    total = plan.check()
    shared = [*plan.base(), *plan.references()][0].config
    prints = prepare_all([shared, *(job.config for job in plan.all_jobs())])
    data = prints.pop(data_settings(shared))
    model = model_fingerprint(shared.model) if study.model.source else None
    origin = canonical_hash([data, model]) if model else data
    with StopRequest() as stop, StudyWorkers(study.dir, study.workers, origin, total, stop) as workers:
        workers.run(plan.base())
        reference = reference_losses(workers.run(with_data(plan.references(), prints)))
        for_runs_elsewhere = {"format": REFERENCE_FORMAT, "version": REFERENCE_VERSION, "losses": reference}
        write_json_atomic(study.dir / "reference.json", for_runs_elsewhere)
        arms = workers.run(with_data(plan.arms(reference), prints))
    return StudyRuns(
        reference=reference,
        arms=arms,
        domains=plan.domains,
        seconds=time.perf_counter() - started,
    )


def make_plan(study: Study) -> StudyPlan:
    """Corpus, tokenizer and model configuration, made when they are not there yet."""
    corpus: Any = os.environ.get(CORPUS_VARIABLE) if study.corpus != "sample" else "sample"
    if (corpus or study.corpus) == "sample":
        sample = study.dir / "sample"
        unpack_sample(sample)
        return StudyPlan(study, sample / "data", study.model.source or sample / "model")
    corpus = Path(corpus or study.corpus)
    if not corpus.is_dir():
        raise DataError(
            f"no folder with the corpus; set `corpus`, or {CORPUS_VARIABLE}, to the folder that the paths of "
            "settings.data start from",
            path=corpus,
        )
    if study.model.source:
        return StudyPlan(study, corpus, study.model.source)
    folder = study.dir / "model"
    plan = StudyPlan(study, corpus, folder)
    wanted = canonical_hash([study.model.model_dump(), str(corpus)])
    marker = folder / "made_for.json"
    if not marker.is_file() or json.loads(marker.read_text()) != wanted:
        require_made(folder, marker.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(marker, None)
        log.info("training a tokenizer of %d entries on the training files", study.model.vocab_size)
        vocab_size = train_tokenizer(training_texts(plan.base()[0]), folder, study.model.vocab_size)
        write_json_atomic(folder / "config.json", {**llama_config(vocab_size), **study.model.shape})
        write_json_atomic(marker, wanted)
    return plan


def training_texts(base: Job) -> Iterator[str]:
    """All texts of the training files; rows that cannot be read are left to `prepare`, which reports them."""
    for source in base.config.data.train:
        for file in find_files(source.path, source.split).files:
            for block in read_blocks(file):
                for _, row in decode_block(file, block):
                    if isinstance(row, dict):
                        yield from strings_in(row)


def data_fingerprint(prepared: PreparedData) -> str:
    caches = [cache for split in prepared.caches.values() for cache in split]
    return canonical_hash([None if cache is None else cache.fingerprint for cache in caches])


def data_settings(config: Config) -> str:
    """Tells settings of data apart."""
    return canonical_hash([config.data.model_dump(mode="json"), config.domains.names])


def prepare_all(configs: Sequence[Config]) -> dict[str, str]:
    """Prepare the data of all runs; fingerprints by `data_settings`."""
    found: dict[str, str] = {}
    for config in configs:
        if (settings := data_settings(config)) not in found:
            prepared = prepare(config)
            log.info("%s", prepared.table())
            found[settings] = data_fingerprint(prepared)
    return found


def with_data(jobs: Sequence[Job], prints: Mapping[str, str]) -> list[Job]:
    """Jobs that know the fingerprint of their data, where `prints` has it."""
    return [replace(job, data=prints.get(data_settings(job.config))) for job in jobs]


class StudyWorkers:
    """Processes that train jobs; use as a context manager.

    Args:
        folder: of the study; runs lie in `runs`, what they print in `workers`.
        workers: runs at the same time.
        origin: hash of the data.
        total: runs of the whole study, for the progress lines.
        stop: whether this process was asked to stop.
    """

    def __init__(self, folder: Path, workers: int, origin: str, total: int, stop: StopRequest) -> None:
        self._folder = folder
        self._workers = workers
        self._origin = origin
        self._total = total
        self._stop = stop
        self._done = 0
        self._trained_s: list[float] = []
        self._started = time.perf_counter()
        self._processes: dict[connection.Connection, Any] = {}

    def __enter__(self) -> StudyWorkers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        for link in self._processes:
            with contextlib.suppress(OSError):
                link.send(None)
        for process in self._processes.values():
            if kind is not None and process.is_alive():
                process.terminate()  # SIGTERM: a run in progress writes a checkpoint and ends
            process.join(STOP_WAIT_S)
            if process.is_alive():
                process.kill()

    def run(self, jobs: Sequence[Job]) -> list[RunResult]:
        """`finish` the jobs; their results, in their order."""
        self.finish(jobs)
        return [read_result(job.config.run.dir, job.arm, job.seed, job.total_steps) for job in jobs]

    def finish(self, jobs: Sequence[Job]) -> None:
        """Perform the jobs that are not finished.

        Raises:
            VersaTuneError: a run failed, a worker died, or the study was asked to stop.
        """
        fingerprints = {job.name: job.fingerprint(self._origin) for job in jobs}
        waiting = [job for job in jobs if not is_finished(job, fingerprints[job.name])]
        self._done += len(jobs) - len(waiting)
        if kept := len(jobs) - len(waiting):
            log.info("[%d/%d] %d finished runs are kept", self._done, self._total, kept)
        for job in waiting:
            require_made(job.config.run.dir, BEGUN_FILE)
        threads = max(1, (os.cpu_count() or 1) // self._workers)
        waiting.reverse()
        while len(self._processes) < min(self._workers, len(waiting)):
            self._start()
        busy: set[connection.Connection] = set()
        while waiting or busy:
            for link in self._processes.keys() - busy:
                if waiting:
                    job = waiting.pop()
                    link.send((job, fingerprints[job.name], threads))
                    busy.add(link)
            for ready in connection.wait(list(busy), timeout=POLL_S):
                self._take(ready)  # type: ignore[arg-type]
                busy.discard(ready)  # type: ignore[arg-type]
            if self._stop.requested is not None:
                raise StudyStopped(
                    f"stopped as asked ({self._stop.reason}); start the same command to go on: finished runs "
                    "are kept, and those in progress go on from a checkpoint"
                )
        if jobs and jobs[0].kind == "base":  # what is trained from it belongs to it
            self._origin = fingerprints[jobs[0].name]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        folder = self._folder / "workers"
        folder.mkdir(exist_ok=True)
        log_file = folder / f"{len(self._processes)}.log"
        process = context.Process(target=work, args=(theirs, log_file))
        process.start()
        theirs.close()
        self._processes[ours] = process

    def _take(self, link: connection.Connection) -> None:
        """One answer of a worker."""
        logs = self._folder / "workers"
        try:
            outcome: Outcome = link.recv()
        except EOFError:
            process = self._processes.pop(link)
            process.join()
            raise VersaTuneError(
                f"a worker died (exit code {process.exitcode}); its last words are in {logs}; start the same "
                "command to go on"
            ) from None
        if outcome.error is not None:
            raise VersaTuneError(f"run {outcome.name}: {outcome.error}\nits log is in {logs}")
        if not outcome.finished:
            raise StudyStopped(f"run {outcome.name} was asked to stop; start the same command to go on")
        self._done += 1
        self._trained_s.append(outcome.seconds)
        per_run = (time.perf_counter() - self._started) / len(self._trained_s)
        left = duration(per_run * (self._total - self._done))
        _, loss = last_evaluation(self._folder / "runs" / outcome.name)
        log.info(
            "[%d/%d] %s: mean held-out loss %.4f (%s), about %s left",
            self._done,
            self._total,
            outcome.name,
            loss,
            duration(outcome.seconds),
            left,
        )


def work(link: connection.Connection, log_file: Path) -> None:
    """The life of a worker: start a group of one rank, train what is sent, end with None or a closed link."""
    output = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    setup_logging()
    from versatune_ds.engine.backend.process_group import close_process_group, start_process_group

    device = start_process_group()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (task := link.recv()) is not None:
            job, fingerprint, threads = task
            link.send(train_job(job, fingerprint, threads, device))
    close_process_group()


def train_job(job: Job, fingerprint: str, threads: int, device: Any) -> Outcome:
    """Train one run to its end, from its checkpoint if it was stopped; other remains are removed first."""
    import torch

    from versatune_ds.foundations.machine import git_commit

    started, cpu_started = time.perf_counter(), time.process_time()
    torch.set_num_threads(threads)
    folder = job.config.run.dir
    begun = folder / BEGUN_FILE
    ours = begun.is_file() and json.loads(begun.read_text()) == fingerprint
    if folder.exists() and not (ours and (folder / constants.CHECKPOINTS_DIR).is_dir()):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(begun, fingerprint)
    try:
        job.perform(device)
    except VersaTuneError as error:
        return Outcome(job.name, str(error), False, 0.0)
    gc.collect()  # an engine holds itself in cycles
    seconds = time.perf_counter() - started
    finished = last_evaluation(folder)[0] == job.total_steps
    if finished:
        shutil.rmtree(folder / constants.CHECKPOINTS_DIR, ignore_errors=True)
        done = {
            "fingerprint": fingerprint,
            "seconds": seconds,
            "cpu_s": time.process_time() - cpu_started,
            "commit": git_commit(),
        }
        write_json_atomic(folder / FINISHED_FILE, done)
    return Outcome(job.name, None, finished, seconds)


def is_finished(job: Job, fingerprint: str) -> bool:
    """Whether the run folder holds the result of exactly this job."""
    path = job.config.run.dir / FINISHED_FILE
    if not path.is_file():
        return False
    same = bool(json.loads(path.read_text())["fingerprint"] == fingerprint)
    if not same:
        log.info("%s was trained with other settings, data or base model; it is trained again", job.name)
    return same


def report_study(study: Study, runs: StudyRuns, config_path: Path) -> Path:
    """Write summary.json, results.md and index.html; returns the path of the last.

    index.html is the report of the first seed's runs, of those arms whose weights move if there are any.
    """
    from versatune_ds.apps.study.tables import study_tables
    from versatune_ds.report.report import write_report

    summary = summarise(
        reference=runs.reference,
        arms=runs.arms,
        names=runs.domains,
        baselines=study.baselines,
        expansions=[(expansion.target, expansion.arms) for expansion in study.expansions],
        objectives=study.objectives,
    )
    finished = [json.loads(path.read_text()) for path in study.dir.glob(f"runs/*/{FINISHED_FILE}")]
    a_run = f"{runs.arms[0].arm}_seed-{runs.arms[0].seed}" if study.model.source else BASE_RUN
    info = json.loads((study.dir / "runs" / a_run / constants.RUN_INFO_FILE).read_text())
    summary["provenance"] = {
        "date": time.strftime("%Y-%m-%d"),
        "config": str(config_path),
        "commits": sorted({str(done["commit"]) for done in finished}),
        "hardware": info["hardware"],
        "versions": info["versions"],
        "num_parameters": info["num_parameters"],
        "workers": study.workers,
        "study": study.model_dump(mode="json"),
        "runs": len(finished),
        "run_s": sum(done["seconds"] for done in finished),
        "cpu_s": sum(done["cpu_s"] for done in finished),
        "wall_s": runs.seconds,
    }
    results = study.dir / "results"
    results.mkdir(exist_ok=True)
    write_json_atomic(results / "summary.json", summary)
    write_text_atomic(results / "results.md", study_tables(summary))
    moving = [name for name, arm in summary["arms"].items() if arm["weights"]["moved"] > 0]
    shown = [study.dir / "runs" / f"{name}_seed-{study.seeds[0]}" for name in moving or summary["arms"]]
    return write_report(shown, results / "index.html")
