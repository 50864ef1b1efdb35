"""Stage 4: a study of mixtures (`versatune-ds study`), which other stages leave no time for.

On a GPU it is the one on SmolLM2 with 50 times the tokens that its file gives two CPU cores. Its runs are
kept in DIR/study: the same command goes on where its time was up.

What is not covered: what a study needs (docs/study.md), which its own error says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from versatune_ds.apps.evidence.record import Record
from versatune_ds.apps.programs import Deadline, run_program

STUDIES = Path("configs") / "studies"
ON_GPU = (
    "workers=1",
    "model.dtype=bf16",
    "settings.batch={pack_len: 2048, packs_per_step: 8}",
    "settings.train.max_steps=25",
    "settings.evaluation.max_samples_per_domain=64",
    "settings.evaluation.generate.samples=64",
)
"""25 steps of 16,384 tokens, where the file has 8 of 1,024."""
OVERTIME_S = 30.0
"""A run in progress may take this long to write its checkpoint."""


def run_study(record: Record, deadline: Deadline, checkout: Path | None, size: str) -> list[str]:
    """Run a study, or go on with it; returns its tables.

    Args:
        record: gets `summary`, the study's summary.json, when all its runs are done.
        size: "auto": on SmolLM2; "tiny" and "small": the quick one, whose numbers mean nothing.
    """
    results = record.results
    if checkout is None:
        return record.not_run(f"no {STUDIES} beside the package: run from a checkout")
    name, overrides = ("smollm2", ON_GPU) if size == "auto" else ("quick", ())
    folder = record.path.resolve().parent / "study"
    config = str(checkout / STUDIES / f"{name}.yaml")
    command = [sys.executable, "-m", "versatune_ds.cli.main", "study", "--config", config]
    ended = run_program(
        [*command, f"dir={folder}", *overrides], max(0.0, deadline.left_s() - OVERTIME_S), cwd=str(checkout)
    )
    results["problem"] = ended.in_a_line
    results["output"] = None if ended.code == 0 else ended.tail
    if ended.code != 0:
        return [f"the study {ended.in_a_line}; its runs are kept in {folder}"]
    results["summary"] = json.loads((folder / "results" / "summary.json").read_text(encoding="utf-8"))
    return (folder / "results" / "results.md").read_text(encoding="utf-8").splitlines()[2:]
