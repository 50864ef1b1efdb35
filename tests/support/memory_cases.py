"""Memory of real small runs, allocation by allocation; a script started by `launch`.

Usage: memory_cases.py OUT_FOLDER CASES.json, a list of {"name": ..., "model": {...}, "zero": {...}, "packs":
packs per rank, "shape": config.json as a dict, "pack_len": T, "sharing": ranks of a pack, "optimizer":
{...}}. Rank 0 leaves OUT_FOLDER/NAME.json with bytes:

    state        allocated by building the engine and training two steps, and still held
    activations  saved for backward by one forward, without parameters and without the loss's own
    peak         most that was held at once during a later step
    unseen       bytes of the peak that may have been freed before it
    checkpoint   size of the checkpoint's files over all ranks
    process      largest resident memory of the rank so far, everything in it

What is not covered: memory outside torch's allocator (Python, gloo, DeepSpeed's shared-memory buffer).
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from versatune_ds.config.load import validate_config
from versatune_ds.data.collate import collate, compare
from versatune_ds.data.plan.balance import rank_packs
from versatune_ds.data.plan.packing import Pack
from versatune_ds.engine.backend.deepspeed_backend import build_backend
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.backend.zero_sizes import with_sizes
from versatune_ds.engine.checkpointing.saver import Saver
from versatune_ds.engine.model.families import planned_shape
from versatune_ds.engine.model.packed_lm import model_inputs
from versatune_ds.engine.skipping import reason_to_skip
from versatune_ds.engine.state import SpikeGuard
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.engine.train import accumulate, apply_step
from versatune_ds.foundations import distributed

MEASURED_STEPS = 2
"""Steps that are measured; the one counts in which the profiler missed least."""


@dataclass
class Allocations:
    """What happened to torch's CPU memory within a block, in bytes."""

    net: int = 0
    peak: int = 0
    """Most held at once above what was held at the start."""

    @property
    def unseen(self) -> int:
        """What seems to stay after a step: a thread of gloo freed it, which the profiler does not watch."""
        return abs(self.net)


@contextmanager
def allocations() -> Iterator[Allocations]:
    """Count every allocation of the block, also those of autograd's own threads."""
    gc.collect()
    found = Allocations()
    with profile(
        activities=[ProfilerActivity.CPU],
        profile_memory=True,
    ) as profiler:
        yield found
        gc.collect()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        found.net += event.nbytes()
        found.peak = max(found.peak, found.net)


def _living() -> list[torch.Tensor]:
    return [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]


