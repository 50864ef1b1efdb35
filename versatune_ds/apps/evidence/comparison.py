"""Stage 3: the trainer against TRL, in alternating processes.

    for every round: for every case (a model, cut to what the card holds): for every arm: a process

Every pair of runs of a round gives a ratio; what is shown is the median of the ratios. A run that fails, or
for which no time is left, is kept with its reason and the others go on. `arms` says what they are.

Checked: the first loss is what random weights give; the losses of all arms agree at every step and fall.

What is not covered: several GPUs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from versatune_ds.apps.evidence.programs import Deadline, run_program
from versatune_ds.apps.evidence.record import LoadWatch, Record, memory_gib
from versatune_ds.apps.evidence.samples import write_samples
from versatune_ds.engine.bench_shapes import (
    nonembedding_parameters,
    shape_config,
    write_model_folder,
)
from versatune_ds.observability.throughput import TERA, ModelShape, mfu, peak_tflops, step_flops

NUM_DOMAINS = 6
PROCESS_LIMIT_S = 240.0
UNKNOWN_S = 45.0
"""With less time left than this, an arm that has not run yet is not started."""
RESERVE_S = 10.0
INIT_STD = 0.02
FIRST_LOSS_TOLERANCE = 0.3
CURVE_TOLERANCE = 0.03
"""Largest relative difference of two arms' losses at a step: they see other samples."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is trained."""

    shape: str
    layers: int
    pack_len: int
    packs: int
    """In a step."""
    warmup_steps: int
    steps: int
    dtype: str
    lr: float
    recompute: str


def _on_gpu(shape: str, layers: int, pack_len: int = 8192) -> Case:
    return Case(
        shape=shape,
        layers=layers,
        pack_len=pack_len,
        packs=8,
        warmup_steps=2,
        steps=6,
        dtype="bf16",
        lr=1e-4,
        recompute="all",
    )


CPU_CASES = {
    "tiny": Case(
        shape="tiny",
        layers=2,
        pack_len=128,
        packs=4,
        warmup_steps=1,
        steps=4,
        dtype="fp32",
        lr=3e-3,
        recompute="off",
    ),
    "small": Case(
        shape="13m",
        layers=6,
        pack_len=1024,
        packs=4,
        warmup_steps=1,
        steps=4,
        dtype="fp32",
        lr=1e-3,
        recompute="off",
    ),
}
GPU_CASES: list[tuple[float, list[Case]]] = [
    # GiB of the card, cases: 16 bytes a parameter, and activations with recomputation of every layer
    (130, [_on_gpu("qwen2.5-32b", 8), _on_gpu("llama-3-8b", 32, 4096)]),
    (75, [_on_gpu("qwen2.5-32b", 4), _on_gpu("llama-3-8b", 12)]),
    (38, [_on_gpu("llama-3-8b", 2)]),
    (20, [_on_gpu("llama-2-7b", 2, 4096)]),
    (0, [_on_gpu("13m", 6, 1024)]),
]
ROUNDS = {"tiny": 2, "small": 3, "auto": 2}


class Arm(NamedTuple):
    """A trainer of the comparison."""

    name: str
    needs: tuple[str, ...]
    """Modules."""
    needs_cuda: bool = False


ARMS = (
    Arm("ours", ("deepspeed",)),
    Arm("trl-varlen", ("trl", "datasets", "deepspeed"), needs_cuda=True),
    Arm("trl-sdpa", ("trl", "datasets")),
)


# --- running ------------------------------------------------------------------------------------------------


