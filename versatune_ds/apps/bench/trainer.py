"""End-to-end throughput of the trainer's own step, on random weights of a named shape.

    matrix-product ceiling -> model -> dry run -> warm up -> steps on the clock
            -> steps with every phase timed -> weight updates
            -> steps with and without domain statistics, in alternation

The steps are `engine.train.run_step` on a run like any other; nothing of the loop is written a second time.
Throughput is tokens over wall time between two synchronisations around many steps. The split into phases puts
CUDA events (on a CPU: clock readings) around the phases of `run_step`. It adds a barrier before the
step's all-reduce, so that waiting for slower ranks is told apart from it, and a synchronisation at the end of
the step; it is therefore measured in steps of its own, which are not in the throughput.

Phases: data_wait (the loader made the loop wait), forward (without the head), loss (the head's forward, which
with the fused backends computes its gradients too), backward, optimizer, statistics (adding and reducing the
domain sums), rank_wait, and other (copies, records, what the phases leave).

What is not covered: evaluation and checkpoints (not part of a step), the quality of what is trained, and
which slices are measured, each in a process of its own (`apps/bench/slices.py`).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from versatune_ds.apps.bench.phases import SplitRecorder, clock_of, split, without_statistics
from versatune_ds.apps.bench.results import PHASES, rates, spread, work
from versatune_ds.apps.bench.samples import random_samples
from versatune_ds.apps.bench.settings import BenchSettings, bench_config
from versatune_ds.apps.bench.shapes import shape_config, write_model_folder
from versatune_ds.config.load import load_config
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.plan.planner import StepPlan
from versatune_ds.engine.backend.deepspeed_backend import build_backend
from versatune_ds.engine.backend.parameters import parameter_counts
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.faults.heartbeat import Heartbeat
from versatune_ds.engine.faults.signals import StopRequest
from versatune_ds.engine.model.source import DTYPES
from versatune_ds.engine.phases import DATA_WAIT, WEIGHT_UPDATE, Recorder, phase, recording, timed
from versatune_ds.engine.preflight.dry_run import dry_run_when_asked
from versatune_ds.engine.prepared import prepare_on_samples
from versatune_ds.engine.provenance import describe_hardware, describe_versions
from versatune_ds.engine.run import Components, assemble
from versatune_ds.engine.state import TrainState
from versatune_ds.engine.train import run_step, update_weights
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.machine import describe_host
from versatune_ds.observability.progress import Progress
from versatune_ds.observability.records import StepRecord
from versatune_ds.observability.sinks import Sinks
from versatune_ds.observability.throughput import peak_memory_gib, reset_peak, synchronise

log = get_logger(__name__)

NUM_UPDATES = 3


def bench_slice(settings: BenchSettings, layers: int) -> dict[str, Any]:
    """Measure the first `layers` layers; every rank calls it, in a process without a group.

    Returns:
        `slice` (the numbers), and `environment`, `settings` in force, `peak_tflops`. Complete on rank 0.

    Raises:
        VersaTuneError: settings or data that cannot be used, out of memory in the dry run, a lost rank.
    """
    with tempfile.TemporaryDirectory(prefix="versatune-bench-") as name:
        folder = Path(name)
        model = write_model_folder(folder / "model", settings.shape, layers)
        config = bench_config(settings, str(model), folder / "run")
        device = start_process_group(config.run.collective_timeout_s)
        environment = {
            **describe_host(()),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": distributed.world_size(),
            **describe_hardware(device),
            "threads": torch.get_num_threads(),
            "versions": describe_versions(),
        }
        ceiling = matmul_ceiling(config, settings, device)
        with Heartbeat(config.run.hang_timeout_s):
            run = open_bench_run(config, settings, device)
            try:
                measured = measure(run, settings, ceiling["tflops"])
            finally:
                run.close()
    in_force = describe_settings(settings, run)
    close_process_group()
    return {
        "environment": environment,
        "settings": in_force,
        "peak_tflops": run.peak_tflops,
        "slice": {**measured, "matmul_ceiling": ceiling},
    }


def measure(run: Components, settings: BenchSettings, ceiling_tflops: float) -> dict[str, Any]:
    """All numbers of one slice; a collective."""
    stepper = Stepper(run)
    with contextlib.ExitStack() as stack:
        if settings.metrics == "off":
            stepper.run = stack.enter_context(without_statistics(run))
        stepper.take(settings.warmup_steps)
        reset_peak(run.backend.device)
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
        "layers": run.shape.layers,
        "num_parameters": parameter_counts(run.backend.model)[0],
        "steps": settings.steps,
        "skipped_steps": timed.skipped,
        "seconds": seconds,
        "step_s": spread(list(step_s)),
        "tokens_per_step": {name: total / settings.steps for name, total in totals.items()},
        **rates(
            totals,
            work(run.shape, totals, run.config.batch.pack_len),
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


class TimedSteps(NamedTuple):
    seconds: float
    """Wall time from the first to the end of the last, the device included."""
    step_s: list[float]
    """Between the ends of consecutive steps on this rank."""
    plans: list[StepPlan]
    skipped: int
    """Steps without an optimizer step; known on rank 0."""

    def totals(self) -> dict[str, float]:
        """Tokens and squared lengths over all ranks."""
        return {
            "real": sum(plan.tokens for plan in self.plans),
            "slot": sum(plan.num_packs * plan.pack_len for plan in self.plans),
            "supervised": sum(plan.supervised_tokens for plan in self.plans),
            "sum_squared_lengths": sum(plan.sum_squared_lengths for plan in self.plans),
        }


class Stepper:
    """Takes steps of a run, one after the other, and keeps what they were."""

    def __init__(self, run: Components) -> None:
        self.run = run
        self.done = 0
        self._stop = StopRequest()

    def take(self, count: int) -> TimedSteps:
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
            assert run.loader.last_plan is not None
            plans.append(run.loader.last_plan)
        self.synchronise()
        seconds = time.perf_counter() - started
        reasons = [record.skip_reason for record in records[first_record:] if record.skipped]
        if reasons:
            log.warning(
                "%d of %d steps were skipped (%s)", len(reasons), count, ", ".join(sorted(set(reasons)))
            )
        return TimedSteps(seconds, step_s, plans, len(reasons))

    def synchronise(self) -> None:
        """Wait for the device and for all ranks."""
        synchronise(self.run.backend.device)
        distributed.barrier()


class RecordingSinks(Sinks):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[StepRecord] = []

    def step(self, record: StepRecord) -> None:
        self.records.append(record)


def split_times(run: Components, stepper: Stepper, count: int) -> dict[str, float]:
    """Median seconds of each phase over `count` steps on this rank."""
    steps = []
    for _ in range(count):
        with recording(SplitRecorder(clock_of(run.backend.device))) as recorder:
            took = stepper.take(1)
        steps.append(split(took.seconds, recorder.own_seconds()))
    return {name: float(np.median([step[name] for step in steps])) for name in PHASES}


def update_times(run: Components, stepper: Stepper, step_s: float) -> dict[str, Any]:
    """What an update of the domain weights costs, and how long the batch after it is waited for."""
    update_s, wait_s = [], []
    for _ in range(NUM_UPDATES):
        stepper.take(1)
        with recording() as recorder, phase(WEIGHT_UPDATE, stepper.done):
            update_weights(run, stepper.done)
        update_s.append(recorder.seconds(WEIGHT_UPDATE))
        with recording() as recorder:
            stepper.take(1)
        wait_s.append(recorder.seconds(DATA_WAIT))
    every = run.config.weights.interval(run.prepared.total_steps)
    return {
        "update_s": float(np.median(update_s)),
        "data_wait_after_s": float(np.median(wait_s)),
        "every_n_steps": every,
        "share_of_steps": float(np.median(update_s)) / (every * step_s),
    }


def compare_statistics(run: Components, stepper: Stepper, count: int) -> dict[str, Any]:
    """`count` steps with and `count` steps without domain statistics, in alternation."""
    with_s, without_s = [], []
    for _ in range(count):
        with_s.append(stepper.take(1).seconds)
        with without_statistics(run) as stepper.run:
            without_s.append(stepper.take(1).seconds)
        stepper.run = run
    return {
        "step_s_with": spread(with_s),
        "step_s_without": spread(without_s),
        "ratio": float(np.median(with_s) / np.median(without_s)),
    }


def open_bench_run(config: Config, settings: BenchSettings, device: torch.device) -> Components:
    """A run on given samples, without a folder, evaluation or checkpoints."""
    vocab_size = shape_config(settings.shape)["vocab_size"]
    samples: list[Any] = [
        random_samples(i, vocab_size, config.batch.pack_len, settings.supervised)
        for i in range(len(config.domains.names))
    ]
    if settings.data is not None:
        samples = open_caches(load_config(settings.data))["train"]
        check_tokens(samples, vocab_size, settings)
    return open_run_on(config, samples, device)


def open_run_on(config: Config, samples: list[Any], device: torch.device) -> Components:
    """A run on these samples, one source a domain in table order; as `open_bench_run` opens it."""
    prepared = prepare_on_samples(config, samples)
    backend = build_backend(config, prepared.deepspeed, prepared.ranks, device)
    dry_run_when_asked(backend, config)
    silent = Progress(prepared.total_steps, prepared.table.names, is_main=False)
    return assemble(prepared, backend, TrainState.of(prepared, None), RecordingSinks(), silent)


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
            with recording(Recorder(clock_of(device))) as recorder, timed("product"):
                torch.mm(a, b.T)
            if i >= warmups:
                seconds.append(recorder.seconds("product"))
        tflops = 2 * m * k * n / float(np.median(seconds)) / 1e12
        if tflops > best["tflops"]:
            best = {"tflops": tflops, "m": m, "k": k, "n": n, "runs": runs, "dtype": config.model.dtype}
    return best


def describe_settings(settings: BenchSettings, run: Components) -> dict[str, Any]:
    """What was in force, overrides included."""
    from versatune_kernels import resolve_backend

    config = run.config
    return {
        "shape": settings.shape,
        "pack_len": config.batch.pack_len,
        "packs_per_rank": config.batch.packs_per_step // distributed.world_size(),
        "dtype": config.model.dtype,
        "zero_stage": run.backend.layout["ZeRO stage"],
        "zero_optimization": run.prepared.deepspeed["zero_optimization"],
        "activation_checkpointing": config.model.activation_checkpointing,
        "attention": run.backend.attention.implementation,
        "loss_backend": resolve_backend(config.model.loss_backend, run.backend.device.type).name,
        "data": settings.data or "synthetic",
        "supervised": settings.supervised if settings.data is None else None,
        "metrics": settings.metrics,
        "overrides": list(settings.overrides),
    }
