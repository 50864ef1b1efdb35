"""Stage 2: the fused loss against its rivals, by the benchmark that measures it (`kernels/benchmarks`).

What is not covered: how it measures; docs/benchmarks.md says that.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from versatune_ds.apps.evidence.record import Record
from versatune_ds.apps.programs import Deadline, run_program
from versatune_ds.report.measures import number
from versatune_ds.report.page import Table, table_to_markdown

BENCHMARK = Path("kernels") / "benchmarks" / "fused_loss.py"
MINUTES = {"tiny": 1.0, "small": 2.0, "auto": 2.0}
SIZES = {"tiny": "tiny", "small": "tiny", "auto": "quick"}
LEAST_MINUTES = 0.2
COLUMNS = ("candidate", "ms", "x ceiling", "x hf eager", "transient GiB", "gate")
OVERTIME_S = 30.0
"""The benchmark may take this long to end its workers."""


def run_kernel(record: Record, deadline: Deadline, checkout: Path | None, size: str) -> list[str]:
    """Run the kernel benchmark and take over its results; returns the lines of the summary.

    Args:
        record: gets the benchmark's own results, rewritten as they come.
        size: "tiny", "small" or "auto".
    """
    if checkout is None or not (checkout / BENCHMARK).is_file():
        return record.not_run(f"no {BENCHMARK} beside the package: run from a checkout")
    minutes = min(MINUTES[size], (deadline.left_s() - OVERTIME_S) / 60)
    if minutes < LEAST_MINUTES:
        return record.not_run(f"no time left ({deadline.left_s():.0f} s)")
    with tempfile.TemporaryDirectory(prefix="versatune-evidence-") as folder:
        results = Path(folder) / "results.json"

        def look() -> None:
            if results.is_file():
                record.results["benchmark"] = json.loads(results.read_text(encoding="utf-8"))
                record.write()

        ended = run_program(
            [
                sys.executable, str(checkout / BENCHMARK),
                "--size", SIZES[size], "--minutes", f"{minutes:.2f}", "--out", folder,
            ],
            minutes * 60 + OVERTIME_S,
            cwd=str(checkout),
            look=look,
        )  # fmt: skip
    record.results["problem"] = ended.in_a_line
    record.results["output"] = None if ended.code == 0 else ended.tail
    return summary_lines(record.results)


def summary_lines(results: dict[str, Any]) -> list[str]:
    """Every candidate's default variant in every case, as a table."""
    lines = []
    for measured in results.get("benchmark", {}).get("cases", []):
        case = measured["case"]
        shown = [each for each in measured["variants"] if each["variant"] in ("default", "ceiling")]
        lines += [
            f"head {case['head']}, N {case['num_tokens']}, labelled {case['supervised']:.0%}, "
            f"{case['dtype']}:",
            "",
            *table_to_markdown(
                Table(COLUMNS, [(each["candidate"], _cells(each)) for each in shown])
            ).splitlines(),
            "",
        ]
    if results.get("problem"):
        lines.append(f"the benchmark {results['problem']}")
    return lines or ["nothing measured"]


def _cells(variant: dict[str, Any]) -> list[str]:
    if "wall_s" not in variant:
        why = variant.get("reason") or variant["status"]
        return [str(why).splitlines()[0], *[""] * 4]
    ratios = (variant.get("ratio_to_ceiling"), variant.get("ratio_to_eager", {}).get("time"))
    numbers = [number(value) for value in (*ratios, variant.get("transient_gib"))]
    verdict = (variant.get("gate") or {}).get("verdict", "")
    return [f"{1e3 * variant['wall_s']['median']:.4g}", *numbers, verdict]
