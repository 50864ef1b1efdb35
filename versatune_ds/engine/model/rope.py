"""Rotary positions of a pack whose frequencies depend on length: each sample gets those that it has alone.

Dynamic and longrope RoPE choose frequencies by the longest position of a call, and dynamic RoPE also by the
calls before (transformers 5.17 and 5.23, `modeling_rope_utils.dynamic_rope_update`). In a pack the longest
sample would choose for all. Such an embedding is therefore called once for each sample, in its first state.

What is not covered: remote code that computes positions in its own way; the isolation probe looks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

FIXED = ("default", "linear", "llama3", "yarn", "proportional")
"""RoPE types of transformers whose frequencies do not depend on length."""


def turning_length(config: Any) -> int | None:
    """Samples longer than this many tokens have other rotary frequencies than shorter ones; None: none have.

    Args:
        config: a transformers configuration.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = []
    for kind in [inner for inner in rope.values() if isinstance(inner, dict)] or [rope]:
        name = kind.get("rope_type", "default")
        if name not in FIXED:
            original = kind.get("original_max_position_embeddings") if name == "longrope" else None
            lengths.append(int(original or config.max_position_embeddings))
    return max(lengths, default=None)


def rotate_by_sample(model: nn.Module) -> None:
    """Make every rotary embedding of `model` whose frequencies depend on length see one sample at a time."""
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if hasattr(module, "original_inv_freq") or isinstance(kinds, dict):
            named = kinds.values() if isinstance(kinds, dict) else [kinds]
            if any(kind not in FIXED for kind in named):
                module.forward = functools.partial(_by_sample, module, module.forward)


def _by_sample(
    module: nn.Module,
    forward: Callable[..., tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, ...]:
    """Cosines and sines [1, T, d] of `position_ids` [1, T], which restart at 0 with each sample."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    parts = []
    for positions in position_ids.tensor_split(starts[1:].cpu(), dim=1):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_", ""), buffer.clone())
        for name in list(vars(module)):
            if name.endswith("max_seq_len_cached"):
                setattr(module, name, module.original_max_seq_len)
        parts.append(forward(x, positions, *args, **kwargs))
    return tuple(torch.cat(of_samples, dim=1) for of_samples in zip(*parts, strict=True))
