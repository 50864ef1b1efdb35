"""`versatune-ds plan`: does a run fit, and which settings fit best - before any money is spent.

Memory comes from `memory.py`. Every setting of ZeRO stage, recomputation and offload is tried; those that fit
are ranked by the extra work they ask for: the least offload first, then the least recomputation, then the
lowest stage. Speed is one line, the bound that the GPUs' peak sets.

What is not covered: time and cost; `versatune-ds bench` measures throughput.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from versatune_ds.apps.plan.gpus import Gpu
from versatune_ds.apps.plan.memory import (
    MemoryPlan,
    memory_plan,
    moment_bytes,
    recomputed_layers,
    total,
    trained_parameters,
)
from versatune_ds.apps.plan.setup import FP32, GIB, Checkpointing, Offload, Setup
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.observability.throughput import TERA

CHECKPOINTING: tuple[Checkpointing, ...] = ("off", 4, 2, "all")
OFFLOAD: tuple[Offload, ...] = ("none", "optimizer", "all")
STAGES = (1, 2, 3)
MAX_GPUS = 4096
SHORTEST_PACK = 1024
ALTERNATIVES = 4
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Machine:
    gpu: Gpu
    gpus_per_node: int = 8
    host_gib: float = 1024.0
    """Memory of a node in GiB."""


class Option(NamedTuple):
    setup: Setup
    memory: MemoryPlan
    host_bytes: int
    """Host memory of the first node in steady state or while loading, whichever is more."""
    verdict: str
    """`fits`, `tight` (tensors fit, the margin does not) or `does not fit`."""


def option(shape: ModelShape, setup: Setup, machine: Machine) -> Option:
    memory = memory_plan(shape, setup)
    host = host_bytes(shape, setup, machine, memory)
    room = machine.gpu.memory_gb * GB
    verdict = "fits" if memory.peak <= room else "tight" if memory.tensors <= room else "does not fit"
    if host > machine.host_gib * GIB:
        verdict = "does not fit"
    return Option(setup, memory, host, verdict)


def host_bytes(shape: ModelShape, setup: Setup, machine: Machine, memory: MemoryPlan) -> int:
    """Host memory of the first node.

    While loading, rank 0 reads the whole model under ZeRO-3 (mapped files, which the kernel could drop), and
    every rank holds it under the other stages.
    """
    ranks = min(setup.gpus, machine.gpus_per_node)
    model = shape.parameters * setup.element
    loading = model if setup.zero_stage == 3 else ranks * model
    processes = memory.host[-1].bytes * ranks
    return max(total(memory.host) * ranks, processes + loading)


def compute_bound(shape: ModelShape, setup: Setup, gpu: Gpu) -> float:
    """Tokens/s that no run on these GPUs exceeds: useful and recomputed FLOPs at the peak, nothing else.

    Each pack counts as one sample of full length (the dearest attention).
    """
    trained = None if setup.adapter is None else trained_parameters(shape, setup.adapter)
    flops = dataclasses.replace(shape, trained=trained).step_flops(
        real_tokens=setup.pack_len,
        supervised_tokens=round(setup.supervised * setup.pack_len),
        sum_squared_lengths=setup.pack_len**2,
        recomputed=recomputed_layers(shape.layers, setup.checkpointing) / shape.layers,
    )
    return setup.gpus * gpu.peak_tflops * TERA * setup.pack_len / flops


def options(shape: ModelShape, setup: Setup, machine: Machine) -> list[Option]:
    """Every combination of offload, recomputation and stage; those that fit first, least extra work first."""
    found = [
        option(
            shape,
            dataclasses.replace(setup, offload=offload, checkpointing=recompute, zero_stage=stage),
            machine,
        )
        for offload, recompute, stage in itertools.product(OFFLOAD, CHECKPOINTING, STAGES)
        if (offload != "all" or stage == 3)
        and not (setup.is_qlora and stage == 3)
        and (offload == "none" or setup.states == "fp32")
    ]
    order = {"fits": 0, "tight": 1, "does not fit": 2}
    return sorted(found, key=lambda c: (order[c.verdict], c.verdict != "fits" and c.memory.peak))


def remedies(shape: ModelShape, setup: Setup, machine: Machine) -> list[str]:
    """What would make a run fit that does not: a shorter pack, more GPUs to a pack, or more GPUs."""
    texts = []
    pack_len = setup.pack_len // 2
    while pack_len >= SHORTEST_PACK:
        best = options(shape, dataclasses.replace(setup, pack_len=pack_len), machine)[0]
        if best.verdict == "fits":
            texts.append(f"batch.pack_len {pack_len} fits with {describe(best.setup)}")
            break
        pack_len //= 2
    for n in range(setup.sequence_parallel + 1, setup.gpus + 1):
        shared = dataclasses.replace(setup, sequence_parallel=n)
        if setup.gpus % n or shape.heads % n or setup.packs_per_step % (setup.gpus // n):
            continue
        best = options(shape, shared, machine)[0]
        if best.verdict == "fits":
            texts.append(f"batch.sequence_parallel {n} fits with {describe(best.setup)}")
            break
    gpus = 2 * setup.gpus
    while gpus <= MAX_GPUS:
        groups = gpus // setup.sequence_parallel
        packs = math.ceil(setup.packs_per_step / groups) * groups
        best = options(shape, dataclasses.replace(setup, gpus=gpus, packs_per_step=packs), machine)[0]
        if best.verdict == "fits":
            texts.append(f"{gpus} GPUs fit with {describe(best.setup)}")
            break
        gpus *= 2
    return texts or [f"nothing up to {MAX_GPUS} GPUs and down to packs of {SHORTEST_PACK}; take a larger GPU"]


def describe(setup: Setup) -> str:
    """A setting in the words of a run's YAML."""
    return f"ZeRO-{setup.zero_stage}, activation_checkpointing {setup.checkpointing}, offload {setup.offload}"


