"""Loading a checkpoint on another number of ranks or in another ZeRO stage.

A rank of the new run copies the elements that it owns out of the saved, memory-mapped shards
(`engine/backend/saved_shards.py`), and no others: nothing is converted, no second copy lies on the disk, no
rank waits for another, and the host memory in use is the largest parameter's part.

DeepSpeed has its own way, universal checkpoints: one process first rewrites the whole checkpoint. Read in
DeepSpeed 0.19.8, its ZeRO-3 loader gives the weight decay of the first parameter group to all groups and one
step tensor to all of them (AdamW then counts once per group and step), every rank reads all of another rank's
shard and every parameter whole, and a checkpoint cannot change between stage 3 and the others.

What is not covered: stage 0 (its optimizer state is not sharded, DeepSpeed loads it on any number of ranks),
other dtypes, moments swapped to NVMe, and model parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from versatune_ds.engine.backend.optimizer import AVERAGE, MOMENTUM
from versatune_ds.engine.backend.rounded_adamw import RoundedAdamW
from versatune_ds.engine.backend.saved_shards import MASTER, MOMENTS, SavedShards
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError


def load_resharded(folder: Path, world_size: int, live: Any) -> None:
    """Load model and optimizer from a checkpoint of `world_size` ranks, any ZeRO stage from 1 to 3.

    Every rank calls it and reads what it owns. Hyperparameters stay those of the running configuration.
    """
    if live.zero_nvme_offload_optimizer():
        raise StateError(
            f"{folder} was written with other ranks or settings, and moments on NVMe cannot be divided anew; "
            "resume it as it was saved"
        )
    saved = SavedShards(folder, world_size)
    if saved.holds(MOMENTUM):
        raise StateError(
            f"{folder} was written with other ranks or settings, and Muon's momentum cannot be divided anew; "
            "resume it with the ranks and settings it was saved with"
        )
    optimizer = live.optimizer
    partitioned = live.zero_optimization_partition_weights()
    stage_3, others = "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"
    flats = getattr(optimizer, stage_3 if partitioned else others, None)
    if flats is None:  # BF16_Optimizer
        raise StateError(
            f"{folder} was written with other ranks or settings, and {type(optimizer).__name__}, which "
            "DeepSpeed uses for gradient sums in another dtype (data_types.grad_accum_dtype), cannot take "
            "over a state that was divided otherwise; resume it with the ranks and settings it was saved with"
        )
    averages = (AVERAGE,) if saved.holds(AVERAGE) else ()
    for flat in flats:
        dtype = torch.bfloat16 if isinstance(optimizer.optimizer, RoundedAdamW) else flat.dtype
        state = {kind: torch.zeros_like(flat, dtype=dtype) for kind in MOMENTS}
        optimizer.optimizer.state[flat] = state | {kind: torch.zeros_like(flat) for kind in averages}
    if partitioned:
        optimizer.checkpoint_event_prologue()
        for parameter, name in live.param_names.items():
            if parameter.requires_grad:
                _load_stage3(saved, name, parameter, (*MOMENTS, *averages))
    else:
        for group, flat in enumerate(flats):
            _load_stages_1_and_2(saved, group, flat, live)
        optimizer.update_lp_params()
    for flat, state in optimizer.optimizer.state.items():
        state["step"] = _step_count(saved.steps, flat, optimizer.optimizer)
    for key, value in saved.loss_scaling.items():
        setattr(optimizer, key, value)
    if partitioned:
        optimizer.checkpoint_event_epilogue()
    for key in ("global_steps", "global_samples", "skipped_steps"):
        setattr(live, key, saved.model_state[key])


def _load_stage3(saved: SavedShards, name: str, parameter: Any, kinds: Sequence[str]) -> None:
    """Fill this rank's part of a parameter that ZeRO-3 has partitioned; the last ranks' parts are padded."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    part = parameter.ds_tensor.numel()
    start = min(distributed.rank() * part, parameter.ds_numel)
    stop = min(start + part, parameter.ds_numel)

    def read(kind: str) -> torch.Tensor:
        return torch.nn.functional.pad(saved.read(name, kind, start, stop), (0, part - (stop - start)))

    weights = read(MASTER)
    safe_set_local_fp32_param(parameter, weights)
    parameter.ds_tensor.data.copy_(weights)
    for kind in kinds:
        safe_set_local_optimizer_state(parameter, read(kind), kind)


def _load_stages_1_and_2(saved: SavedShards, group: int, flat: torch.Tensor, live: Any) -> None:
    """Fill this rank's part of a flat group, which is cut without regard to parameters."""
    # not from the parameters' `_hp_mapping`, which is wrong with `round_robin_gradients` (`saved_shards.py`)
    optimizer = live.optimizer
    low = distributed.rank() * flat.numel()
    members, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
    for parameter, at in zip(members, offsets, strict=True):
        first, last = max(at, low), min(at + parameter.numel(), low + flat.numel())
        if first < last:
            targets = {MASTER: flat.data, **optimizer.optimizer.state[flat]}
            for kind in targets:
                values = saved.read(live.param_names[parameter], kind, first - at, last - at)
                targets[kind].narrow(0, first - low, last - first).copy_(values)


def _step_count(steps: int, flat: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """AdamW's counter as the optimizer wants it: torch's a tensor of its own, DeepSpeed's a number."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return steps
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    return torch.tensor(float(steps), device=flat.device if on_device else "cpu")
