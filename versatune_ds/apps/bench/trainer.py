"""End-to-end throughput of the trainer's own step, on random weights of a named shape.

    warm up -> matrix-product ceiling -> steps on the clock -> steps with every phase timed -> weight updates
            -> steps with and without domain statistics, in alternation

The steps are `engine.train.run_step` on a `Run` like any other; nothing of the loop is written a second time.
Throughput is tokens over wall time between two synchronisations around many steps. The split into phases puts
CUDA events (on a CPU: clock readings) around the calls that `run_step` makes. It adds a barrier before the
step's all-reduce, so that waiting for slower ranks is told apart from it, and a synchronisation at the end of
the step; it is therefore measured in steps of its own, which are not in the throughput.

Phases: data_wait (the loader made the loop wait), forward (without the head), loss (the head's forward, which
with the fused backends computes its gradients too), backward, optimizer, statistics (adding and reducing the
domain sums), rank_wait, and other (copies, records, what the phases leave).

What is not covered: evaluation and checkpoints (not part of a step), and the quality of what is trained.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import yaml

from versatune_ds.apps.bench.phases import Stopwatch, phases, timed_phases, without_statistics
from versatune_ds.apps.bench.results import (
    KIND,
    PHASES,
    SCHEMA_VERSION,
    full_model,
    rates,
    spread,
)
from versatune_ds.apps.bench.shapes import (
    nonembedding_parameters,
    shape_config,
    total_parameters,
    write_model_folder,
)
from versatune_ds.config.load import load_config
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.loader import StepLoader
from versatune_ds.data.plan.balance import check_world_size
from versatune_ds.data.plan.corpus import Corpus
from versatune_ds.data.plan.planner import StepPlan
from versatune_ds.data.plan.state import PlannerState
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.early_stopping import EarlyStopping
from versatune_ds.domain.reference import load_reference
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.backend.build import (
    build_engine,
    close_process_group,
    describe_hardware,
    describe_versions,
    git_commit,
    start_process_group,
)
from versatune_ds.engine.backend.deepspeed_config import zero_stage
from versatune_ds.engine.checkpointing.saver import Saver
from versatune_ds.engine.faults.signals import StopRequest
from versatune_ds.engine.model.packed_lm import DTYPES, parameter_counts
from versatune_ds.engine.run import Run, planner_settings
from versatune_ds.engine.skipping import SpikeGuard
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.engine.train import run_step, update_weights
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError, DataError
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.progress import Progress
from versatune_ds.observability.records import StepRecord
from versatune_ds.observability.sinks import Sinks
from versatune_ds.observability.throughput import ModelShape, peak_memory_gib, peak_tflops, step_flops

log = get_logger(__name__)

DOMAINS = ("law", "medicine", "finance", "science", "code", "other")
SYNTHETIC_SAMPLES = 4096
NUM_UPDATES = 3


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and how often."""

    shape: str
    """Name in `bench_shapes.SHAPES`."""
    layers: tuple[int, ...] = ()
    """Slices of the first n layers; empty: the whole model."""
    pack_len: int = 8192
    packs_per_rank: int = 2
    """Packs of a rank in a step: its accumulation steps."""
    warmup_steps: int = 5
    steps: int = 20
    """Steps on the clock."""
    split_steps: int = 5
    """Steps with every phase timed."""
    metrics: str = "both"
    """Domain statistics "on", "off", or "both" (adds steps that alternate)."""
    data: Path | None = None
    """Settings whose prepared data is used; None: synthetic samples."""
    supervised: float = 0.5
    """Synthetic: share of a sample that has labels."""
    dtype: str = "bf16"
    activation_checkpointing: str | int = "off"
    zero_stage: int = 3
    deepspeed: Path | None = None
    """DeepSpeed JSON file instead of `zero_stage`."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for any other setting; they win."""


# --- the benchmark ------------------------------------------------------------------------------------------


def bench(settings: BenchSettings) -> dict[str, Any]:
    """Measure and return the result, complete on rank 0; every rank calls it.

    Raises:
        VersaTuneError: settings or data that cannot be used.
    """
    device = start_process_group()
    result = bench_in_group(settings, device)
    close_process_group()
    return result


