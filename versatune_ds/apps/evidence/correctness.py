"""Stage 1: the tests that need a GPU, run on this machine.

Only files that mark a test `gpu` are collected: the others may need packages that are not here. Results are
read as they come. Without CUDA these tests skip, which is reported as what it is: nothing tested.

What is not covered: the rest of the suite (`make test`).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from versatune_ds.apps.evidence.pytest_results import VARIABLE
from versatune_ds.apps.evidence.record import LoadWatch, Record
from versatune_ds.apps.programs import Deadline, run_program

MAX_TEXTS = 30
TEXT_CHARS = 3000
BAD = ("failed", "error", "unfinished")
RESERVE_S = 10.0


def run_correctness(record: Record, deadline: Deadline, checkout: Path | None, size: str) -> list[str]:
    """Run the tests of a checkout that are marked `gpu`; returns the lines of the summary.

    Args:
        record: gets `counts`, `tests` and the texts of `failures`.
        checkout: the source tree; None for an installed wheel, which has no tests.
        size: not used: the tests are the same on every machine.
    """
    reason = missing(checkout)
    if reason is not None:
        return record.not_run(reason)
    assert checkout is not None
    tests = sorted((checkout / "tests").rglob("test_*.py"))
    files = [file for file in tests if "mark.gpu" in file.read_text(encoding="utf-8")]
    with tempfile.TemporaryDirectory(prefix="versatune-evidence-") as folder:
        lines = Path(folder) / "tests.jsonl"
        lines.touch()
        load = LoadWatch()

        def look() -> None:
            load.look()
            record.results.update(read_results(lines))
            record.write()

        ended = run_program(
            [
                sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors",
                "-p", "no:cacheprovider", "-p", "versatune_ds.apps.evidence.pytest_results",
                *(str(file.relative_to(checkout)) for file in files),
            ],
            deadline.left_s() - RESERVE_S,
            {VARIABLE: str(lines)},
            str(checkout),
            look,
        )  # fmt: skip
        record.results.update(read_results(lines, is_over=True))
    record.results["seconds"] = ended.seconds
    record.results["load"] = load.summary()
    if ended.code not in (0, 1):  # 1: some failed, which the results say
        record.results["problem"] = ended.in_a_line
    return summary_lines(record.results)


def missing(checkout: Path | None) -> str | None:
    """Why the tests cannot be run, or None."""
    if checkout is None or not (checkout / "tests").is_dir():
        return "no folder tests/ beside the package: an installed wheel has none; run from a checkout"
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed; pip install pytest"
    return None


def read_results(lines: Path, is_over: bool = False) -> dict[str, Any]:
    """What the plugin has written so far.

    Args:
        lines: the plugin's file; a line that is still being written is left for the next reading.
        is_over: no more will come; a test that only began is unfinished.

    Returns:
        `counts` by outcome, `tests` (outcome and seconds by id), `failures` (cut texts by id), `skips` (how
        many for each reason).
    """
    tests: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for line in lines.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        found = json.loads(line)
        before = tests.get(found["id"])
        if before is not None and before["outcome"] in BAD:  # a failed call stays one after a sound teardown
            continue
        tests[found["id"]] = {"outcome": found["outcome"], "seconds": found.get("seconds")}
        if found.get("text"):
            texts[found["id"]] = found["text"]
    if is_over:
        for test in tests.values():
            if test["outcome"] == "started":
                test["outcome"] = "unfinished"
    bad = [name for name, test in tests.items() if test["outcome"] in BAD]
    skipped = [name for name, test in tests.items() if test["outcome"] == "skipped"]
    return {
        "counts": dict(Counter(test["outcome"] for test in tests.values())),
        "tests": tests,
        "failures": {name: texts.get(name, "")[-TEXT_CHARS:] for name in bad[:MAX_TEXTS]},
        "failures_left_out": max(0, len(bad) - MAX_TEXTS),
        "skips": dict(Counter(texts.get(name, "") for name in skipped)),
    }


def summary_lines(results: dict[str, Any]) -> list[str]:
    """The verdict in a line, every bad test by name, the reasons of skips."""
    counts = results["counts"]
    said = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    lines = [said or "no test was run"]
    lines += [f"{results['tests'][name]['outcome']}: {name}" for name in results["failures"]]
    lines += [f"{number} skipped: {reason}" for reason, number in results["skips"].items()]
    if counts and set(counts) == {"skipped"}:
        lines.append("nothing was tested: every test was skipped")
    if results.get("problem"):
        lines.append(f"pytest {results['problem']}")
    return lines
