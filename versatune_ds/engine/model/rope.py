"""Rotary positions of a pack whose frequencies depend on length: each sample gets those that it has alone.

Dynamic and longrope RoPE choose frequencies by the longest position of a call, and dynamic RoPE also by the
calls before (transformers 5.17 and 5.23, `modeling_rope_utils.dynamic_rope_update`). In a pack the longest
sample would choose for all. Such an embedding is therefore called once for each sample, in its first state.
A rank that has only a part of a sample calls it with the sample's last position beside its own (`set_ends`).

What is not covered: remote code that computes positions in its own way; the isolation probe looks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

FIXED = ("default", "linear", "llama3", "yarn", "proportional")
"""RoPE types of transformers whose frequencies do not depend on length."""


def turning_length(config: Any) -> int | None:
    """Samples of more tokens have other rotary frequencies than shorter ones; None: none have."""
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = []
    for kind in [inner for inner in rope.values() if isinstance(inner, dict)] or [rope]:
        name = kind.get("rope_type", "default")
        if name not in FIXED:
            original = kind.get("original_max_position_embeddings") if name == "longrope" else None
            lengths.append(int(original or config.max_position_embeddings))
    return max(lengths, default=None)


def rotate_by_sample(model: nn.Module) -> list[Any]:
    """Make every rotary embedding of `model` whose frequencies depend on length see one sample at a time.

    Returns:
        These embeddings.
    """
    found: list[Any] = []
    module: Any
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if hasattr(module, "original_inv_freq") or isinstance(kinds, dict):
            named = kinds.values() if isinstance(kinds, dict) else [kinds]
            if any(kind not in FIXED for kind in named):
                module.forward = functools.partial(_by_sample, module, module.forward)
                module.ends = None
                found.append(module)
    return found


def set_ends(embeddings: Sequence[Any], boundaries: torch.Tensor, rows: int, part: int | None) -> None:
    """Tell embeddings before a call how long the samples are that its rows belong to.

    Args:
        boundaries: int [S + 1], where the samples of the pack begin, and its end.
        rows: of the call.
        part: they are the part of this number of a pack of such parts; None: they are all of it.
    """
    ends: Any = None
    if part is not None and embeddings:
        positions = torch.arange(part * rows, (part + 1) * rows, device=boundaries.device)
        ends = (boundaries.diff() - 1)[torch.bucketize(positions, boundaries, right=True) - 1]
    for module in embeddings:
        module.ends = ends


def _by_sample(
    module: nn.Module,
    forward: Callable[..., tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, ...]:
    """Cosines and sines [1, T, d] of `position_ids` [1, T], which restart at 0 with each sample."""
    starts = (position_ids[0, 1:] == 0).nonzero().flatten().cpu() + 1
    ends: Any = module.ends
    longest = position_ids[:, :0] if ends is None else ends.unsqueeze(0).to(position_ids.dtype)
    parts = []
    for positions, last in zip(
        position_ids.tensor_split(starts, dim=1), longest.tensor_split(starts, dim=1), strict=True
    ):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_", ""), buffer.clone())
        for name in list(vars(module)):
            if name.endswith("max_seq_len_cached"):
                setattr(module, name, module.original_max_seq_len)
        rotation = forward(x, torch.cat([positions, last[:, :1]], dim=1), *args, **kwargs)
        parts.append([of_kind[:, : positions.shape[1]] for of_kind in rotation])
    return tuple(torch.cat(of_samples, dim=1) for of_samples in zip(*parts, strict=True))
