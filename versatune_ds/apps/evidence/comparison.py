"""Stage 3: the trainer against TRL, in alternating processes.

    for every round: for every case (a model, cut to what the card holds): for every arm: a process

A run that fails, or for which no time is left, is kept with its reason, and the others go on.

What is not covered: what the arms do (`arms`), what the runs amount to (`ratios`), and several GPUs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from versatune_ds.apps.bench.settings import shipped_deepspeed
from versatune_ds.apps.bench.shapes import shape_config, write_model_folder
from versatune_ds.apps.evidence.cases import ARMS, ROUNDS, Arm, TrainingCase, choose_cases
from versatune_ds.apps.evidence.ratios import compare, summary_lines
from versatune_ds.apps.evidence.record import LoadWatch, Record, first_visible, memory_gib
from versatune_ds.apps.evidence.samples import write_samples
from versatune_ds.apps.programs import Deadline, run_program
from versatune_ds.observability.throughput import peak_tflops

NUM_DOMAINS = 6
PROCESS_LIMIT_S = 240.0
UNKNOWN_S = 45.0
"""With less time left than this, an arm that has not run yet is not started."""
RESERVE_S = 10.0


def run_comparison(record: Record, deadline: Deadline, checkout: Path | None, size: str) -> list[str]:
    """Run the arms in alternation; returns the lines of the summary.

    Args:
        record: gets `zero_optimization` and, for each case, its `runs`, `arms`, `ratios` and `checks`.
        checkout: not used: the trainer is there with the package.
        size: "tiny", "small" (both without a card) or "auto".
    """
    card = record.value["environment"]["card"] if size == "auto" else None
    cases = choose_cases(size, memory_gib(card))
    # one process on a CPU: stage 0
    zero = {"stage": 0} if card is None else shipped_deepspeed(3)["zero_optimization"]
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


def prepare_case(case: TrainingCase, folder: Path) -> None:
    """Model folder and samples, which all arms read."""
    write_model_folder(folder / "model", case.shape, case.layers)
    steps = case.warmup_steps + case.steps + 4  # the profile's, and what loaders fetch ahead
    write_samples(
        folder / "samples.npz",
        num_tokens=2 * steps * case.packs * case.pack_len,
        max_length=case.pack_len,
        vocab_size=shape_config(case.shape)["vocab_size"],
        num_domains=NUM_DOMAINS,
    )


def run_arm(
    arm: Arm,
    case: TrainingCase,
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
        "data": str(folder / "samples.npz"),
        "zero": zero,
    }
    spec.write_text(json.dumps(values), encoding="utf-8")
    result.unlink(missing_ok=True)
    load = LoadWatch()
    environment = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1") if card is None else "8",
        "CUDA_VISIBLE_DEVICES": "" if card is None else first_visible(),
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
    if arm.needs_cuda and not is_cuda:
        return "needs CUDA"
    lacking = [module for module in arm.needs if importlib.util.find_spec(module) is None]
    if not is_cuda and arm.name != "ours":
        lacking = [module for module in lacking if module != "deepspeed"]
    return f"not installed: {', '.join(lacking)}" if lacking else None
