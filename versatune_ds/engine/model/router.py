"""The routers of a mixture of experts: the loss that keeps them balanced, and what each expert got.

The loss of a pack is Switch Transformers' (arXiv 2101.03961, equations 4 to 6) as transformers computes it
(`load_balancing_loss_func`): E sum_e f_e p_e, f_e the share of its tokens that chose expert e, p_e the mean
probability of e, both over all layers and the pack's real tokens. It is k where the k choices of a token are
spread evenly. A step adds the mean over its packs, times `router_aux_loss_coef`.

The experts of a layer are one tensor in transformers 5, in all families of the table: ZeRO-3 gathers it whole
on every rank, whichever experts the rank's tokens reach, and no rank waits for another. DeepSpeed's leaf
modules, which lists of experts need for that, are not needed.

What is not covered: balance by biases (DeepSeek V3) and experts spread over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from versatune_ds.engine.model.families import FAMILIES
from versatune_ds.engine.model.sequence import SequenceGroup

ROUTER = ".mlp.gate.weight"
"""How the names of routers' weights end."""


class Balance(NamedTuple):
    """Of one pack, or of a rank's part of it."""

    loss: torch.Tensor
    """float32 [], with gradient."""
    load: torch.Tensor
    """int64 [layers, experts]: choices that went to each expert."""


def balance(
    logits: tuple[torch.Tensor, ...], choices: int, real: torch.Tensor, group: SequenceGroup | None = None
) -> Balance:
    """How evenly a pack's tokens were spread over the experts.

    Args:
        logits: of each layer's router, [T, E].
        choices: experts of a token.
        real: bool [T], false in padding.
        group: has the other rows of the pack; what its ranks get adds up to the pack's. (The loss is linear
            in p once f is known, and no gradient goes through f.)
    """
    probabilities = torch.stack(logits).float().softmax(-1)  # [L, T, E]
    chosen = probabilities.detach().topk(choices).indices.flatten(1)  # [L, T k]
    counted = real.long().repeat_interleave(choices).expand_as(chosen)
    load = chosen.new_zeros(len(logits), probabilities.shape[-1]).scatter_add_(1, chosen, counted)
    counts = torch.cat([load.sum(0), real.sum().view(1)])
    if group is not None:
        counts = group.total(counts)
    rows = len(logits) * counts[-1].clamp_min(1)
    mean = (probabilities * real.unsqueeze(-1)).sum((0, 1)) / rows
    return Balance(probabilities.shape[-1] * (counts[:-1] / rows * mean).sum(), load)


class Routers:
    """The routers of a model, and what they did since `take`; `coefficient` None: the configuration's."""

    def __init__(self, config: Any, coefficient: float | None) -> None:
        self.experts, self.choices = experts_of(config), int(config.num_experts_per_tok)
        self.coefficient = float(config.router_aux_loss_coef if coefficient is None else coefficient)
        self._sums: torch.Tensor | None = None

    def observe(
        self, logits: tuple[torch.Tensor, ...], real: torch.Tensor, group: SequenceGroup | None = None
    ) -> torch.Tensor:
        """Count a pack, or this rank's part of it; its loss times the coefficient, float32 []."""
        if not self.coefficient:  # nothing is trained by it: nothing is kept for backward
            logits = tuple(of_layer.detach() for of_layer in logits)
        found = balance(logits, self.choices, real, group)
        sums = torch.cat([found.loss.detach().double().view(1), found.load.double().flatten()])
        self._sums = sums if self._sums is None else self._sums + sums
        return self.coefficient * found.loss

    def take(self) -> torch.Tensor:
        """float64 [1 + layers x experts]: the packs' losses and loads, summed since the last call."""
        sums, self._sums = self._sums, None
        return torch.zeros(1, dtype=torch.float64) if sums is None else sums

    def measures(self, sums: np.ndarray, packs: int) -> dict[str, Any]:
        """Fields of `StepRecord`, from what `take` gave on all ranks together."""
        shares = sums[1:].reshape(-1, self.experts)
        shares = shares / shares.sum(1, keepdims=True)
        return {
            "router_loss": sums[0] / packs,
            "expert_load": {str(expert): share for expert, share in enumerate(shares.mean(0))},
            "expert_load_max": shares.max() * self.experts,
        }


def experts_of(config: Any) -> int:
    """Experts in a layer of a model of a known family; 0: it is no mixture."""
    family = FAMILIES.get(config.model_type)
    return getattr(config, family.experts) if family and family.experts else 0


def as_published(
    config: Any, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights under their published names: other programs read every expert as tensors of its own.

    Args:
        tensors: (name, tensor) as transformers holds them.
    """
    if not experts_of(config):
        yield from tensors
        return
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    for name, tensor in tensors:
        yield from revert_weight_conversion(skeleton, {name: tensor}).items()