def bench_in_group(settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """`bench` within a process group that is already there and stays."""
    full_layers = shape_config(settings.shape)["num_hidden_layers"]
    layers = sorted(set(settings.layers or (full_layers,)))
    environment = describe_environment(device)
    measured = []
    ceiling: dict[str, Any] = {}
    for count in layers:
        log.info("%s: %d of %d layers", settings.shape, count, full_layers)
        folder = Path(tempfile.mkdtemp(prefix="versatune-bench-"))
        try:
            config = bench_config(settings, count, folder)
            opened = open_bench_run(config, settings, device)
            try:
                if not ceiling:
                    ceiling = matmul_ceiling(config, settings, device)
                measured.append(measure(opened, settings, ceiling["tflops"]))
                used = describe_settings(settings, opened)
                peak = opened.peak_tflops
            finally:
                opened.close()
                opened.engine.deepspeed.destroy()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        del opened
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    whole = shape_of(settings.shape)
    ratio = total_parameters(settings.shape) / total_parameters(settings.shape, layers[-1])
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "environment": environment,
        "settings": used,
        "peak_tflops": peak,
        "matmul_ceiling": ceiling,
        "slices": measured,
        "full_model": full_model(
            measured,
            whole,
            ratio,
            distributed.world_size(),
            peak_tflops=peak,
            ceiling_tflops=ceiling["tflops"],
        ),
    }


def measure(run: Run, settings: BenchSettings, ceiling_tflops: float) -> dict[str, Any]:
    """All numbers of one slice; a collective."""
    stepper = Stepper(run)
    with contextlib.ExitStack() as stack:
        if settings.metrics == "off":
            stack.enter_context(without_statistics(run))
        stepper.take(settings.warmup_steps)
        if run.engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timed = stepper.take(settings.steps)
        peak_gib = peak_memory_gib()
        split = split_times(run, stepper, settings.split_steps)
        update = update_times(run, stepper, float(np.mean(timed.step_s)))
    compared = compare_statistics(run, stepper, settings.steps) if settings.metrics == "both" else None

    everyone: list[Any] = [None] * distributed.world_size()
    mine = {"step_s": timed.step_s, "peak": peak_gib, "split": split, "seconds": timed.seconds}
    dist.all_gather_object(everyone, mine)
    step_s = np.max([rank["step_s"] for rank in everyone], axis=0)  # a step lasts as long as its slowest rank
    seconds = max(rank["seconds"] for rank in everyone)
    totals = timed.totals()
    return {
        "layers": run.shape.num_layers,
        "num_parameters": parameter_counts(run.engine.model)[0],
        "steps": settings.steps,
        "skipped_steps": timed.skipped,
        "seconds": seconds,
        "step_s": spread(list(step_s)),
        "tokens_per_step": {
            name: total / settings.steps for name, total in totals.items() if name != "flops"
        },
        **rates(
            totals,
            totals["flops"],
            seconds,
            distributed.world_size(),
            peak_tflops=run.peak_tflops,
            ceiling_tflops=ceiling_tflops,
        ),
        "peak_memory_gib": max(rank["peak"] for rank in everyone),
        "split_s": {name: float(np.mean([rank["split"][name] for rank in everyone])) for name in PHASES},
        "split_steps": settings.split_steps,
        "weight_update": update,
        "statistics_off": compared,
    }


# --- steps --------------------------------------------------------------------------------------------------


class TimedSteps(NamedTuple):
    """What a number of steps took and did."""

    seconds: float
    """Wall time from the first to the end of the last, the device included."""
    step_s: list[float]
    """Between the ends of consecutive steps on this rank."""
    plans: list[StepPlan]
    flops: float
    skipped: int
    """Steps without an optimizer step; known on rank 0."""

    def totals(self) -> dict[str, float]:
        """Tokens, squared lengths and FLOPs over all ranks."""
        return {
            "real": sum(plan.tokens for plan in self.plans),
            "slot": sum(plan.num_packs * plan.pack_len for plan in self.plans),
            "supervised": sum(plan.supervised_tokens for plan in self.plans),
            "sum_squared_lengths": sum(squared_lengths(plan) for plan in self.plans),
            "flops": self.flops,
        }


