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

from versatune_ds.apps.bench.shapes import find_shape
from versatune_ds.apps.evidence.cases import ARMS, TrainingCase
from versatune_ds.observability.throughput import TERA, mfu

INIT_STD = 0.02
"""Of random weights, as transformers draws them."""
FIRST_LOSS_TOLERANCE = 0.3
CURVE_TOLERANCE = 0.03
"""Largest relative difference of two arms' losses at a step: they see other samples."""


# --- numbers ------------------------------------------------------------------------------------------------


def compare(case: TrainingCase, runs: Sequence[dict[str, Any]], peak: float | None) -> dict[str, Any]:
    """What the runs of a case amount to so far.

    Args:
        runs: in the order in which they were taken.
        peak: datasheet peak of the card in TFLOP/s, or None.

    Returns:
        `arms` (rates of each), `ratios` (ours over each other arm, round by round) and `checks`.
    """
    measured = [run for run in runs if run["status"] == "measured"]
    ceiling = next((r["matmul_ceiling"]["tflops"] for r in measured if "matmul_ceiling" in r), None)
    by_arm = {arm.name: [run for run in measured if run["arm"] == arm.name] for arm in ARMS}
    rates = {name: arm_rates(case, own, peak, ceiling) for name, own in by_arm.items() if own}
    ratios = {}
    for name in by_arm:
        pairs = [
            (tokens_per_s(a) / tokens_per_s(b), tokens_per_s(a, "cpu_s") / tokens_per_s(b, "cpu_s"))
            for a in by_arm["ours"]
            for b in by_arm[name]
            if a["round"] == b["round"]
        ]
        if name != "ours" and pairs:
            memory = rates["ours"]["peak_gib"] / rates[name]["peak_gib"]
            walls, cpus = map(list, zip(*pairs, strict=True))
            ratios[name] = {
                "pairs": walls,
                "tokens_per_s": statistics.median(walls),
                "cpu_pairs": cpus,
                "tokens_per_cpu_s": statistics.median(cpus),
                "peak_memory": memory,
            }
    return {"arms": rates, "ratios": ratios, "checks": checks(case, by_arm), "matmul_ceiling_tflops": ceiling}


def tokens_per_s(run: dict[str, Any], clock: str = "seconds") -> float:
    """Real tokens a second of a run, or of CPU time ("cpu_s")."""
    return float(run["tokens"]["real"] / run[clock])


def arm_rates(
    case: TrainingCase, runs: Sequence[dict[str, Any]], peak: float | None, ceiling: float | None
) -> dict[str, Any]:
    """Medians over an arm's runs; a share of useful FLOPs is None where its base is not known."""
    shape = dataclasses.replace(find_shape(case.shape), layers=case.layers)
    strict, as_papers_count = [], []
    for run in runs:
        tokens, seconds = run["tokens"], run["seconds"]
        flops = shape.step_flops(
            real_tokens=tokens["real"],
            supervised_tokens=tokens["supervised"],
            sum_squared_lengths=tokens["sum_squared_lengths"],
        )
        strict.append(flops / seconds)
        whole = shape.step_flops_6n(slot_tokens=tokens["slot"], pack_len=case.pack_len)
        as_papers_count.append(whole / seconds)
    achieved = statistics.median(strict)
    profile = next((run["profile"] for run in runs if "profile" in run), None)
    return {
        "runs": len(runs),
        "real_tokens_per_s": statistics.median(map(tokens_per_s, runs)),
        "step_s": statistics.median(run["seconds"] / case.steps for run in runs),
        "achieved_tflops": achieved / TERA,
        "mfu": mfu(achieved, 1.0, 1, peak),
        "mfu_6n": mfu(statistics.median(as_papers_count), 1.0, 1, peak),
        "of_ceiling": None if not ceiling else achieved / TERA / ceiling,
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


# --- the table ----------------------------------------------------------------------------------------------


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
            _line(*COLUMNS),
            _line(*["---"] * len(COLUMNS)),
        ]
        for arm in ARMS:
            rates = kept["arms"].get(arm.name)
            if rates is None:
                reasons = [run["reason"] for run in kept["runs"] if run["arm"] == arm.name]
                lines.append(_line(arm.name, 0, reasons[0], *[""] * (len(COLUMNS) - 3)))
                continue
            lines.append(
                _line(
                    arm.name,
                    rates["runs"],
                    f"{rates['real_tokens_per_s']:.0f}",
                    *(_percent(rates[name]) for name in ("mfu", "mfu_6n", "of_ceiling")),
                    f"{rates['peak_gib']:.2f}",
                    *(_percent(rates[name]) for name in ("padding", "idle")),
                    rates["attention"],
                    rates["liger"],
                )
            )
        lines.append("")
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


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
