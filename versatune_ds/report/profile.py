"""What `train.profile` left in a run folder, as a table with the way to the trace.

What is not covered: the trace itself, which a trace viewer shows (docs/metrics.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from versatune_ds.foundations import constants
from versatune_ds.foundations.files import read_json_object
from versatune_ds.report.measures import number, percent
from versatune_ds.report.page import PageSection, Table
from versatune_ds.report.runs import RunData

KEYS = {"steps", "device", "wall_s", "phases", "items"}
FILES = (
    (constants.PROFILE_TRACE_FILE, "trace (ui.perfetto.dev)"),
    (constants.PROFILE_MEMORY_FILE, "memory (pytorch.org/memory_viz)"),
)


def profile_section(runs: Sequence[RunData]) -> PageSection | None:
    """Phases and the largest items of each profiled run; None without one."""
    tables, links = [], []
    for run in runs:
        folder = run.folder / constants.PROFILE_DIR
        found = read_json_object(folder / constants.PROFILE_FILE)
        if found.keys() >= KEYS:  # one of ours
            label = f"{run.label}: " if len(runs) > 1 else ""
            tables += _tables(found, label)
            links += [(f"{label}{what}", folder / name) for name, what in FILES if (folder / name).is_file()]
    if not tables:
        return None
    lead = "Rank 0 under torch's profiler, which slows steps. Phases count what is inside them, items do not."
    return PageSection("profile", "Profile", lead, tables=tables, links=links)


def _tables(found: Mapping[str, Any], label: str) -> list[Table]:
    first, last = found["steps"]
    where = "kernels and copies on the device" if found["device"] == "cuda" else "operators on the host"
    captions = {"phases": "phases, seconds of the host", "items": f"the largest {where}"}
    head, steps = ["", "seconds", "of the time", "calls"], f"{label}steps {first} to {last}"

    def cells(seconds: float, calls: int) -> list[str]:
        return [number(seconds, 4), percent(seconds / found["wall_s"]), f"{calls:,}"]

    return [
        Table(
            head,
            [(row["name"], cells(row["seconds"], row["calls"])) for row in found[key]],
            caption=f"{steps} ({number(found['wall_s'], 2)} s): {caption}",
        )
        for key, caption in captions.items()
    ]
