"""What is installed here, and on which processor: facts beside every measured number.

What is not covered: accelerators (`engine/provenance.py`, `apps/evidence/record.py`).
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

PACKAGES = (
    *("versatune-ds", "torch", "triton", "transformers", "deepspeed", "accelerate", "flash-attn"),
    *("liger-kernel", "numpy", "sentencepiece", "safetensors", "trl", "datasets", "pytest"),
)
"""Distributions that decide what a run or a measurement does; some are optional."""


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
