"""AdamW (Muon: `muon.py`), its parameter groups, and the learning rate as a pure function of the step.

Total steps are known in advance, so the schedule needs no state: the rate of a step is computed from its
number, which makes resuming exact and leaves nothing to save.

What is not covered: other optimizers, and per-layer learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from versatune_ds.config.schema import Optimizer
from versatune_ds.engine.backend.muon import build_muon
from versatune_ds.engine.backend.parameters import full_shape
from versatune_ds.engine.model.packed_lm import PackedCausalLM

AVERAGE = "average"
"""Key of the average of a weight in the optimizer's state."""
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


def build_optimizer(model: PackedCausalLM, settings: Optimizer, offload: bool) -> torch.optim.Optimizer:
    """AdamW over `model`, DeepSpeed's CPU Adam when it is offloaded; or Muon with AdamW."""
    groups = parameter_groups(model, settings.weight_decay)
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.kind == "muon":
        return build_muon(model, groups, settings, common)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **common)


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
