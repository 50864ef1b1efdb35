"""Which rank am I, and how ranks agree: a thin layer over `torch.distributed` that also works without it.

Every collective here is called by all ranks or by none; nothing is sent when the world has one rank.

What is not covered: starting the process group (DeepSpeed does) and the collectives of ZeRO itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


def rank() -> int:
    """Global rank, from the launcher's environment (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Rank within the node, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """Ranks on this node: LOCAL_SIZE (DeepSpeed) or LOCAL_WORLD_SIZE (torchrun); 1 if nobody says."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


def world_size() -> int:
    """Number of ranks, from the launcher's environment (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on the one global rank that writes shared files and speaks to people."""
    return rank() == 0


def collective_device() -> torch.device:
    """Where a tensor must live to be reduced: NCCL knows CUDA tensors only."""
    import torch
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` (on `collective_device`) over all ranks in place and return it."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; pickles, so not for the hot path."""
    values = [value] * world_size()
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """`value` of rank 0 on every rank; pickles, so not for the hot path."""
    values = [value]
    if world_size() > 1:
        import torch.distributed as dist

        dist.broadcast_object_list(values)
    return values[0]


def all_agree(value: bool) -> bool:
    """True if `value` is true on every rank; a collective."""
    import torch

    votes = torch.tensor([1.0 if value else 0.0], device=collective_device())
    return bool(all_reduce_sum(votes).item() == world_size())


def all_equal(value: int) -> bool:
    """True if the 63-bit `value` is the same on every rank; a collective.

    The value travels byte by byte: sums and sums of squares of bytes are exact in float64 (for fewer than
    370,000 ranks), and n values are equal exactly when n * sum(x^2) == (sum x)^2 (Cauchy-Schwarz).
    """
    import torch

    pieces = [(value >> shift) & 0xFF for shift in range(0, 64, 8)]
    x = torch.tensor(pieces, dtype=torch.float64, device=collective_device())
    sums = all_reduce_sum(torch.stack([x, x * x]))
    return bool((world_size() * sums[1] == sums[0] ** 2).all().item())


def raise_together(problem: Exception | None) -> None:
    """Raise on every rank if any rank has a problem, so that none waits for a dead one; a collective.

    A rank without a problem of its own raises the first one found, so that all leave with the same message.
    """
    problems = [found for found in gather_objects(problem) if found is not None]
    if problem is not None:
        raise problem
    if problems:
        raise problems[0]


def together(action: Callable[..., Result], *arguments: Any) -> Result:
    """Run `action` on every rank; where it fails on any, all raise (`raise_together`). A collective."""
    result: Result | None = None
    problem: Exception | None = None
    try:
        result = action(*arguments)
    except Exception as error:  # raised again, when the others know
        problem = error
    raise_together(problem)
    return result  # type: ignore[return-value]


def on_main(action: Callable[..., Result], *arguments: Any) -> Result:
    """Run `action` on rank 0 alone; every rank gets its result or raises its error. A collective."""
    return broadcast_object(together(lambda: action(*arguments) if is_main() else None))  # type: ignore[no-any-return]
