"""`versatune-ds plan`: does a run fit, how fast will it be, what will it cost - before any money is spent.

Memory comes from `plan_memory`. Time is a model: useful FLOPs over peak and an assumed MFU, recomputation on
top, communication over the assumed bandwidth, the optimizer over the memory's. Every setting of ZeRO stage,
recomputation and offload is tried, and those that fit are ranked by tokens per second.

What is not covered: stragglers, the data pipeline, evaluation, and time lost to failures. No figure of the
time model has been measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from versatune_ds.apps.plan.decoder import Decoder
from versatune_ds.apps.plan.gpus import Gpu
from versatune_ds.apps.plan.memory import (
    GIB,
    Checkpointing,
    MemoryPlan,
    Offload,
    Setup,
    memory_plan,
    recomputed_layers,
    total,
)
from versatune_ds.observability.throughput import TERA, step_flops

CHECKPOINTING: tuple[Checkpointing, ...] = ("off", 4, 2, "all")
OFFLOAD: tuple[Offload, ...] = ("none", "optimizer", "all")
STAGES = (1, 2, 3)
MAX_GPUS = 4096
SHORTEST_PACK = 1024
GB = 1e9
# Models, not measured.
PCIE_GB_PER_S = 25.0
"""Between a GPU and host memory, one direction."""
HOST_GB_PER_S = 200.0
"""Memory bandwidth of a node's CPUs that CPU Adam reaches."""
ADAM_BYTES = 30
"""Bytes that a step of AdamW moves per parameter: gradient, master weight and moments in, all but it out."""
HASH_GB_PER_S = 1.0
"""SHA-256 of one rank (a checkpoint's manifest)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run stands on, and what is assumed of it."""

    gpu: Gpu
    gpus_per_node: int = 8
    mfu: float = 0.5
    """Assumed model FLOPs utilisation without recomputation, 0..1."""
    network_gb_per_s: float = 400.0
    """Bandwidth between nodes in GB/s per node, one direction."""
    disk_gb_per_s: float = 2.0
    """What the run folder's file system writes, over all nodes."""
    host_gib: float = 1024.0
    """Memory of a node in GiB."""


class Times(NamedTuple):
    """Seconds of one optimizer step, all modelled."""

    compute: float
    gather: float
    """Gathering parameters (ZeRO-3), beside computing."""
    reduce: float
    optimizer: float
    step: float


class Candidate(NamedTuple):
    """One way to run it."""

    setup: Setup
    memory: MemoryPlan
    times: Times
    tokens_per_s: float
    host_bytes: int
    """Host memory of the first node in steady state or while loading, whichever is more."""
    verdict: str
    """`fits`, `tight` (tensors fit, the margin does not) or `does not fit`."""


def candidate(shape: Decoder, setup: Setup, machine: Machine) -> Candidate:
    """Memory, time and verdict of one setting."""
    memory = memory_plan(shape, setup)
    times = step_times(shape, setup, machine)
    host = host_bytes(shape, setup, machine, memory)
    room = machine.gpu.memory_gb * GB
    verdict = "fits" if memory.peak <= room else "tight" if memory.tensors <= room else "does not fit"
    if host > machine.host_gib * GIB:
        verdict = "does not fit"
    rate = setup.pack_len * setup.packs_per_step / times.step
    return Candidate(setup, memory, times, rate, host, verdict)


def host_bytes(shape: Decoder, setup: Setup, machine: Machine, memory: MemoryPlan) -> int:
    """Host memory of the first node.

    While loading, rank 0 reads the whole model under ZeRO-3 (mapped files, which the kernel could drop), and
    every rank holds it under the other stages.
    """
    ranks = min(setup.gpus, machine.gpus_per_node)
    model = shape.parameters * setup.element
    loading = model if setup.zero_stage == 3 else ranks * model
    processes = memory.host[-1].bytes * ranks
    return max(total(memory.host) * ranks, processes + loading)


def step_times(shape: Decoder, setup: Setup, machine: Machine) -> Times:
    """Modelled seconds of a step; each pack is one sample of full length (the dearest attention)."""
    gpu, w, s = machine.gpu, setup.gpus, setup.element
    flops = step_flops(
        shape.flops_shape(),
        real_tokens=setup.pack_len,
        supervised_tokens=round(setup.supervised * setup.pack_len),
        sum_squared_lengths=setup.pack_len**2,
    )
    recomputed = recomputed_layers(shape.layers, setup.checkpointing) / shape.layers
    micro = flops * (1 + recomputed / 3) / (gpu.peak_tflops * TERA * machine.mfu)

    nodes = math.ceil(w / machine.gpus_per_node)
    bandwidth = gpu.link_gb_per_s if nodes == 1 else min(gpu.link_gb_per_s, machine.network_gb_per_s)
    model = shape.parameters * s
    once = model * (w - 1) / w / (bandwidth * GB)
    shard = shape.parameters / setup.shards
    gather, reduce = 0.0, 0.0
    if setup.zero_stage == 3:
        gather = 2 * once
        if setup.offload == "all":
            gather = max(gather, 2 * shard * s / (PCIE_GB_PER_S * GB))
    per_micro = setup.zero_stage >= 2
    reduce = once if per_micro else 0.0
    packs = setup.packs_per_gpu
    optimizer = ADAM_BYTES * shard / (gpu.memory_gb_per_s * GB)
    if setup.offloads_optimizer:
        ranks = min(w, machine.gpus_per_node)
        transfers = 2 * shard * s / (PCIE_GB_PER_S * GB)
        optimizer = ADAM_BYTES * shard * ranks / (HOST_GB_PER_S * GB) + transfers
    if setup.zero_stage < 3:
        optimizer += once * (1 if per_micro else 2)  # parameters gathered; gradients reduced once per step
    step = packs * (max(micro, gather) + reduce) + optimizer
    return Times(packs * micro, packs * gather, packs * reduce, optimizer, step)


