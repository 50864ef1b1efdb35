"""AdamW that computes in fp32 and holds less than it computes (`optimizer.states`).

Both moments are held in bf16. So may the master weights be, which halves what a step holds once more. At a
learning rate of 1e-5 most updates are smaller than half the distance of two bf16 numbers, and so is what one
gradient adds to a second moment: rounded to the nearest they would be lost. So master weights and second
moments are rounded up or down at random, as likely as the number is near: right on average (Gupta et al.
2015, arXiv 1502.02551). First moments change by a tenth at a time and are rounded to the nearest.

torchao 0.18 and bitsandbytes have 8-bit moments. Neither serves ZeRO's flat partitions: torchao falls back
to fp32 in silence where a partition is no multiple of 256, and its tensors cannot be cut, which loading on
another number of ranks needs; bf16 weights and moments take as little (10 bytes a parameter with gradient).

What is not covered: a fused kernel (each step makes about 20 passes over the partition); offloading.
"""

from __future__ import annotations

from typing import Any

import torch

from versatune_ds.engine.backend.saved_shards import MOMENTS

SLICE = 2**24
"""Elements that are computed at a time; bounds the temporaries to about 20 bytes times this."""


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW over flat fp32 or bf16 tensors with bf16 moments.

    Args:
        groups: parameter groups, each with `weight_decay`.
        lr, betas, eps: as torch.optim.AdamW.
    """

    def __init__(self, groups: Any, *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; gradients may have any floating dtype."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        for kind in MOMENTS:  # loading brings them in the weights' dtype
            held = state.get(kind)
            state[kind] = (
                torch.zeros_like(parameter, dtype=torch.bfloat16) if held is None else held.to(torch.bfloat16)
            )
        whole = (parameter, parameter.grad, *(state[kind] for kind in MOMENTS))
        for parts in zip(*(t.view(-1).split(SLICE) for t in whole), strict=True):
            adamw_slice(*parts, step=int(state["step"]), group=group)


def adamw_slice(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    group: dict[str, Any],
) -> None:
    """Update [N] elements in place.

    Args:
        weight: fp32 or bf16.
        exp_avg, exp_avg_sq: bf16.
        step: number of this step, from 1.
    """
    beta1, beta2 = group["betas"]
    gradient, exact = gradient.float(), weight.float()
    first = exp_avg.float().lerp_(gradient, 1 - beta1)
    second = exp_avg_sq.float().lerp_(gradient.square(), 1 - beta2)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(rounded(second))
    root = second.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    moved = exact * (1 - group["lr"] * group["weight_decay"])
    moved.addcdiv_(first, root, value=-group["lr"] / (1 - beta1**step))
    weight.copy_(rounded(moved) if weight.dtype == torch.bfloat16 else moved)


def rounded(values: torch.Tensor) -> torch.Tensor:
    """fp32 values that bf16 holds exactly, above or below the given ones, right on average.

    The 16 bits that bf16 lacks get a random number added, and are cut off.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(2**16)).view(torch.float32)
