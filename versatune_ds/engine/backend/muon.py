"""Muon for the matrices of the layers, AdamW for everything else: DeepSpeed's `MuonWithAuxAdam`.

A matrix W with gradient G moves by its orthogonalised momentum (Keller Jordan's Muon,
kellerjordan.github.io/posts/muon):

    M <- mu M + (1 - mu) G,   U = NewtonSchulz5((1 - mu) G + mu M),   W <- W - lr sqrt(max(1, rows / cols)) U

with mu = 0.95. DeepSpeed's ZeRO optimizers gather whole gradients and momenta for that; the momentum has the
dtype of the gradients.

Read in DeepSpeed 0.19.8: what it clips by `max_grad_norm` is the norm over Muon's updates and AdamW's
gradients together. An update's norm is about the root of its rank, whatever the gradient's, so clipping would
scale AdamW's part by a number that means nothing: it is refused, and `grad_norm` in the metrics is that norm.
Matrices that the flat groups of ZeRO-1 and 2 cut have their momentum on both ranks, so the state cannot be
divided anew as AdamW's is.

What is not covered: experts (tensors of three dimensions), adapters, fp16, ZeRO-0, offloading, other ranks or
another stage after a resume.
"""

from __future__ import annotations

from typing import Any

import torch

from versatune_ds.config.schema import Config, Optimizer
from versatune_ds.engine.backend.parameters import full_shape
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.foundations.errors import ConfigError

MOMENTUM = "momentum_buffer"
"""Key of the momentum in the optimizer's state."""


def build_muon(
    model: PackedCausalLM, groups: list[dict[str, Any]], settings: Optimizer, common: dict[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer over `model`.

    Args:
        groups: of AdamW, matrices first.
        common: AdamW's arguments.

    Raises:
        ConfigError: there are experts.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    outside = {id(e.weight) for e in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings())}
    parameters = [p for group in groups for p in group["params"]]
    if any(len(full_shape(p)) > 2 for p in parameters):
        raise ConfigError("optimizer.kind muon: the model has experts, which Muon is not for here; use adamw")
    hidden = {id(p) for p in parameters if len(full_shape(p)) == 2} - outside
    for p in parameters:
        p.use_muon = id(p) in hidden
    matrices = [p for p in parameters if id(p) in hidden]
    rest = [{**g, "params": [p for p in g["params"] if id(p) not in hidden]} for g in groups]
    muon = {"params": matrices, "lr": settings.muon_lr, "weight_decay": settings.weight_decay}
    adamw = [{**g, **common, "use_muon": False} for g in rest if g["params"]]
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        [{**muon, "use_muon": True}, *adamw], adam_optimizer=torch.optim.AdamW
    )
    return optimizer


def require_muon(config: Config, settings: dict[str, Any]) -> None:
    """Refuse what Muon does not do; under ZeRO-3 switch off `reduce_scatter`, which DeepSpeed's needs.

    Args:
        settings: the DeepSpeed configuration, changed in place.

    Raises:
        ConfigError: names the setting.
    """
    zero = settings["zero_optimization"]
    problems = {
        "model.adapter: an adapter's factors are not what it is for": config.model.adapter is not None,
        "model.dtype fp16": config.model.dtype == "fp16",
        "ZeRO stage 0": not zero.get("stage", 0),
        "zero_optimization.offload_optimizer": bool(zero.get("offload_optimizer")),
        "zero_optimization.reduce_scatter: true": zero.get("stage") == 3
        and zero.get("reduce_scatter", False),
        "data_types.grad_accum_dtype": bool((settings.get("data_types") or {}).get("grad_accum_dtype")),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ConfigError(f"optimizer.kind muon does not go with {problem}; change that, or use adamw")
    if zero["stage"] == 3:
        zero["reduce_scatter"] = False
