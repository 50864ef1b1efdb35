"""Which rank am I, and how ranks agree: a thin layer over `torch.distributed` that also works without it.

Every collective here is called by all ranks or by none; nothing is sent when the world has one rank.

What is not covered: starting the process group (DeepSpeed does) and the collectives of ZeRO itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Global rank, from the launcher's environment (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank within the node, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of ranks, from the launcher's environment (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one global rank that writes shared files and speaks to people."""
    return rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks in place and return it."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def all_agree(value: bool, device: torch.device | str = "cpu") -> bool:
    """True if `value` is true on every rank; a collective."""
    import torch

    votes = torch.tensor([1.0 if value else 0.0], device=device)
    return bool(all_reduce_sum(votes).item() == world_size())


def all_equal(value: int, device: torch.device | str = "cpu") -> bool:
    """True if the 63-bit `value` is the same on every rank; a collective.

    The value travels as 16-bit pieces: sums of squares of those stay exact in float64, and all values are
    equal exactly when n * sum(x^2) == (sum x)^2 for every piece (Cauchy-Schwarz).
    """
    import torch

    pieces = [(value >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    x = torch.tensor(pieces, dtype=torch.float64, device=device)
    sums = all_reduce_sum(torch.stack([x, x * x]))
    return bool((world_size() * sums[1] == sums[0] ** 2).all().item())