class Stepper:
    """Takes steps of a run, one after the other, and keeps what they were."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.done = 0
        self._stop = StopRequest()

    def take(self, count: int) -> TimedSteps:
        """`count` steps of the trainer."""
        run, records = self.run, getattr(self.run.sinks, "records", [])
        first_record = len(records)
        step_s, plans = [], []
        self.synchronise()
        started = ended = time.perf_counter()
        for _ in range(count):
            run_step(run, self.done, self._stop)
            self.done += 1
            now = time.perf_counter()
            step_s.append(now - ended)
            ended = now
            plans.append(run.loader.last_plan)  # type: ignore[attr-defined]
        self.synchronise()
        seconds = time.perf_counter() - started
        reasons = [record.skip_reason for record in records[first_record:] if record.skipped]
        if reasons:
            log.warning(
                "%d of %d steps were skipped (%s)", len(reasons), count, ", ".join(sorted(set(reasons)))
            )
        flops = sum(plan_flops(plan, run.shape) for plan in plans)
        return TimedSteps(seconds, step_s, plans, flops, len(reasons))

    def synchronise(self) -> None:
        """Wait for the device and for all ranks."""
        if self.run.engine.device.type == "cuda":
            torch.cuda.synchronize()
        distributed.barrier()


def plan_flops(plan: StepPlan, shape: ModelShape) -> float:
    """Useful work of a step, as in metrics.jsonl."""
    return step_flops(
        shape,
        real_tokens=plan.tokens,
        supervised_tokens=plan.supervised_tokens,
        sum_squared_lengths=squared_lengths(plan),
    )


def squared_lengths(plan: StepPlan) -> int:
    """Sum over samples of their length squared."""
    return sum(int((pack.lengths.astype(np.int64) ** 2).sum()) for pack in plan.packs)


class RecordingLoader(StepLoader):
    """The loader, remembering the last plan it handed out."""

    last_plan: StepPlan

    def take(self, weights: Any) -> Any:
        """As `StepLoader.take`."""
        plan, batches = super().take(weights)
        self.last_plan = plan
        return plan, batches


class RecordingSinks(Sinks):
    """Keeps the records of steps in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        """Keep a record."""
        self.records.append(record)


def split_times(run: Run, stepper: Stepper, count: int) -> dict[str, float]:
    """Median seconds of each phase over `count` steps on this rank."""
    steps = []
    with timed_phases(run) as watch:
        for _ in range(count):
            took = stepper.take(1)
            seconds = watch.seconds()
            steps.append(phases(took.step_s[0], run.loader.last_wait_s, seconds))
    return {name: float(np.median([step[name] for step in steps])) for name in PHASES}


def update_times(run: Run, stepper: Stepper, step_s: float) -> dict[str, Any]:
    """What an update of the domain weights costs, and how long the batch after it is waited for."""
    update_s, wait_s = [], []
    for _ in range(NUM_UPDATES):
        stepper.take(1)
        started = time.perf_counter()
        update_weights(run, stepper.done)
        update_s.append(time.perf_counter() - started)
        stepper.take(1)
        wait_s.append(run.loader.last_wait_s)
    every = run.config.weights.every_n_steps
    return {
        "update_s": float(np.median(update_s)),
        "data_wait_after_s": float(np.median(wait_s)),
        "every_n_steps": every,
        "share_of_steps": float(np.median(update_s)) / (every * step_s),
    }


def compare_statistics(run: Run, stepper: Stepper, count: int) -> dict[str, Any]:
    """`count` steps with and `count` steps without domain statistics, in alternation."""
    with_s, without_s = [], []
    for _ in range(count):
        with_s.append(stepper.take(1).seconds)
        with without_statistics(run):
            without_s.append(stepper.take(1).seconds)
    return {
        "step_s_with": spread(with_s),
        "step_s_without": spread(without_s),
        "ratio": float(np.median(with_s) / np.median(without_s)),
    }


# --- what is run --------------------------------------------------------------------------------------------


