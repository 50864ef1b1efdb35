"""What the command keeps: a JSON file a stage, rewritten after every number, with where it was measured.

The card is asked through `nvidia-smi`, or else by a short process, so that this one holds no memory of it.
Versions are read without importing what they belong to: the command must also run where half of it lacks.

What is not covered: machines with several kinds of card (the first visible one is described and used).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.machine import PACKAGES, describe_host
from versatune_ds.observability.records import clean

SCHEMA_VERSION = 1
KIND = "evidence"
CARD = (
    "name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem",
    "persistence_mode", "mig.mode.current",
)  # fmt: skip
LOAD = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu")
BUSY_PERCENT = 50
"""A reading of the clocks counts as one under load from this utilisation on."""


class Record:
    """One stage's JSON file: `environment`, `results` (the stage's own), `summary`, `ended`.

    Args:
        path: the file; replaced in one piece by every `write`.
        environment: from `describe_machine`.
    """

    def __init__(self, path: Path, stage: str, environment: dict[str, Any], command: str) -> None:
        self.path = path
        self.results: dict[str, Any] = {}
        """The stage's results; `write` after a change."""
        self.value: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "stage": stage,
            "command": command,
            "environment": environment,
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "results": self.results,
            "summary": [],
            "ended": None,
        }
        self.write()

    def write(self) -> None:
        write_json_atomic(self.path, clean(self.value))

    def not_run(self, reason: str) -> list[str]:
        """Note why the stage is not run; the lines of its summary."""
        self.results["not_run"] = reason
        return [f"not run: {reason}"]

    def end(self, summary: list[str], how: str) -> None:
        """The last write: the lines of the stage's summary, and why it ended."""
        self.value.update(summary=summary, ended=how, ended_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        self.write()


def describe_machine() -> dict[str, Any]:
    """`describe_host`, and the `card` with its driver and clocks; None without an NVIDIA card."""
    return {"card": ask_card(CARD) or ask_torch(), **describe_host(PACKAGES)}


def memory_gib(card: dict[str, str] | None) -> float:
    """Memory of a card from `ask_card` in GiB; 0 without one."""
    return 0.0 if card is None else float(card["memory.total"]) / 1024


def first_visible() -> str:
    """Of CUDA_VISIBLE_DEVICES; 0 without it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()


def ask_card(fields: Sequence[str]) -> dict[str, str] | None:
    """What `nvidia-smi` says of the first visible card; MHz, W, MiB and degrees Celsius.

    None without `nvidia-smi` or a card, or with CUDA_VISIBLE_DEVICES empty.
    """
    visible = first_visible()
    if not visible or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--id={visible}", f"--query-gpu={','.join(fields)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
    return dict(zip(fields, rows[0], strict=False)) if done.returncode == 0 and rows else None


ASK_TORCH = """
import json, torch
if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(0)
    print(json.dumps({"name": found.name, "memory.total": str(found.total_memory >> 20)}))
"""


def ask_torch() -> dict[str, str] | None:
    """Name and memory of the first card where `nvidia-smi` says nothing; None without a card."""
    done = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=120)
    if done.returncode != 0 or not done.stdout.strip():
        return None
    return dict.fromkeys(CARD, "not known") | json.loads(done.stdout)


class LoadWatch:
    """Clocks, power and temperature of the card while something runs; `look` takes a reading."""

    def __init__(self) -> None:
        self._readings: list[dict[str, float]] = []

    def look(self) -> None:
        """One reading, if there is a card."""
        found = ask_card(LOAD)
        if found is not None:
            self._readings.append({name: _number(value) for name, value in found.items()})

    def summary(self) -> dict[str, Any] | None:
        """Medians of the readings under load; None when there were none."""
        busy = [r for r in self._readings if r["utilization.gpu"] >= BUSY_PERCENT]
        if not busy:
            return None
        medians = {name: statistics.median(reading[name] for reading in busy) for name in LOAD}
        return {**medians, "readings": len(busy)}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return float("nan")
