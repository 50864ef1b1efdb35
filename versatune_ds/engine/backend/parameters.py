"""Sizes of parameters that ZeRO-3 may have partitioned, or bitsandbytes packed.

What is not covered: their values (`Backend.parameters`).
"""

from __future__ import annotations

from typing import Any

from versatune_ds.engine.model.families import built_shape
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.engine.model.shape import ModelShape


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter before any partitioning."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def parameter_counts(model: PackedCausalLM, trained: bool = False) -> tuple[int, int]:
    """All parameters but a frozen base's, and those outside the input and output embeddings (partitioned ones
    at full size)."""
    parameters = (p for _, p in model.own_parameters() if p.requires_grad or not trained)
    sizes = {id(p): parameter_size(p) for p in parameters}
    embeddings = (model.lm.get_input_embeddings().weight, model.lm.get_output_embeddings().weight)
    embedding_size = sum({id(p): sizes.get(id(p), 0) for p in embeddings}.values())
    return sum(sizes.values()), sum(sizes.values()) - embedding_size


def live_shape(model: PackedCausalLM) -> ModelShape:
    """The shape of a built model, for its FLOPs; with an adapter in it, of the frozen model beside that."""
    total, body = parameter_counts(model)
    if model.lm.get_output_embeddings().weight.requires_grad:
        return built_shape(model.lm.config, (total, body))
    trained = parameter_counts(model, trained=True)[0]
    return built_shape(model.lm.config, (total - trained, body - trained), trained)


def parameter_size(parameter: Any) -> int:
    """Elements; weights in 4 bits lie two in a byte, and know their shape."""
    packed = getattr(parameter, "quant_state", None)
    return packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel())
