"""Where the device's time goes in a few steps, by torch's profiler.

On CUDA only kernels and copies are recorded, not the host's calls: `idle` is the share of the wall time in
which none of them ran. On a CPU the operators are recorded, and there is no idle share.

What is not covered: overlap of communication and computation on several GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from versatune_ds.observability.throughput import synchronise

TOP = 20
NAME_CHARS = 120


class DeviceProfile:
    """Records from `start` to `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._profile = profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])
        self._started = 0.0

    def start(self) -> None:
        synchronise(self._device)
        self._profile.start()
        self._started = time.perf_counter()

    def stop(self, steps: int) -> dict[str, Any]:
        """End after `steps` steps: `wall_s`, `busy_s`, `idle`, and the `top` names with seconds and calls."""
        synchronise(self._device)
        wall_s = time.perf_counter() - self._started
        self._profile.stop()
        return {"steps": steps, "wall_s": wall_s, **self._shares(wall_s)}

    def _shares(self, wall_s: float) -> dict[str, Any]:
        if self._cuda:
            spans = [
                (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
                for event in self._profile.events()
                if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
            ]
            busy_s = union_s((begin, end) for _, begin, end in spans)
            top = longest(((name, end - begin) for name, begin, end in spans), wall_s)
            return {"busy_s": busy_s, "idle": 1 - busy_s / wall_s, "top": top}
        events = self._profile.events()
        own = ((event.name, event.self_cpu_time_total / 1e6) for event in events)
        return {"busy_s": None, "idle": None, "top": longest(own, wall_s)}


def union_s(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def longest(took: Iterable[tuple[str, float]], wall_s: float) -> list[dict[str, Any]]:
    """The names with the most seconds together.

    Args:
        took: name and seconds of every single call.
        wall_s: what `share` is a share of.
    """
    sums: dict[str, list[float]] = {}
    for name, seconds in took:
        sums.setdefault(name[:NAME_CHARS], []).append(seconds)
    ordered = sorted(((sum(spent), name) for name, spent in sums.items()), reverse=True)[:TOP]
    return [
        {"name": name, "seconds": seconds, "share": seconds / wall_s, "calls": len(sums[name])}
        for seconds, name in ordered
    ]
