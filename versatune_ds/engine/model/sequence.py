"""Sequence parallelism: the ranks of a group share a pack, each of them a slice of its rows (Ulysses).

All but attention works on the rank's own rows. For attention an all-to-all trades rows for heads (Jacobs et
al., arXiv 2309.14509): each rank gets all rows of its share of the heads, attends with the sample boundaries
of the whole pack, and a second all-to-all trades back. With H and K query and key-value heads of d elements
of s bytes, T rows and n ranks, a layer sends in forward, and as much again in backward,

    (n - 1) / n * T / n * (2 H + 2 K') d s    bytes from each rank,    K' = lcm(K, n)

K' because n need not divide K: key-value heads are sent as often as needed for every rank to hold those that
its query heads look at. n must divide H.

DeepSpeed's own layer (0.19.8, `runtime/sequence_parallel/ulysses_sp.py`) drops masks, so that samples of a
pack mix wherever attention needs one; it gathers position ids in every layer, takes n that divide K or are
multiples of it only, and replaces an attention of transformers for the whole process.

What is not covered: which rows a rank gets (`Batch.part`), and models whose attention is not transformers'
`AttentionInterface`: `isolation.probe_packs` finds that their losses change.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface

from versatune_ds.engine.model.attention import (
    BY_SAMPLE,
    VARLEN,
    AttentionChoice,
    sample_attention,
    varlen_attention,
)
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.text import divisors
from versatune_kernels import LossOutput

Attention = Callable[..., tuple[torch.Tensor, None]]


class SequenceGroup(NamedTuple):
    """The ranks that share a pack, and this rank's place among them."""

    rank: int
    size: int
    handle: Any
    """torch's process group."""

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the group, without gradient."""
        summed = tensor.detach().clone()
        dist.all_reduce(summed, group=self.handle)
        return summed

    def whole_samples(self, out: LossOutput) -> LossOutput:
        """Per-sample sums over all of the pack, the same on all ranks of the group."""
        sums = self.total(torch.stack([out.sample_loss, out.sample_tokens.double(), out.sample_loss_sq]))
        return out._replace(sample_loss=sums[0], sample_tokens=sums[1].long(), sample_loss_sq=sums[2])


def check_heads(heads: int, ranks: int) -> None:
    """Raise ConfigError, with the numbers that can, for ranks that cannot share the heads evenly."""
    if heads % ranks:
        raise ConfigError(
            f"batch.sequence_parallel is {ranks}, and the model's {heads} attention heads cannot be shared "
            f"evenly by so many ranks; use one of {divisors(heads)}"
        )


def share_heads(choice: AttentionChoice, ranks: int) -> AttentionChoice:
    """The chosen attention with the heads shared by `ranks` ranks, known to transformers by the new name."""
    is_varlen = choice.implementation == VARLEN
    inner = varlen_attention if is_varlen else sample_attention
    name = f"ulysses_{VARLEN if is_varlen else BY_SAMPLE}"
    AttentionInterface.register(name, functools.partial(attention_over_heads, inner))
    how = choice.reason if is_varlen else "sdpa, one sample after the other"
    return AttentionChoice(name, f"{how}; heads are shared by {ranks} ranks")


@torch.compiler.disable  # collectives
def attention_over_heads(
    inner: Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_group: SequenceGroup | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a pack whose rows are spread over a group, for transformers' AttentionInterface.

    Args:
        inner: attention of all rows and a share of the heads; same arguments.
        query: [1, H, T / n, d]; key, value: [1, K, T / n, d].
        sequence_group: the group; None: this rank has all rows.
        kwargs: as in `varlen_attention`, of the whole pack.

    Returns:
        [1, T / n, H, d] and None (no attention weights).
    """
    group = sequence_group
    if group is None:
        return inner(module, query, key, value, None, **kwargs)
    copies = math.lcm(key.shape[1], group.size) // key.shape[1]
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    parts = [x[0].transpose(0, 1).unflatten(1, (group.size, -1)) for x in (query, key, value)]
    heads = [part.shape[2] for part in parts]
    sent = torch.cat(parts, dim=2).transpose(0, 1)  # [n, T / n, heads of one rank, d]
    rows = _exchanged(sent, group).flatten(0, 1).transpose(0, 1).unsqueeze(0)  # [1, heads, T, d]
    out, _ = inner(module, *rows.split(heads, dim=1), None, **kwargs)
    back = _exchanged(out[0].unflatten(0, (group.size, -1)), group)  # [n, T / n, H / n, d]
    return back.transpose(0, 1).flatten(1, 2).unsqueeze(0), None


def _exchanged(tensor: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """[n, ...]: slice i goes to rank i of the group, and slice i of the result comes from it."""
    exchanged: torch.Tensor = _Exchange.apply(tensor, group.handle)  # type: ignore[no-untyped-call]
    return exchanged


class _Exchange(torch.autograd.Function):
    """An all-to-all, and the same of the gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, handle: Any) -> torch.Tensor:
        ctx.handle = handle
        return _all_to_all(tensor, handle)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(gradients[0], ctx.handle), None


def _all_to_all(tensor: torch.Tensor, handle: Any) -> torch.Tensor:
    sent = tensor.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=handle)
    return received
