"""Checkpoints in DeepSpeed's layout, written by hand: of any size, within a second, without ranks."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad


def write_checkpoint(folder: Path, weights: Mapping[str, torch.Tensor], stage: int, ranks: int) -> None:
    """Write the weights of a bf16 run (of an fp32 run at stage 0) with one group of matrices, one of vectors.

    Args:
        folder: checkpoint folder to make; it gets our own state, too, but no manifest.
        weights: name -> fp32 tensor.
    """
    folder.mkdir(parents=True)
    groups = [{n: w for n, w in weights.items() if (w.dim() < 2) == vectors} for vectors in (False, True)]
    module: Mapping[str, torch.Tensor] = weights
    if stage > 0:
        module = {n: torch.empty(0) if stage == 3 else w.bfloat16() for n, w in weights.items()}
        shards = _partitioned(groups, ranks) if stage == 3 else _cut(groups, ranks)
        for rank, shard in enumerate(shards):
            name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": shard}, folder / name)
    shapes = [OrderedDict((name, w.shape) for name, w in group.items()) for group in groups]
    model = {
        "module": OrderedDict(module),
        "param_shapes": shapes if stage > 0 else None,
        "shared_params": {} if stage > 0 else None,
        "frozen_param_shapes": OrderedDict() if stage > 1 else None,
    }
    for part in [f"zero_pp_rank_{rank}_" for rank in range(ranks)] if stage == 3 else [""]:
        torch.save(model, folder / f"{part}mp_rank_00_model_states.pt")
    state = {"version": 1, "world_size": ranks, "layout": {"ZeRO stage": stage, "model.dtype": "bf16"}}
    (folder / "versatune_state.json").write_text(json.dumps(state))


def _partitioned(groups: list[dict[str, torch.Tensor]], ranks: int) -> list[dict[str, Any]]:
    """Shards of ZeRO-3: every parameter cut into equal parts."""
    parts = [
        [pad(w.flatten(), (0, -w.numel() % ranks)).chunk(ranks) for w in group.values()] for group in groups
    ]
    return [
        {
            "fp32_flat_groups": [torch.cat([weight[rank] for weight in group]) for group in parts],
            "optimizer_state_dict": {"state": {}},
        }
        for rank in range(ranks)
    ]


def _cut(groups: list[dict[str, torch.Tensor]], ranks: int) -> list[dict[str, Any]]:
    """Shards of ZeRO-1 and ZeRO-2: every flat group cut into equal parts, the last ones without padding."""
    flats = [torch.cat([weight.flatten() for weight in group.values()]) for group in groups]
    parts = [-(-flat.numel() // ranks) for flat in flats]
    return [
        {
            "single_partition_of_fp32_groups": [
                flat[rank * part : (rank + 1) * part].clone() for flat, part in zip(flats, parts, strict=True)
            ],
            "param_alignment_paddings": [[0] * len(group) for group in groups],
            "base_optimizer_state": {"state": {}},
        }
        for rank in range(ranks)
    ]