def run_comparison(record: Record, deadline: Deadline, checkout: Path | None, size: str) -> list[str]:
    """Run the arms in alternation; returns the lines of the summary.

    Args:
        record: gets `zero_optimization` and, for each case, its `runs`, `arms`, `ratios` and `checks`.
        deadline: of the command.
        checkout: the source tree, whose DeepSpeed file is used; None for an installed wheel.
        size: "tiny", "small" (both without a card) or "auto".
    """
    card = record.value["environment"]["card"] if size == "auto" else None
    cases = choose_cases(size, memory_gib(card))
    zero = zero_section(checkout, is_cuda=card is not None)
    peak = peak_tflops(card["name"]) if card is not None else None
    results = record.results
    results.update(zero_optimization=zero, peak_tflops=peak, cases=[])
    results["cases"] = [{"case": dataclasses.asdict(case), "runs": []} for case in cases]
    took: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryDirectory(prefix="versatune-evidence-") as name:
        folder = Path(name)
        for i, case in enumerate(cases):
            prepare_case(case, folder / str(i))
        for number in range(1, ROUNDS[size] + 1):
            for i, case in enumerate(cases):
                kept = results["cases"][i]
                for arm in ARMS:
                    run = run_arm(arm, case, zero, folder / str(i), deadline, took.get((i, arm.name)), card)
                    took[i, arm.name] = run.get("process_s", 0.0)
                    kept["runs"].append({"arm": arm.name, "round": number, **run})
                    kept.update(compare(case, kept["runs"], peak))
                    record.write()
    return summary_lines(results)


def choose_cases(size: str, card_gib: float) -> list[Case]:
    """What fits: on a card by its memory, without one by `size`."""
    if size in CPU_CASES:
        return [CPU_CASES[size]]
    return next(cases for least, cases in GPU_CASES if card_gib >= least)


def zero_section(checkout: Path | None, is_cuda: bool) -> dict[str, Any]:
    """`zero_optimization` of the shipped DeepSpeed file; bare ZeRO-3 without a checkout; stage 0 on CPUs."""
    if not is_cuda:
        return {"stage": 0}
    if checkout is None:
        return {"stage": 3}
    file = checkout / "configs" / "deepspeed" / "zero3.json"
    section: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]
    return section


def prepare_case(case: Case, folder: Path) -> None:
    """Model folder and samples, which all arms read."""
    write_model_folder(folder / "model", case.shape, case.layers)
    steps = case.warmup_steps + case.steps + 4  # the profile's, and what loaders fetch ahead
    write_samples(
        folder / "samples.parquet",
        num_tokens=2 * steps * case.packs * case.pack_len,
        max_length=case.pack_len,
        vocab_size=shape_config(case.shape)["vocab_size"],
        num_domains=NUM_DOMAINS,
    )


def run_arm(
    arm: Arm,
    case: Case,
    zero: dict[str, Any],
    folder: Path,
    deadline: Deadline,
    took_s: float | None,
    card: dict[str, str] | None,
) -> dict[str, Any]:
    """One run of an arm: `status` "measured", "failed" or "not run", and its numbers or its `reason`.

    Args:
        took_s: seconds that the arm's last run took, None if it has not run.
    """
    reason = why_not(arm, card is not None)
    left_s = deadline.left_s() - RESERVE_S
    if reason is None and left_s < (UNKNOWN_S if took_s is None else 1.2 * took_s):
        reason = f"no time left ({left_s:.0f} s)"
    if reason is not None:
        return {"status": "not run", "reason": reason}
    spec, result = folder / "spec.json", folder / "result.json"
    values = {
        **dataclasses.asdict(case),
        "arm": arm.name,
        "model": str(folder / "model"),
        "data": str(folder / "samples.parquet"),
        "zero": zero,
    }
    spec.write_text(json.dumps(values), encoding="utf-8")
    result.unlink(missing_ok=True)
    load = LoadWatch()
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1") if card is None else "8",
        "CUDA_VISIBLE_DEVICES": ""
        if card is None
        else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    ended = run_program(
        [sys.executable, "-m", "versatune_ds.apps.evidence.arms", str(spec), str(result)],
        min(PROCESS_LIMIT_S, left_s),
        environment,
        look=load.look,
    )
    kept: dict[str, Any] = {"process_s": ended.seconds, "load": load.summary()}
    if result.is_file():
        kept.update(json.loads(result.read_text(encoding="utf-8")), status="measured")
        del kept["spec"]
    else:
        kept["status"] = "failed"
    if ended.code != 0:
        kept.update(reason=ended.in_a_line, output=ended.tail)
    return kept


def why_not(arm: Arm, is_cuda: bool) -> str | None:
    """Why an arm cannot run here, or None."""
    if arm.needs_cuda and not is_cuda:
        return "needs CUDA"
    lacking = [module for module in arm.needs if importlib.util.find_spec(module) is None]
    if not is_cuda and arm.name != "ours":
        lacking = [module for module in lacking if module != "deepspeed"]
    return f"not installed: {', '.join(lacking)}" if lacking else None


