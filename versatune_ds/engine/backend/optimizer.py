"""AdamW, its parameter groups, and the learning rate as a pure function of the step.

Total steps are known in advance, so the schedule needs no state: the rate of a step is computed from its
number, which makes resuming exact and leaves nothing to save.

What is not covered: other optimizers, and per-layer learning rates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from versatune_ds.config.schema import Optimizer
from versatune_ds.engine.backend.rounded_adamw import RoundedAdamW


def learning_rate(settings: Optimizer, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total_steps`.

    Linear warm-up from 0 over the first ceil(warmup_ratio * total_steps) steps reaches `lr`; then cosine or
    linear decay that would reach `min_lr_ratio * lr` one step after the last, or constant.
    """
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - warmup) / (total_steps - warmup)
    decay = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * decay)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups in a fixed order, empty ones left out: matrices with decay, vectors without."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, settings: Optimizer, offload: bool) -> torch.optim.Optimizer:
    """AdamW over `model`; DeepSpeed's CPU Adam when the optimizer is offloaded."""
    groups = parameter_groups(model, settings.weight_decay)
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.states != "fp32":
        return RoundedAdamW(groups, **common)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **common)
    return torch.optim.AdamW(groups, fused=True, **common)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group of a (DeepSpeed-wrapped) optimizer the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