class SyntheticSamples:
    """A domain of random samples in the shape of a token cache; sample i is the same on every rank.

    Lengths are log-normal with a long tail (median 150 to 600 tokens by domain, one sample in seven from the
    tail); the last tokens of a sample have labels.
    """

    def __init__(self, domain: int, vocab_size: int, pack_len: int, supervised: float) -> None:
        rng = np.random.default_rng(domain)
        body = rng.lognormal(5.0 + 0.25 * domain, 0.8, SYNTHETIC_SAMPLES)
        tail = rng.lognormal(7.5, 1.2, SYNTHETIC_SAMPLES)
        chosen = np.where(rng.random(SYNTHETIC_SAMPLES) < 1 / 7, tail, body)
        self.lengths = chosen.clip(8, pack_len).astype(np.int32)
        wanted = np.round(self.lengths * supervised)
        self.supervised = wanted.clip(1, self.lengths - 1).astype(np.int32)
        self.fingerprint = f"synthetic {domain} {vocab_size} {pack_len} {supervised}"
        self._domain, self._vocab_size = domain, vocab_size

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens uint32[n] and mask bool[n]."""
        length = int(self.lengths[index])
        rng = np.random.default_rng((self._domain, index))
        tokens = rng.integers(0, self._vocab_size, length).astype(np.uint32)
        mask = np.arange(length) >= length - self.supervised[index]
        return tokens, mask

    def source_of(self, index: int) -> tuple[str, int]:
        """Where a sample comes from, for messages about losses that are not finite."""
        return "synthetic", index + 1


def bench_config(settings: BenchSettings, layers: int, folder: Path) -> Config:
    """A run's settings for the benchmark; `overrides` win over everything."""
    names = list(DOMAINS)
    domains: dict[str, Any] = {"names": names}
    if settings.data is not None:
        given = load_config(settings.data)
        names = given.domains.names
        domains = given.domains.model_dump(mode="json")
    model = write_model_folder(folder / "model", settings.shape, layers)
    deepspeed: Any = {"zero_optimization": {"stage": settings.zero_stage}}
    raw = {
        "run": {"dir": str(folder / "run")},
        "model": {
            "source": str(model),
            "weights": "random",
            "dtype": settings.dtype,
            "activation_checkpointing": settings.activation_checkpointing,
        },
        "data": {"train": [{"path": "synthetic", "domain": names[0]}]},
        "domains": domains,
        # weights that move with the losses: a random model is above this reference in every domain
        "weights": {"strategy": "fostering", "reference": dict.fromkeys(names, 1.0)},
        "batch": {
            "pack_len": settings.pack_len,
            "packs_per_step": settings.packs_per_rank * distributed.world_size(),
        },
        "optimizer": {"schedule": "constant"},
        "train": {"max_steps": 10**6},
        "deepspeed": deepspeed if settings.deepspeed is None else str(settings.deepspeed),
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load_config(path, list(settings.overrides))


def open_bench_run(config: Config, settings: BenchSettings, device: torch.device) -> Run:
    """A run like `engine.run.open_run` makes, without a folder, evaluation or checkpoints."""
    table = DomainTable(config.domains.names)
    check_world_size(config.batch.packs_per_step, distributed.world_size())
    vocab_size = shape_config(settings.shape)["vocab_size"]
    sources: list[Any] = [
        SyntheticSamples(i, vocab_size, config.batch.pack_len, settings.supervised) for i in range(len(table))
    ]
    if settings.data is not None:
        sources = open_caches(load_config(settings.data), config_path=settings.data)["train"]
        check_tokens(sources, vocab_size, settings)
    corpus = Corpus.from_caches(sources, table.names)
    planner = planner_settings(config, table)
    corpus.check(planner)
    reference = load_reference(config.weights.reference, table)
    controller = WeightController(table, config.domains, config.weights, reference)
    engine = build_engine(config, device)
    loader = RecordingLoader(
        corpus,
        sources,
        planner,
        PlannerState.initial(len(table)),
        distributed.rank(),
        distributed.world_size(),
        pad_id=0,
        pin_memory=device.type == "cuda",
    )
    return Run(
        config=config,
        table=table,
        corpus=corpus,
        caches=sources,
        engine=engine,
        loader=loader,
        controller=controller,
        statistics=StepStatistics(len(table), device),
        saver=Saver(config.run.dir, config.checkpoint, engine),
        held_out=None,
        probe=None,
        tokenizer=None,
        sinks=RecordingSinks(),
        progress=Progress(config.train.max_steps or 0, table.names, is_main=False),
        shape=ModelShape.from_config(engine.model.lm.config, parameter_counts(engine.model)[1]),
        peak_tflops=config.metrics.peak_tflops or peak_tflops(describe_hardware(device)["device"]),
        total_steps=config.train.max_steps or 0,
        first_step=0,
        skipped_in_a_row=0,
        spikes=SpikeGuard(None, 1),
        early_stopping=EarlyStopping(None),
    )


def check_tokens(caches: list[Any], vocab_size: int, settings: BenchSettings) -> None:
    """Raise DataError when prepared data has tokens that the shape's embedding does not."""
    for cache in caches:
        if cache is None or not len(cache):
            continue
        largest = max(int(cache.sample(i)[0].max()) for i in range(len(cache)))
        if largest >= vocab_size:
            raise DataError(
                f"{settings.data}: domain {cache.domain} has the token id {largest}, {settings.shape} has "
                f"{vocab_size} tokens; take a shape with the vocabulary of the data's tokenizer"
            )


def shape_of(name: str) -> ModelShape:
    """The FLOPs shape of a whole named model."""
    shape = shape_config(name)
    return ModelShape(
        num_parameters_nonembedding=nonembedding_parameters(name),
        num_layers=shape["num_hidden_layers"],
        attention_width=shape["hidden_size"],
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
    )


# --- where it runs ------------------------------------------------------------------------------------------


def matmul_ceiling(config: Config, settings: BenchSettings, device: torch.device) -> dict[str, Any]:
    """The fastest matrix product of one rank in the run's dtype: the model's MLP product, or a square one."""
    shape = shape_config(settings.shape)
    cuda = device.type == "cuda"
    square = 8192 if cuda else 512
    warmups, runs = (10, 30) if cuda else (1, 5)
    best: dict[str, Any] = {"tflops": 0.0}
    products = [(config.batch.pack_len, shape["hidden_size"], shape["intermediate_size"]), (square,) * 3]
    for m, k, n in products:
        a = torch.randn(m, k, device=device).to(DTYPES[config.model.dtype])
        b = torch.randn(n, k, device=device).to(DTYPES[config.model.dtype])
        seconds = []
        for i in range(warmups + runs):
            watch = Stopwatch(device)
            with watch.span("product"):
                torch.mm(a, b.T)
            if i >= warmups:
                seconds.append(watch.seconds()["product"])
        tflops = 2 * m * k * n / float(np.median(seconds)) / 1e12
        if tflops > best["tflops"]:
            best = {"tflops": tflops, "m": m, "k": k, "n": n, "runs": runs, "dtype": config.model.dtype}
    return best


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Date, hardware, versions, commit and load at the start."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": distributed.world_size(),
        **describe_hardware(device),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "versions": describe_versions(),
        "commit": git_commit(),
    }


