"""Planner, balance and statistics at a large cluster's size, on small data: the benchmark's own code."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launching import REPOSITORY


def measure(samples: int) -> dict[str, str]:
    """The benchmark's table."""
    command = [sys.executable, "-m", "versatune_ds.apps.bench.planner", "--scale", str(samples)]
    options = ["--ranks", "1024", "--packs-per-step", "2048", "--pack-len", "2048", "--steps", "2"]
    done = subprocess.run(
        [*command, *options], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300
    )
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    return dict(rows)


@pytest.mark.slow
def test_a_thousand_ranks_and_memory_that_does_not_grow_with_the_samples():
    few, many = measure(600_000), measure(12_000_000)
    assert many["samples, tokens"].startswith("12,000,000,")
    assert many["a rank finds its packs"].endswith("2 packs")
    assert float(many["efficiency, mean"].rstrip("%")) > 99.5
    assert float(many["reduced over ranks against at once"].split()[0]) < 1e-12
    assert int(many["planner state as JSON"].split()[0].replace(",", "")) < 10_000
    private = [
        float(rows["memory at the end: private, mapped files"].split(", ")[0].replace(",", ""))
        for rows in (few, many)
    ]
    # Lengths alone are 4 bytes a sample: held in memory they would add 43 MiB.
    assert private[1] - private[0] < 10
