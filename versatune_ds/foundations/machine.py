"""What is installed here, and on which processor: facts beside every measured number.

What is not covered: accelerators (`engine/provenance.py`, `apps/evidence/record.py`).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGES = (
    *("versatune-ds", "torch", "triton", "transformers", "deepspeed", "accelerate", "flash-attn"),
    *("liger-kernel", "numpy", "sentencepiece", "safetensors", "trl", "datasets", "pytest"),
)
"""Distributions that decide what a run or a measurement does; some are optional."""


def describe_host(packages: Iterable[str]) -> dict[str, Any]:
    """Date, processor, load, versions and commit: what a reader needs to repeat a measurement."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": installed(packages),
        "commit": git_commit(),
    }


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed, in the given order; nothing is imported."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Of the first processor, as the kernel says; what Python knows of it elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def git_commit(file: Path = Path(__file__)) -> str | None:
    """Commit of the source tree that `file` belongs to, "-dirty" appended when tracked files differ.

    None outside of git, and for an installed copy that lies in the checkout of something else.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=file.parent, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