def candidates(shape: Decoder, setup: Setup, machine: Machine) -> list[Candidate]:
    """Every combination of stage, recomputation and offload; those that fit first, fastest first."""
    found = [candidate(shape, variant, machine) for variant in _variants(setup)]
    order = {"fits": 0, "tight": 1, "does not fit": 2}
    return sorted(found, key=lambda c: (order[c.verdict], -c.tokens_per_s, c.memory.peak))


def _variants(setup: Setup) -> Iterator[Setup]:
    for stage, recompute, offload in itertools.product(STAGES, CHECKPOINTING, OFFLOAD):
        if offload == "all" and stage < 3:
            continue
        yield dataclasses.replace(setup, zero_stage=stage, checkpointing=recompute, offload=offload)


def remedies(shape: Decoder, setup: Setup, machine: Machine) -> list[str]:
    """What would make a run fit that does not: a shorter pack, or more GPUs."""
    texts = []
    pack_len = setup.pack_len // 2
    while pack_len >= SHORTEST_PACK:
        best = candidates(shape, dataclasses.replace(setup, pack_len=pack_len), machine)[0]
        if best.verdict == "fits":
            texts.append(f"batch.pack_len {pack_len} fits with {describe(best.setup)}")
            break
        pack_len //= 2
    gpus = 2 * setup.gpus
    while gpus <= MAX_GPUS:
        packs = math.ceil(setup.packs_per_step / gpus) * gpus
        best = candidates(shape, dataclasses.replace(setup, gpus=gpus, packs_per_step=packs), machine)[0]
        if best.verdict == "fits":
            texts.append(f"{gpus} GPUs fit with {describe(best.setup)}")
            break
        gpus *= 2
    return texts or [f"nothing up to {MAX_GPUS} GPUs and down to packs of {SHORTEST_PACK}; take a larger GPU"]


def describe(setup: Setup) -> str:
    """A setting in the words of a run's YAML."""
    return f"ZeRO-{setup.zero_stage}, activation_checkpointing {setup.checkpointing}, offload {setup.offload}"


def checkpoint_bytes(shape: Decoder, setup: Setup) -> int:
    """Bytes of one checkpoint over all ranks: master weights and moments, and below ZeRO-3 the model too."""
    model = shape.parameters * setup.element if setup.zero_stage in (1, 2) else 0
    return shape.parameters * 12 + model


def make_plan(
    shape: Decoder,
    asked: Setup,
    machine: Machine,
    *,
    search: bool,
    tokens: float | None = None,
    price_per_gpu_hour: float | None = None,
    num_alternatives: int = 4,
) -> dict[str, Any]:
    """The whole answer as JSON values; bytes, seconds, and what each rests on.

    Args:
        asked: the settings; with `search` their stage, recomputation and offload are chosen.
        search: choose the fastest settings that fit instead of taking `asked` as it is.
        tokens: tokens to train on; None: no total.
        price_per_gpu_hour: in any currency; None: no cost.
    """
    ranked = candidates(shape, asked, machine)
    chosen = ranked[0] if search else candidate(shape, asked, machine)
    size = checkpoint_bytes(shape, chosen.setup)
    save_s = size / (machine.disk_gb_per_s * GB) + size / (chosen.setup.gpus * HASH_GB_PER_S * GB)
    better = [c for c in ranked if c.verdict == "fits" and c.setup != chosen.setup]
    plan: dict[str, Any] = {
        "model": {"parameters": shape.parameters, "family": shape.family, "layers": shape.layers},
        "settings": {**_settings(chosen.setup), "chosen": search},
        "verdict": chosen.verdict,
        "gpu_memory_bytes": int(machine.gpu.memory_gb * GB),
        "memory": {
            "peak_bytes": chosen.memory.peak,
            "tensor_bytes": chosen.memory.tensors,
            "always": _parts(chosen.memory.held),
            "forward_and_backward": _parts(chosen.memory.forward_backward),
            "optimizer_step": _parts(chosen.memory.optimizer_step),
            "margin": _parts(chosen.memory.margin),
        },
        "host": {
            "node_bytes": chosen.host_bytes,
            "assumed_bytes": int(machine.host_gib * GIB),
            "per_rank": _parts(chosen.memory.host),
        },
        "checkpoint": {"bytes": size, "save_s": save_s},
        "time": {
            "basis": f"model: {machine.mfu:.0%} MFU without recomputation, "
            f"{machine.network_gb_per_s:g} GB/s a node",
            **{f"{name}_s": value for name, value in chosen.times._asdict().items()},
            "tokens_per_s": chosen.tokens_per_s,
            "tokens_per_s_per_gpu": chosen.tokens_per_s / chosen.setup.gpus,
        },
        "alternatives": [_line(c) for c in better[:num_alternatives]],
        "remedies": [] if better or chosen.verdict == "fits" else remedies(shape, asked, machine),
    }
    if tokens is not None:
        steps = math.ceil(tokens / (chosen.setup.pack_len * chosen.setup.packs_per_step))
        hours = steps * chosen.times.step / 3600
        plan["run"] = {"tokens": tokens, "steps": steps, "hours": hours}
        if price_per_gpu_hour is not None:
            plan["run"]["cost"] = hours * chosen.setup.gpus * price_per_gpu_hour
    return plan