def describe_settings(settings: BenchSettings, run: Run) -> dict[str, Any]:
    """What was in force, overrides included."""
    from versatune_kernels import resolve_backend

    config = run.config
    return {
        "shape": settings.shape,
        "layers": list(settings.layers),
        "pack_len": config.batch.pack_len,
        "packs_per_rank": config.batch.packs_per_step // distributed.world_size(),
        "dtype": config.model.dtype,
        "zero_stage": zero_stage(run.engine.settings),
        "activation_checkpointing": config.model.activation_checkpointing,
        "attention": run.engine.attention.implementation,
        "loss_backend": resolve_backend(config.model.loss_backend, run.engine.device.type).name,
        "data": "synthetic" if settings.data is None else str(settings.data),
        "supervised": settings.supervised if settings.data is None else None,
        "metrics": settings.metrics,
        "overrides": list(settings.overrides),
    }


def check_settings(settings: BenchSettings) -> None:
    """Raise ConfigError for what cannot be measured, before anything is started."""
    for layers in settings.layers or (None,):
        shape_config(settings.shape, layers)
    if settings.steps < 1 or settings.split_steps < 1 or settings.warmup_steps < 0:
        raise ConfigError("bench: steps and split steps must be >= 1, warm-up steps >= 0")
    if not 0 < settings.supervised <= 1:
        raise ConfigError(f"bench: --supervised is a share above 0 and up to 1, not {settings.supervised}")