# --- numbers ------------------------------------------------------------------------------------------------


def compare(case: Case, runs: Sequence[dict[str, Any]], peak: float | None) -> dict[str, Any]:
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
            tokens_per_s(a) / tokens_per_s(b)
            for a in by_arm["ours"]
            for b in by_arm[name]
            if a["round"] == b["round"]
        ]
        if name != "ours" and pairs:
            memory = rates["ours"]["peak_gib"] / rates[name]["peak_gib"]
            ratios[name] = {"pairs": pairs, "tokens_per_s": statistics.median(pairs), "peak_memory": memory}
    return {"arms": rates, "ratios": ratios, "checks": checks(case, by_arm), "matmul_ceiling_tflops": ceiling}


def tokens_per_s(run: dict[str, Any]) -> float:
    """Real tokens a second of a run."""
    return float(run["tokens"]["real"] / run["seconds"])


def arm_rates(
    case: Case, runs: Sequence[dict[str, Any]], peak: float | None, ceiling: float | None
) -> dict[str, Any]:
    """Medians over an arm's runs; a share of useful FLOPs is None where its base is not known."""
    shape = model_shape(case)
    tflops = []
    for run in runs:
        flops = step_flops(
            shape,
            real_tokens=run["tokens"]["real"],
            supervised_tokens=run["tokens"]["supervised"],
            sum_squared_lengths=run["tokens"]["sum_squared_lengths"],
        )
        tflops.append(flops / run["seconds"] / TERA)
    achieved = statistics.median(tflops)
    profile = next((run["profile"] for run in runs if "profile" in run), None)
    return {
        "runs": len(runs),
        "real_tokens_per_s": statistics.median(map(tokens_per_s, runs)),
        "step_s": statistics.median(run["seconds"] / case.steps for run in runs),
        "achieved_tflops": achieved,
        "mfu": mfu(achieved * TERA, 1.0, 1, peak),
        "of_ceiling": None if not ceiling else achieved / ceiling,
        "peak_gib": statistics.median(run["peak_gib"] for run in runs),
        "padding": 1 - sum(r["tokens"]["real"] for r in runs) / sum(r["tokens"]["slot"] for r in runs),
        "idle": None if profile is None else profile["idle"],
        "attention": runs[0]["attention"],
        "liger": runs[0]["liger"],
    }


def model_shape(case: Case) -> ModelShape:
    """The FLOPs shape of a case's model."""
    shape = shape_config(case.shape, case.layers)
    return ModelShape(
        num_parameters_nonembedding=nonembedding_parameters(case.shape, case.layers),
        num_layers=case.layers,
        attention_width=shape["hidden_size"],
        hidden_size=shape["hidden_size"],
        vocab_size=shape["vocab_size"],
    )


def checks(case: Case, by_arm: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Whether the arms did the same work: by their losses.

    Random weights of standard deviation s give logits of variance H s^2, a first loss of ln V + H s^2 / 2.
    """
    shape = shape_config(case.shape)
    expected = math.log(shape["vocab_size"]) + shape["hidden_size"] * INIT_STD**2 / 2
    curves = {name: runs[0]["losses"] for name, runs in by_arm.items() if runs}
    firsts = {name: losses[0] for name, losses in curves.items()}
    apart = [
        abs(a - b) / b
        for losses in curves.values()
        for a, b in zip(losses, next(iter(curves.values())), strict=False)
    ]
    return {
        "ln_v": math.log(shape["vocab_size"]),
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
    "arm", "runs", "real tokens/s", "MFU", "of ceiling", "peak GiB", "padding", "idle", "attention", "Liger",
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
                    *(_percent(rates[name]) for name in ("mfu", "of_ceiling")),
                    f"{rates['peak_gib']:.2f}",
                    *(_percent(rates[name]) for name in ("padding", "idle")),
                    rates["attention"],
                    rates["liger"],
                )
            )
        lines.append("")
        for name, ratio in kept["ratios"].items():
            pairs = ", ".join(f"{pair:.3f}" for pair in ratio["pairs"])
            lines.append(
                f"ours / {name}: {ratio['tokens_per_s']:.3f} of its tokens/s (pairs {pairs}), "
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
