"""From the runs of a comparison to rates, ratios, checks and the table. Pure functions.

Ratios are of runs of the same round: of tokens a second, and of tokens a second of CPU time. Other work on
the machine disturbs the latter less; it leaves out TRL's loader processes, and on a GPU it is the host's work
alone.

MFU stands in both conventions (`observability.throughput`). Of ceiling: useful work over the fastest matrix
product measured in the same command. Padding: the share of computed positions that are no tokens; TRL
computes none, ours fills packs up.

What is not covered: where the runs come from (`comparison`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from versatune_ds.apps.bench.results import rates, work
from versatune_ds.apps.bench.shapes import find_shape
from versatune_ds.apps.evidence.cases import ARMS, TrainingCase
from versatune_ds.report.measures import percent
from versatune_ds.report.page import Table, table_to_markdown

INIT_STD = 0.02
"""Of random weights, as transformers draws them."""
FIRST_LOSS_TOLERANCE = 0.3
CURVE_TOLERANCE = 0.03
"""Largest relative difference of two arms' losses at a step: they see other samples."""


def compare(case: TrainingCase, runs: Sequence[dict[str, Any]], peak: float | None) -> dict[str, Any]:
    """What the runs of a case amount to so far.

    Args:
        peak: datasheet peak of the card in TFLOP/s, or None.

    Returns:
        `arms` (rates of each), `ratios` (ours over each other arm, round by round) and `checks`.
    """
    measured = [run for run in runs if run["status"] == "measured"]
    ceiling = next((r["matmul_ceiling"]["tflops"] for r in measured if "matmul_ceiling" in r), None)
    by_arm = {arm.name: [run for run in measured if run["arm"] == arm.name] for arm in ARMS}
    arms = {name: arm_rates(case, own, peak, ceiling) for name, own in by_arm.items() if own}
    ratios = {}
    for name in by_arm:
        pairs = [
            (tokens_per_s(a) / tokens_per_s(b), tokens_per_s(a, "cpu_s") / tokens_per_s(b, "cpu_s"))
            for a in by_arm["ours"]
            for b in by_arm[name]
            if a["round"] == b["round"]
        ]
        if name != "ours" and pairs:
            memory = arms["ours"]["peak_gib"] / arms[name]["peak_gib"]
            walls, cpus = map(list, zip(*pairs, strict=True))
            ratios[name] = {
                "pairs": walls,
                "tokens_per_s": statistics.median(walls),
                "cpu_pairs": cpus,
                "tokens_per_cpu_s": statistics.median(cpus),
                "peak_memory": memory,
            }
    return {"arms": arms, "ratios": ratios, "checks": checks(case, by_arm), "matmul_ceiling_tflops": ceiling}


def tokens_per_s(run: dict[str, Any], clock: str = "seconds") -> float:
    """Real tokens a second of a run, or of CPU time ("cpu_s")."""
    return float(run["tokens"]["real"] / run[clock])


def arm_rates(
    case: TrainingCase, runs: Sequence[dict[str, Any]], peak: float | None, ceiling: float | None
) -> dict[str, Any]:
    """Medians over an arm's runs; a share of useful FLOPs is None where its base is not known."""
    shape = dataclasses.replace(find_shape(case.shape), layers=case.layers)
    bounds = {"peak_tflops": peak, "ceiling_tflops": ceiling}
    each = [
        rates(run["tokens"], work(shape, run["tokens"], case.pack_len), run["seconds"], 1, **bounds)
        for run in runs
    ]

    def middle(name: str) -> float | None:
        known = [found[name] for found in each if found[name] is not None]
        return statistics.median(known) if known else None

    profile = next((run["profile"] for run in runs if "profile" in run), None)
    return {
        "runs": len(runs),
        "real_tokens_per_s": statistics.median(map(tokens_per_s, runs)),
        "step_s": statistics.median(run["seconds"] / case.steps for run in runs),
        "achieved_tflops": middle("achieved_tflops_per_rank"),
        "mfu": middle("mfu"),
        "mfu_6n": middle("mfu_6n"),
        "of_ceiling": middle("ratio_to_matmul_ceiling"),
        "peak_gib": statistics.median(run["peak_gib"] for run in runs),
        "padding": 1 - sum(r["tokens"]["real"] for r in runs) / sum(r["tokens"]["slot"] for r in runs),
        "idle": None if profile is None else profile["idle"],
        "attention": runs[0]["attention"],
        "liger": runs[0]["liger"],
    }


