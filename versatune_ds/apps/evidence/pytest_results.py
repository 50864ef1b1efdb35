"""A pytest plugin that appends a JSON line for every test as it begins and as it ends.

Loaded by `-p versatune_ds.apps.evidence.pytest_results`; `VERSATUNE_TEST_RESULTS` names the file. Unlike with
a report written at the end, what was tested is known even when the process is ended.

What is not covered: warnings and captured output.
"""

from __future__ import annotations

import json
import os
from typing import Any

VARIABLE = "VERSATUNE_TEST_RESULTS"


def pytest_runtest_logstart(nodeid: str) -> None:
    _append({"id": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: Any) -> None:
    """A phase of a test is over; its call counts, and what went wrong or was skipped outside of it."""
    if report.when == "call" or report.outcome != "passed":
        outcome = "error" if report.when != "call" and report.failed else report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        text = reason or ("" if report.passed else report.longreprtext)
        _append({"id": report.nodeid, "outcome": outcome, "seconds": report.duration, "text": text})


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported is an error."""
    if report.failed:
        _append({"id": report.nodeid, "outcome": "error", "seconds": 0.0, "text": report.longreprtext})


def _append(line: dict[str, Any]) -> None:
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
