"""Which slices of a model a benchmark measures, with which recomputation, by the memory model of `plan`.

Every slice has the same activation checkpointing, the least that the largest one fits with, and a slice
recomputes all layers or none: a line through slices that recompute another share would mean nothing. Slices
that cannot fit are refused before anything is built, with numbers and a cure. Slices whose tensors fit but
not the margin are tried: the dry run decides.

What is not covered: host memory, and what `plan/memory.py` leaves out (it counts a bit too much with
liger-kernel or torch.compile).
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from versatune_ds.apps.bench.settings import BenchSettings, bench_config
from versatune_ds.apps.bench.shapes import find_shape
from versatune_ds.apps.plan.memory import memory_plan
from versatune_ds.apps.plan.plan import CHECKPOINTING
from versatune_ds.apps.plan.setup import GIB, Checkpointing, Setup, setup_fields
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import VersaTuneError

OFFLOAD_FILE = "configs/deepspeed/zero3_offload.json"


class DeviceMemory(NamedTuple):
    """What one rank has for itself."""

    bytes: int
    is_cuda: bool


class Slice(NamedTuple):
    """A part of the model to measure."""

    layers: int
    checkpointing: Checkpointing
    verdict: str
    """`fits`, `tight` (tensors fit, the margin does not) or `does not fit`."""
    peak_bytes: int
    """What `plan` expects on each rank."""
    device_bytes: int
    cure: str = ""
    """What would fit instead; of a slice that does not."""

    def to_json(self) -> dict[str, Any]:
        """Its entry in the results, before anything is measured."""
        return {
            "layers": self.layers,
            "activation_checkpointing": self.checkpointing,
            "plan": {
                "verdict": self.verdict,
                "peak_gib": self.peak_bytes / GIB,
                "device_gib": self.device_bytes / GIB,
            },
        }

    def __str__(self) -> str:
        needs = f"{self.peak_bytes / GIB:.1f} of {self.device_bytes / GIB:.1f} GiB on each rank by `plan`"
        return f"{self.layers} layers, activation checkpointing {self.checkpointing}: {self.verdict}, {needs}"


def choose_slices(settings: BenchSettings, memory: DeviceMemory) -> list[Slice]:
    """The slices of a benchmark, fewest layers first; pure.

    Without `settings.layers` the whole model when it fits with some recomputation, else the most layers that
    fit and half of them.
    """
    shape = find_shape(settings.shape)
    setup, policies = _setup(settings, memory)

    def judged(layers: int, among: tuple[Checkpointing, ...] = policies) -> Slice:
        if len(among) > 1 and layers < shape.layers:
            among = ("off", "all")
        return fit(shape, setup, layers, among, memory)

    most = next((n for n in range(shape.layers, 0, -1) if judged(n).verdict == "fits"), 0)
    wanted = settings.layers or ((shape.layers,) if most in (0, shape.layers) else (max(1, most // 2), most))
    possible = [n for n in wanted if judged(n).verdict != "does not fit"]
    same = (judged(max(possible)).checkpointing,) if possible else policies
    chosen = [judged(n, same if n in possible else policies) for n in sorted(set(wanted))]
    cure = _cure(most, judged(most) if most else None)
    return [s._replace(cure=cure) if s.verdict == "does not fit" else s for s in chosen]


def fit(
    shape: ModelShape, setup: Setup, layers: int, policies: tuple[Checkpointing, ...], memory: DeviceMemory
) -> Slice:
    """The first of `policies`, least recomputation first, that the slice fits with; else the smallest."""
    part = dataclasses.replace(shape, layers=layers)
    plans = [
        (policy, memory_plan(part, dataclasses.replace(setup, checkpointing=policy))) for policy in policies
    ]
    for policy, plan in plans:
        if plan.peak <= memory.bytes:
            return Slice(layers, policy, "fits", plan.peak, memory.bytes)
    policy, plan = min(plans, key=lambda pair: pair[1].peak)
    verdict = "tight" if plan.tensors <= memory.bytes else "does not fit"
    return Slice(layers, policy, verdict, plan.peak, memory.bytes)


def _setup(settings: BenchSettings, memory: DeviceMemory) -> tuple[Setup, tuple[Checkpointing, ...]]:
    """What `plan/memory.py` needs of a run, and the recomputation to choose from."""
    asked = settings.activation_checkpointing
    fixed = settings.with_checkpointing("off" if asked == "auto" else asked)
    fields = setup_fields(bench_config(fixed, settings.shape, Path("run")))
    setup = Setup(
        **fields,
        gpus=distributed.world_size(),
        supervised=1.0,  # as in the dry run, which every run has to pass
        device="cuda" if memory.is_cuda else "cpu",
    )
    return setup, CHECKPOINTING if asked == "auto" else (setup.checkpointing,)


def _cure(most: int, largest: Slice | None) -> str:
    if largest is not None:
        return (
            f"at most --layers {most} fit (with --checkpointing {largest.checkpointing}), or take more ranks"
        )
    return f"take more ranks, a shorter --pack-len, or --deepspeed {OFFLOAD_FILE}"


def device_memory() -> DeviceMemory:
    """Memory of this rank's accelerator, all of it; on a CPU the rank's share of what is available.

    Asked for in a process of its own, since a context on the accelerator would take memory from the slices.

    Raises:
        VersaTuneError: the accelerator cannot be asked.
    """
    ask = (
        "import torch\n"
        f"n = {distributed.local_rank()}\n"
        "print(torch.cuda.get_device_properties(n).total_memory if torch.cuda.is_available() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise VersaTuneError(f"the memory of accelerator {distributed.local_rank()} cannot be read: {last}")
    size = int(done.stdout.split()[-1])
    if size and os.environ.get("DS_ACCELERATOR") != "cpu":
        return DeviceMemory(size, is_cuda=True)
    return DeviceMemory(psutil.virtual_memory().available // distributed.local_size(), is_cuda=False)