def checkpoint_bytes(shape: ModelShape, setup: Setup) -> int:
    """Bytes of one checkpoint over all ranks, of what is trained: master weights, their average if there is
    one, and moments, and below ZeRO-3 the parameters too."""
    trained = trained_parameters(shape, setup.adapter)
    parameters = setup.element if setup.zero_stage in (1, 2) else 0
    average = FP32 if setup.has_average else 0
    return trained * (setup.master + average + parameters) + moment_bytes(shape, setup, 1)


def make_plan(shape: ModelShape, asked: Setup, machine: Machine, *, search: bool) -> dict[str, Any]:
    """The whole answer as JSON values; bytes, and what each rests on.

    Args:
        asked: the settings; with `search` their stage, recomputation and offload are chosen.
        search: choose the first settings that fit instead of taking `asked` as it is.
    """
    ranked = options(shape, asked, machine)
    chosen = ranked[0] if search else option(shape, asked, machine)
    better = [c for c in ranked if c.verdict == "fits" and c.setup != chosen.setup]
    return {
        "model": {
            "parameters": shape.parameters,
            "family": shape.family,
            "layers": shape.layers,
            "adapter": asked.adapter and asked.adapter.model_dump(include={"kind", "rank", "targets"}),
            "trained_parameters": trained_parameters(shape, asked.adapter),
        },
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
        "checkpoint": {"bytes": checkpoint_bytes(shape, chosen.setup)},
        "bound_tokens_per_s": compute_bound(shape, chosen.setup, machine.gpu),
        "alternatives": [
            {"settings": describe(c.setup), "peak_bytes": c.memory.peak} for c in better[:ALTERNATIVES]
        ],
        "remedies": [] if better or chosen.verdict == "fits" else remedies(shape, asked, machine),
    }


def _settings(setup: Setup) -> dict[str, Any]:
    batch = ("pack_len", "sequence_parallel", "packs_per_step")
    names = ("gpus", "zero_stage", "dtype", *batch, "checkpointing", "offload", "states")
    return {name: getattr(setup, name) for name in names}


def _parts(parts: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [
        {"what": part.name, "bytes": part.bytes, "basis": "checked" if part.checked else "model"}
        for part in parts
        if part.bytes
    ]


def as_text(plan: dict[str, Any]) -> str:
    settings, memory = plan["settings"], plan["memory"]
    room = plan["gpu_memory_bytes"]
    adapter = plan["model"]["adapter"]
    beside = adapter and (
        f", frozen, {plan['model']['trained_parameters'] / 1e6:.1f} M of {adapter['kind']} of rank "
        f"{adapter['rank']} trained,"
    )
    lines = [
        f"{plan['model']['parameters'] / 1e9:.2f} B parameters{beside or ''} on {settings['gpus']} GPUs: "
        f"ZeRO-{settings['zero_stage']}, {settings['dtype']}, packs of {settings['pack_len']}"
        + (f", each shared by {n} GPUs" if (n := settings["sequence_parallel"]) > 1 else "")
        + f", {settings['packs_per_step']} packs a step, "
        f"activation_checkpointing {settings['checkpointing']}, offload {settings['offload']}"
        + (f", optimizer.states {settings['states']}" if settings["states"] != "fp32" else "")
        + (" (chosen: the least extra work that fits)" if settings["chosen"] else ""),
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
    lines += [
        f"Checkpoint: {plan['checkpoint']['bytes'] / GB:.1f} GB (checked)",
        f"Compute bound: at most {plan['bound_tokens_per_s']:,.0f} tokens/s at these GPUs' bf16 peak",
    ]
    if plan["alternatives"]:
        lines += ["", "Also fits:"]
        lines += [f"  {a['settings']:60} {a['peak_bytes'] / GIB:6.1f} GiB" for a in plan["alternatives"]]
    if plan["remedies"]:
        lines += ["", "What would fit:", *(f"  {text}" for text in plan["remedies"])]
    lines += ["", "checked: compared with measured memory of small CPU runs; model: not measured on a GPU"]
    return "\n".join(lines)


def _row(part: dict[str, Any]) -> str:
    return f"    {part['what']:47} {part['bytes'] / GIB:7.2f}  {part['basis']}"