def checks(case: TrainingCase, by_arm: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Whether the arms did the same work: by their losses.

    Random weights of standard deviation s give logits of variance H s^2, a first loss of ln V + H s^2 / 2.
    """
    shape = find_shape(case.shape)
    expected = math.log(shape.vocab) + shape.hidden * INIT_STD**2 / 2
    curves = {name: runs[0]["losses"] for name, runs in by_arm.items() if runs}
    firsts = {name: losses[0] for name, losses in curves.items()}
    apart = [
        abs(a - b) / b
        for losses in curves.values()
        for a, b in zip(losses, next(iter(curves.values())), strict=False)
    ]
    return {
        "ln_v": math.log(shape.vocab),
        "expected_first_loss": expected,
        "first_loss": firsts,
        "first_loss_holds": all(abs(first - expected) <= FIRST_LOSS_TOLERANCE for first in firsts.values()),
        "curves": curves,
        "largest_difference": max(apart, default=0.0),
        "curves_agree": max(apart, default=0.0) <= CURVE_TOLERANCE,
        "losses_fall": all(losses[-1] < losses[0] for losses in curves.values()),
        "arms_compared": len(curves),
    }


COLUMNS = (
    "arm", "runs", "real tokens/s", "MFU", "MFU 6N", "of ceiling", "peak GiB", "padding", "idle", "attention",
    "Liger",
)  # fmt: skip


def summary_lines(results: dict[str, Any]) -> list[str]:
    """A table for each case, with ratios and checks below it."""
    lines = []
    for kept in results["cases"]:
        case, found = kept["case"], kept["checks"]
        lines += [
            f"{case['shape']}, {case['layers']} layers, {case['packs']} packs of {case['pack_len']} a step, "
            f"{case['dtype']}, recompute {case['recompute']}:",
            "",
            *table_to_markdown(
                Table(COLUMNS, [(arm.name, _cells(kept, arm.name)) for arm in ARMS])
            ).splitlines(),
            "",
        ]
        for name, ratio in kept["ratios"].items():
            pairs, cpu = (", ".join(f"{p:.3f}" for p in ratio[key]) for key in ("pairs", "cpu_pairs"))
            lines.append(
                f"ours / {name}: {ratio['tokens_per_s']:.3f} of its tokens/s (pairs {pairs}); "
                f"{ratio['tokens_per_cpu_s']:.3f} per CPU second ({cpu}); "
                f"{ratio['peak_memory']:.3f} of its peak memory"
            )
        firsts = ", ".join(f"{name} {first:.3f}" for name, first in found["first_loss"].items())
        lines.append(
            f"first loss {firsts or 'none'}; expected {found['expected_first_loss']:.3f} (ln V "
            f"{found['ln_v']:.3f}): {_verdict(found['first_loss_holds'])}; curves differ by at most "
            f"{found['largest_difference']:.2%}: {_verdict(found['curves_agree'])}; losses fall: "
            f"{_verdict(found['losses_fall'])}"
        )
        lines.append("")
    return lines


def _cells(kept: dict[str, Any], arm: str) -> list[str]:
    if arm not in kept["arms"]:
        reason = next(run["reason"] for run in kept["runs"] if run["arm"] == arm)
        return ["0", reason, *[""] * (len(COLUMNS) - 3)]
    found = kept["arms"][arm]
    return [
        str(found["runs"]),
        f"{found['real_tokens_per_s']:.0f}",
        *(percent(found[name]) for name in ("mfu", "mfu_6n", "of_ceiling")),
        f"{found['peak_gib']:.2f}",
        *(percent(found[name]) for name in ("padding", "idle")),
        found["attention"],
        found["liger"],
    ]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"
