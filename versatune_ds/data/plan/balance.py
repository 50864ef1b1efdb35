"""Balance: which rank computes which pack, so that ranks wait little for each other.

Under ZeRO-3 every layer is a meeting of all ranks, so a micro-step lasts as long as its costliest pack.
A pack always has `pack_len` slots (padding is computed too); what differs is attention, whose cost goes with
the sum of squared segment lengths. Packs are sorted by cost and consecutive ones share a micro-step. The
gradient is a sum over the step, so the assignment changes the time and nothing else.

Cost is counted in tokens of linear work: `pack_len + sum(len^2) / quadratic_tokens`, where a sample of
`quadratic_tokens` tokens costs as much in attention as in the linear layers.

What is not covered: balance by moving samples between packs (`packing.fill_packs` does its part), ranks of
different speed, and the head's cost, which goes with supervised tokens and is small next to the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from versatune_ds.data.plan.packing import Pack
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.text import divisors

Item = TypeVar("Item")


def quadratic_tokens(num_params_nonembedding: int, num_layers: int, hidden_size: int) -> float:
    """Length at which causal attention costs as much as the linear layers.

    Forward FLOPs of a sample of n tokens: linear layers 2 * N * n (one multiply-add per parameter and
    token). Attention per layer: QK^T and PV are 2 * 2 * n^2 * hidden, halved by the causal mask, so
    2 * n^2 * hidden, and 2 * n^2 * hidden * num_layers in all. Equal at n = N / (hidden * num_layers).
    Backward doubles both. Example: N = 6.5e9, 28 layers, hidden 3,584: 64.8 k tokens.

    Args:
        num_params_nonembedding: N, parameters of the layers without embeddings and head.
        hidden_size: attention heads times head size.
    """
    return num_params_nonembedding / (num_layers * hidden_size)


def _squared_lengths(pack: Pack, pack_len: int) -> int:
    """Sum of squared segment lengths; the padding at the end is a segment of its own."""
    lengths = pack.lengths.astype(np.int64)
    padding = pack_len - int(lengths.sum())
    return int((lengths * lengths).sum()) + padding * padding


def pack_cost(pack: Pack, pack_len: int, quadratic_tokens: float) -> float:
    """Cost of a pack in tokens of linear work."""
    return pack_len + _squared_lengths(pack, pack_len) / quadratic_tokens


def by_cost(packs: Sequence[Pack], pack_len: int) -> tuple[Pack, ...]:
    """Packs by falling cost; equal ones keep their order.

    All packs have `pack_len` slots, so the order is that of the squared lengths and holds for every model.
    The costliest micro-step comes first, where a lack of memory shows at once.
    """
    return tuple(sorted(packs, key=lambda pack: _squared_lengths(pack, pack_len), reverse=True))


def check_world_size(num_packs: int, world_size: int, sharing: int = 1) -> None:
    """Raise ConfigError unless `num_packs` can be shared evenly by `world_size` ranks, or groups of ranks."""
    what = "ranks" if sharing == 1 else f"groups of {sharing} ranks"
    if world_size < 1 or num_packs % world_size:
        raise ConfigError(
            f"batch.packs_per_step is {num_packs}, which {world_size} {what} cannot share evenly; "
            f"use one of {divisors(num_packs)} {what}, or make packs_per_step a multiple of {world_size}"
        )


def rank_number(micro_step: int, rank: int, world_size: int) -> int:
    """Number among all packs of a step of a rank's pack in this micro-step; see `rank_packs`."""
    return micro_step * world_size + (world_size - 1 - rank if micro_step % 2 else rank)


def rank_packs(packs: Sequence[Item], rank: int, world_size: int) -> list[Item]:
    """The packs of one rank, one per micro-step.

    Args:
        packs: the step's packs as planned, by falling cost (`by_cost`), or something of each; their number
            is a multiple of `world_size`.

    Returns:
        len(packs) / world_size packs. Micro-step m takes packs m * world_size and following; every second
        micro-step deals them in reverse, so that no rank always has the costliest one (which matters where
        ranks meet once per step only: ZeRO-1 and 2).

    Raises:
        ConfigError: the packs cannot be shared evenly; names the world sizes that work.
    """
    check_world_size(len(packs), world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} does not exist among {world_size} ranks")
    return [packs[rank_number(i, rank, world_size)] for i in range(len(packs) // world_size)]


def modelled_idle(packs: Sequence[Pack], world_size: int, *, pack_len: int, quadratic_tokens: float) -> float:
    """Share of rank time spent waiting, if every micro-step lasts as long as its costliest pack.

    Returns:
        0 (all packs of each micro-step cost the same) to below 1.
    """
    check_world_size(len(packs), world_size)
    costs = np.array([pack_cost(pack, pack_len, quadratic_tokens) for pack in packs])
    micro_steps = costs.reshape(-1, world_size)
    return float(1.0 - costs.sum() / (micro_steps.max(axis=1).sum() * world_size))
