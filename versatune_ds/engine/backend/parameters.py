"""Sizes of parameters that ZeRO-3 may have partitioned.

What is not covered: their values (`Backend.parameters`).
"""

from __future__ import annotations

from typing import Any

from versatune_ds.engine.model.packed_lm import PackedCausalLM


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter before any partitioning."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_counts(model: PackedCausalLM, trained: bool = False) -> tuple[int, int]:
    """All parameters, and those outside the input and output embeddings (partitioned ones at full size).

    Args:
        trained: count trained ones only.
    """
    counted = [p for p in model.parameters() if p.requires_grad or not trained]
    sizes = {id(p): getattr(p, "ds_numel", p.numel()) for p in counted}
    embeddings = (model.lm.get_input_embeddings().weight, model.lm.get_output_embeddings().weight)
    embedding_size = sum({id(p): sizes.get(id(p), 0) for p in embeddings}.values())
    return sum(sizes.values()), sum(sizes.values()) - embedding_size
