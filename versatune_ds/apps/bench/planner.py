"""Measure the planner: packing efficiency, shares, waiting, modelled idle time, speed. No model, no GPU.

    python -m versatune_ds.apps.bench.planner --synthetic
    python -m versatune_ds.apps.bench.planner --raw law.jsonl finance.parquet    # 4 characters a token
    python -m versatune_ds.apps.bench.planner --caches cache/KEY/law cache/KEY/finance   # exact lengths
    python -m versatune_ds.apps.bench.planner --scale 100_000_000 --ranks 1024 --packs-per-step 4096

One file or cache folder per domain. Prints a Markdown table; every row is `--steps` planned steps. `--scale`
maps so many synthetic lengths from files, as token caches do, and adds what every rank and the reduction of
domain sums cost, and the memory of the process.

What is not covered: reading tokens and collating, the time of a training step, and the network.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet

from versatune_ds.apps.bench.samples import domain_lengths
from versatune_ds.data.plan import packing
from versatune_ds.data.plan.balance import modelled_idle, quadratic_tokens, rank_packs
from versatune_ds.data.plan.corpus import WEIGHT_UNITS, Corpus, PlannerSettings
from versatune_ds.data.plan.planner import StepPlan, plan_step
from versatune_ds.data.plan.state import PlannerState
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.observability.throughput import peak_memory_gib

CHARACTERS_PER_TOKEN = 4
SCALE_BLOCK = 1_000_000
MIB = 1 << 20
QUADRATIC_TOKENS = quadratic_tokens(6_500_000_000, 28, 3584)
"""Of a 7B model: attention costs as much as its linear layers at 64.8 k tokens."""
COLUMNS = (
    "tokens a pack", "packs a step", "unit", "efficiency", "worst step", "furthest from target, units",
    "trained shares off by", "longest wait", "most carried over", "idle", "idle, shuffled", "samples/CPU s",
)  # fmt: skip


def count_characters(value: Any) -> int:
    """Characters of all strings in a row, however nested; keys are not counted."""
    if isinstance(value, dict | list):
        return sum(map(count_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def raw_lengths(path: Path) -> np.ndarray:
    """Estimated tokens of each row of a JSONL, JSON or Parquet file."""
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        text = path.read_text("utf-8")
        lines = [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
    return np.array([max(8, count_characters(row) // CHARACTERS_PER_TOKEN) for row in rows], dtype=np.int32)


def load(args: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
    """(lengths, supervised) per domain; estimated lengths count half of each sample as supervised."""
    if args.caches:
        from versatune_ds.data.cache.cache import TokenCache

        return [(cache.lengths, cache.supervised) for cache in map(TokenCache.open, args.caches)]
    lengths = [raw_lengths(path) for path in args.raw or ()] or [domain_lengths(d, 20_000) for d in range(6)]
    return [(n, n // 2) for n in lengths]


def row(corpus: Corpus, settings: PlannerSettings, weights: np.ndarray, num_steps: int, ranks: int) -> str:
    """Plan `num_steps` steps and sum them up in a line of the table."""
    plans, seconds = zip(*planned(corpus, settings, weights, num_steps), strict=True)
    state = plans[-1].state_after
    idle = shuffled = "-"
    if settings.packs_per_step % ranks == 0:
        rng = np.random.default_rng(0)
        orders = [[p.packs[i] for i in rng.permutation(p.num_packs)] for p in plans]
        idle = mean_idle([p.packs for p in plans], ranks, settings)
        shuffled = mean_idle(orders, ranks, settings)
    efficiency = [plan.efficiency for plan in plans]
    off = max(np.abs(plan.state_after.credit).max() for plan in plans)
    trained = getattr(state.trained.shares(), settings.weight_unit)
    return cells(
        settings.pack_len, settings.packs_per_step, settings.weight_unit, f"{np.mean(efficiency):.3%}",
        f"{min(efficiency):.3%}", f"{off:.2f}", f"{np.abs(trained - weights).max():.4%}",
        max(p.max_wait_steps for p in plans), max(len(p.state_after.carry) for p in plans), idle, shuffled,
        f"{sum(state.drawn.samples) / sum(seconds) / 1000:.0f} k",
    )  # fmt: skip


def planned(
    corpus: Corpus, settings: PlannerSettings, weights: np.ndarray, num_steps: int
) -> Iterator[tuple[StepPlan, float]]:
    """Plan after plan, each with its CPU seconds."""
    state = PlannerState.initial(len(weights))
    for _ in range(num_steps):
        start = time.process_time()
        plan = plan_step(corpus, settings, state, weights)
        yield plan, time.process_time() - start
        state = plan.state_after


def mean_idle(steps: Sequence[Sequence[packing.Pack]], ranks: int, settings: PlannerSettings) -> str:
    model = functools.partial(modelled_idle, pack_len=settings.pack_len, quadratic_tokens=QUADRATIC_TOKENS)
    return f"{np.mean([model(packs, ranks) for packs in steps]):.2%}"


def cells(*values: object) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def mapped_lengths(folder: Path, domain: int, size: int, longest: int) -> np.ndarray:
    """`size` lengths <= `longest` in a file, written in blocks and mapped read-only."""
    path = folder / f"lengths-{domain}.int32"
    block = domain_lengths(domain, min(size, SCALE_BLOCK), longest)
    with open(path, "wb") as file:
        for start in range(0, size, len(block)):
            np.roll(block, start)[: size - start].tofile(file)
    return np.memmap(path, dtype=np.int32, mode="r")


def reduced_sums(plan: StepPlan, ranks: int, num_domains: int) -> tuple[DomainSums, DomainSums, float]:
    """(sums over all ranks one by one, sums over all samples at once, seconds per rank) on made-up losses."""
    loss = np.random.default_rng(0).gamma(2.0, 1.0, plan.num_samples)
    packs = [(pack.domains, pack.lengths // 2) for pack in plan.packs]
    ends = np.cumsum([len(domains) for domains, _ in packs])
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
        (domains, loss[end - len(domains) : end] * tokens, tokens)
        for (domains, tokens), end in zip(packs, ends, strict=True)
    ]
    start = time.process_time()
    total = DomainSums.zeros(num_domains)
    for rank in range(ranks):
        total += _sums(parts[rank::ranks], num_domains)
    seconds = (time.process_time() - start) / ranks
    return total, _sums(parts, num_domains), seconds


def _sums(packs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], num_domains: int) -> DomainSums:
    domains, losses, tokens = (np.concatenate(columns) for columns in zip(*packs, strict=True))
    return DomainSums.from_samples(domains, losses, tokens, num_domains)


def scale(args: argparse.Namespace, folder: Path) -> list[str]:
    """Plan for a large cluster over many samples; returns lines of Markdown."""
    pack_len, packs, k = args.pack_len[0], args.packs_per_step[0], 6
    lengths = [mapped_lengths(folder, d, args.scale // k, pack_len) for d in range(k)]
    corpus = Corpus(lengths, lengths, fingerprints=tuple(map(str, range(k))))
    settings = PlannerSettings(pack_len=pack_len, packs_per_step=packs, weight_unit=args.unit[0])
    weights = np.arange(1.0, k + 1) / sum(range(1, k + 1))
    started = time.process_time()
    corpus.check(settings)
    total_tokens = sum(corpus.num_tokens)
    opened_s = time.process_time() - started
    plan_s, idle, efficiency = [], [], []
    model = functools.partial(modelled_idle, pack_len=pack_len, quadratic_tokens=QUADRATIC_TOKENS)
    for plan, seconds in planned(corpus, settings, weights, args.steps):  # none is kept: they are large
        plan_s.append(seconds)
        idle.append(model(plan.packs, args.ranks))
        efficiency.append(plan.efficiency)
    drawn = sum(plan.state_after.drawn.samples)
    start = time.process_time()
    mine = rank_packs(plan.packs, args.ranks - 1, args.ranks)
    own_s = time.process_time() - start
    total, at_once, rank_s = reduced_sums(plan, args.ranks, k)
    error = np.abs(total.values / at_once.values - 1).max()
    now = psutil.Process().memory_info()  # shared: mapped files
    rows = {
        "samples, tokens": f"{sum(corpus.num_samples):,}, {total_tokens:,}",
        "ranks, packs a step, tokens a pack": f"{args.ranks:,}, {packs:,}, {pack_len:,}",
        "looking at all lengths once": f"{opened_s:.1f} CPU s",
        "planning a step, median": f"{np.median(plan_s):.2f} CPU s, {drawn / args.steps:,.0f} samples",
        "samples planned": f"{drawn / sum(plan_s) / 1000:.0f} k/CPU s",
        "efficiency, mean": f"{np.mean(efficiency):.3%}",
        "modelled idle time, mean": f"{np.mean(idle):.2%}",
        "a rank finds its packs": f"{own_s * 1e6:.0f} us CPU, {len(mine)} packs",
        "planner state as JSON": f"{len(json.dumps(plan.state_after.to_json())):,} bytes",
        "domain sums of a rank": f"{rank_s * 1e6:.0f} us CPU, {total.values.nbytes} bytes to reduce",
        "reduced over ranks against at once": f"{error:.1e} relative",
        "memory: peak resident": f"{1024 * (peak_memory_gib() or 0):,.0f} MiB",
        "memory at the end: private, mapped files": f"{(now.rss - now.shared) / MIB:,.0f}, "
        f"{now.shared / MIB:,.0f} MiB",
    }
    return [cells("what", "measured"), cells("---", "---"), *(cells(*row) for row in rows.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--synthetic", action="store_true", help="six domains of log-normal lengths")
    source.add_argument("--raw", nargs="+", type=Path, metavar="FILE", help="one raw file per domain")
    source.add_argument("--scale", type=int, metavar="SAMPLES", help="so many lengths from mapped files")
    source.add_argument("--caches", nargs="+", type=Path, metavar="FOLDER", help="one cache per domain")
    parser.add_argument("--pack-len", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--packs-per-step", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--unit", nargs="+", choices=WEIGHT_UNITS, default=["samples"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=64, help="world size of the idle time")
    parser.add_argument("--spread-fraction", type=int, default=packing.SPREAD_FRACTION)
    args = parser.parse_args()

    if args.scale:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(scale(args, Path(folder))))
        return
    packing.SPREAD_FRACTION = args.spread_fraction
    domains = load(args)
    weights = np.arange(1.0, len(domains) + 1) / sum(range(1, len(domains) + 1))
    print(cells(*COLUMNS), cells(*["---"] * len(COLUMNS)), sep="\n")
    for pack_len, packs, unit in itertools.product(args.pack_len, args.packs_per_step, args.unit):
        lengths = [np.minimum(n, pack_len) for n, _ in domains]
        corpus = Corpus(lengths, [np.minimum(s, n) for (_, s), n in zip(domains, lengths, strict=True)])
        settings = PlannerSettings(pack_len=pack_len, packs_per_step=packs, weight_unit=unit)
        print(row(corpus, settings, weights, args.steps, args.ranks), flush=True)


if __name__ == "__main__":
    main()
