"""The optimizer, its parameter groups, and the learning rate as a pure function of the step.

Total steps are known in advance, so the schedule needs no state: the rate of a step is computed from its
number, which makes resuming exact and leaves nothing to save.

Muon is DeepSpeed's `MuonWithAuxAdam`: AdamW for everything but the matrices of the layers. Such a matrix W
with gradient G moves by its orthogonalised momentum (kellerjordan.github.io/posts/muon):

    M <- mu M + (1 - mu) G,   U = NewtonSchulz5((1 - mu) G + mu M),   W <- W - lr sqrt(max(1, rows / cols)) U

with mu = 0.95. DeepSpeed's ZeRO optimizers gather whole gradients and momenta for that; the momentum has the
dtype of the gradients.

Read in DeepSpeed 0.19.8: what it clips by `max_grad_norm` is the norm over Muon's updates and AdamW's
gradients together. An update's norm is about the root of its rank, whatever the gradient's, so clipping would
scale AdamW's part by a number that means nothing: it is refused, and `grad_norm` in the metrics is that norm.
Matrices that the flat groups of ZeRO-1 and 2 cut have their momentum on both ranks, so the state cannot be
divided anew as AdamW's is.

What is not covered: Muon for experts (tensors of three dimensions), and per-layer learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from versatune_ds.config.schema import Config, Optimizer
from versatune_ds.engine.backend.parameters import full_shape
from versatune_ds.engine.backend.rounded_adamw import RoundedAdamW
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.foundations.errors import ConfigError

AVERAGE, MOMENTUM = "average", "momentum_buffer"
"""Keys in the optimizer's state: of the average of a weight, and of Muon's momentum."""
DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "wsd_linear": lambda progress: 1.0 - progress,
    "wsd_sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Schedule -> share of the peak that is left, by how much of the decay is done."""


def learning_rate(settings: Optimizer, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up from 0 over the first ceil(warmup_ratio * total_steps) steps reaches `lr`; then constant,
    or a decay that would reach `min_lr_ratio * lr` one step after the last. The wsd schedules decay in the
    last ceil(decay_ratio * total_steps) steps only (arXiv:2404.06395; 1 - sqrt: arXiv:2405.18392).
    """
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    start = warmup
    if settings.schedule.startswith("wsd"):
        start = max(warmup, total_steps - math.ceil(settings.decay_ratio * total_steps))
    if settings.schedule == "constant" or step < start:
        return settings.lr
    decay = DECAYS[settings.schedule]((step - start) / (total_steps - start))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * decay)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in a fixed order, empty ones left out: matrices with decay, vectors without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(full_shape(p)) >= 2]
    vectors = [p for p in trainable if len(full_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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


def build_optimizer(model: PackedCausalLM, settings: Optimizer, offload: bool) -> torch.optim.Optimizer:
    """AdamW over `model`, DeepSpeed's CPU Adam when it is offloaded; or Muon with AdamW."""
    groups = parameter_groups(model, settings.weight_decay)
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.kind == "muon":
        return build_muon(model, groups, settings, common)
    if settings.states != "fp32":
        return RoundedAdamW(groups, **common)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def require_muon(config: Config, settings: dict[str, Any]) -> None:
    """Refuse what Muon does not do; under ZeRO-3 switch off `reduce_scatter`, which DeepSpeed's needs.

    Args:
        settings: the DeepSpeed configuration, changed in place.

    Raises:
        ConfigError: names the setting.
    """
    zero = settings["zero_optimization"]
    problems = {
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


def average_weights(state: Mapping[torch.Tensor, dict[str, Any]], decay: float) -> None:
    """Move the average of each fp32 master weight towards it, in host memory; the first time it is a copy.

    The average stands in the optimizer's state, beside the moments: saved, loaded and divided anew like them.
    """
    for master, of_master in state.items():
        weights = master.detach().to("cpu", copy=AVERAGE not in of_master)
        of_master.setdefault(AVERAGE, weights).lerp_(weights, 1.0 - decay)


def settle_averages(state: Mapping[torch.Tensor, dict[str, Any]], decay: float | None) -> None:
    """After loading, which puts all state where the weights are: averages go back to the host, or away."""
    for of_master in state.values():
        average = of_master.pop(AVERAGE, None)
        if decay is not None and average is not None:
            of_master[AVERAGE] = average.cpu()


def set_learning_rate(optimizer: Any, rate: float, muon_factor: float = 1.0) -> None:
    """Give every group of a (DeepSpeed-wrapped) optimizer the learning rate, Muon's so many times it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * (muon_factor if group.get("use_muon") else 1.0)