def _settings(setup: Setup) -> dict[str, Any]:
    names = ("gpus", "zero_stage", "dtype", "pack_len", "packs_per_step", "checkpointing", "offload")
    return {name: getattr(setup, name) for name in names}


def _parts(parts: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [
        {"what": part.name, "bytes": part.bytes, "basis": "checked" if part.checked else "model"}
        for part in parts
        if part.bytes
    ]


def _line(found: Candidate) -> dict[str, Any]:
    return {
        "settings": describe(found.setup),
        "peak_bytes": found.memory.peak,
        "tokens_per_s": found.tokens_per_s,
    }


def as_text(plan: dict[str, Any]) -> str:
    """The plan for a console."""
    settings, memory, time = plan["settings"], plan["memory"], plan["time"]
    room = plan["gpu_memory_bytes"]
    lines = [
        f"{plan['model']['parameters'] / 1e9:.2f} B parameters on {settings['gpus']} GPUs: "
        f"ZeRO-{settings['zero_stage']}, {settings['dtype']}, packs of {settings['pack_len']}, "
        f"{settings['packs_per_step']} packs a step, activation_checkpointing {settings['checkpointing']}, "
        f"offload {settings['offload']}" + (" (chosen: the fastest that fits)" if settings["chosen"] else ""),
        f"verdict: {plan['verdict']} - {memory['peak_bytes'] / GIB:.1f} of {room / GIB:.1f} GiB on each GPU",
        "",
        "GPU memory                                             GiB  basis",
    ]
    titles = ("always", "forward_and_backward", "optimizer_step", "margin")
    for title in titles:
        lines.append(f"  {title.replace('_', ' ')}")
        lines += [_row(part) for part in memory[title]]
    lines += ["  peak = always + the larger of the next two + margin", ""]
    host = plan["host"]
    lines.append(
        f"Host memory of the first node: {host['node_bytes'] / GIB:.1f} of "
        f"{host['assumed_bytes'] / GIB:.0f} GiB; of each rank:"
    )
    lines += [_row(part) for part in host["per_rank"]]
    checkpoint = plan["checkpoint"]
    lines += [
        f"Checkpoint: {checkpoint['bytes'] / GB:.1f} GB (checked), saved in "
        f"{checkpoint['save_s']:.0f} s (model)",
        "",
        f"Speed ({time['basis']}): {time['tokens_per_s']:,.0f} tokens/s, "
        f"{time['tokens_per_s_per_gpu']:,.0f} per GPU; step {time['step_s']:.1f} s = compute "
        f"{time['compute_s']:.1f} (gathering {time['gather_s']:.1f} beside it) + reduce "
        f"{time['reduce_s']:.1f} + optimizer {time['optimizer_s']:.1f}",
    ]
    if "run" in plan:
        run = plan["run"]
        cost = f", cost {run['cost']:,.0f}" if "cost" in run else ""
        lines.append(f"{run['tokens']:,.0f} tokens: {run['steps']:,} steps, {run['hours']:,.1f} hours{cost}")
    if plan["alternatives"]:
        lines += ["", "Also fits:"]
        lines += [
            f"  {a['settings']:60} {a['peak_bytes'] / GIB:6.1f} GiB {a['tokens_per_s']:12,.0f} tokens/s"
            for a in plan["alternatives"]
        ]
    if plan["remedies"]:
        lines += ["", "What would fit:", *(f"  {text}" for text in plan["remedies"])]
    lines += ["", "checked: compared with measured memory of small CPU runs; model: not measured on a GPU"]
    return "\n".join(lines)


def _row(part: dict[str, Any]) -> str:
    return f"    {part['what']:47} {part['bytes'] / GIB:7.2f}  {part['basis']}"