def held_bytes(model: torch.nn.Module | None = None) -> int:
    """Bytes of all tensors that live in this process, each storage once; gradients are held in C++ only."""
    gc.collect()
    tensors = _living()
    tensors += [p.grad for p in (model.parameters() if model else ()) if p.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Samples:
    """Samples that fill a pack, every second token supervised."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self.length, self.vocab_size = length, vocab_size

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(i).integers(0, self.vocab_size, self.length).astype(np.uint32)
        return tokens, np.arange(self.length) % 2 == 0


def saved_activations(backend: Any, batch: Any) -> int:
    """Bytes of the tensors that a forward keeps for backward, each storage once.

    Parameters are not counted (ZeRO-3 keeps references to gathered ones), nor what the loss keeps. What
    recomputation holds in Python's objects (outputs that are reused) is counted.
    """
    sizes: dict[int, tuple[torch.UntypedStorage, int]] = {}
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in backend.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_weight = tuple(tensor.shape) in shapes or (tensor.dim() > 1 and tuple(tensor.mT.shape) in shapes)
        if tensor.is_floating_point() and not is_weight:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    inputs, before = model_inputs(batch, 1.0), {id(tensor) for tensor in _living()}
    body = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
    options = {"sequence_group": backend.model.sequence} if batch.parts > 1 else {}
    backend.model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = backend.model.body(
            backend.model.lm, **{key: inputs[key] for key in body}, **options
        ).last_hidden_state[0]
    del hidden
    gc.collect()
    for tensor in _living():
        if id(tensor) not in before:
            pack(tensor)
    return sum(size for _, size in sizes.values())


def settings(case: dict[str, Any], model: Path, folder: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder)},
        "model": {"source": str(model), "weights": "random", **case["model"]},
        "data": {"train": [{"path": "unused", "domain": "a"}]},
        "domains": {"names": ["a", "b"]},
        "batch": {
            "pack_len": case["pack_len"],
            "packs_per_step": case["packs"] * distributed.world_size() // case["sharing"],
            "sequence_parallel": case["sharing"],
        },
        "optimizer": case["optimizer"],
        "train": {"max_steps": 3},
        "deepspeed": {"zero_optimization": case["zero"]},
    }


def run_case(case: dict[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
    """Build, train three steps, save."""
    model = folder / f"model-{case['name']}"
    if distributed.is_main():
        model.mkdir()
        (model / "config.json").write_text(json.dumps(case["shape"]))
    distributed.barrier()
    config = validate_config(settings(case, model, folder), case["name"])
    length = case["pack_len"]
    source = Samples(length, case["shape"]["vocab_size"])
    packs = [
        Pack(np.zeros(1, np.int32), np.array([i], np.int64), np.array([length], np.int32))
        for i in range(config.batch.packs_per_step)
    ]
    ranks = Ranks.of_world(case["sharing"])
    mine = rank_packs(packs, *ranks.dp)
    batches = [collate(pack, [source, source], length, 0).part(*ranks.sp) for pack in mine]
    if config.model.kl_to_base is not None:
        batches = [
            compare(batch, pack, np.ones(1, np.bool_), [source, source], 0, 1.0)
            for batch, pack in zip(batches, mine, strict=True)
        ]
    plan = SimpleNamespace(step=0, loss_weight=sum(b.supervised_tokens for b in batches) * ranks.size)
    out: dict[str, Any] = {"ranks": distributed.world_size()}

    def step() -> None:
        accumulate(run, plan, batches)
        assert apply_step(run, reason_to_skip(run.statistics.reduce(), run.spikes, run.backend), 1e-4)

    before = held_bytes()  # of earlier cases: DeepSpeed's destroy() does not let go of everything
    made, shape = deepspeed_config(config, ranks.dp.size), planned_shape(case["shape"], case["name"])
    made["zero_optimization"] = with_sizes(made["zero_optimization"], shape, config.model.adapter)
    backend = build_backend(config, made, ranks, device)
    run: Any = SimpleNamespace(
        backend=backend,
        statistics=StepStatistics(2, device, base_kl=backend.model.base_kl),
        spikes=SpikeGuard(None, 1),
    )
    step()
    step()
    out["state"] = held_bytes(backend.model) - before
    steps = []
    for _ in range(MEASURED_STEPS):  # the same number on all ranks: a step is full of collectives
        with allocations() as found:
            step()
        steps.append(found)
    clearest = min(steps, key=lambda found: found.unseen)
    out["peak"], out["unseen"] = out["state"] + clearest.peak, clearest.unseen
    out["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out["activations"] = 0 if case["zero"]["stage"] == 3 else saved_activations(backend, batches[0])
    checkpoints = folder / f"checkpoints-{case['name']}"
    Saver(checkpoints, config.checkpoint, backend).save(1, dict)
    out["checkpoint"] = sum(path.stat().st_size for path in checkpoints.glob("step-*/*"))
    backend.close()
    return out


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    device = start_process_group()
    torch._dynamo.config.disable = True  # DeepSpeed compiles Newton-Schulz, which takes longer than a run
    for case in cases:
        out = run_case(case, folder, device)
        if distributed.is_main():
            (folder / f"{case['name']}.json").write_text(json.dumps(out))
        distributed.barrier()
    close_process_group()


if __name__ == "__main__":
    main()
