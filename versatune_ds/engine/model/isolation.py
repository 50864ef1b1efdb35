"""What a probe of packed samples finds on the real model, before anything is trained on it.

`isolation_leak`: a neighbour's tokens change nothing. `sharing_error`: nor does it that several ranks share
the pack. A model that fails is an error, never a warning.

What is not covered: the bounds, which are the backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from versatune_ds.data.collate import collate, rows_of
from versatune_ds.data.plan.packing import Pack
from versatune_ds.engine.model.packed_lm import model_inputs
from versatune_ds.foundations import distributed
from versatune_kernels import LossOutput

PROBE_TOKENS = 32

Part = tuple[int, int]
"""A rank's number among the ranks that share a pack, and their number."""
WHOLE: Part = (0, 1)


class _Samples:
    """Token source of the probe."""

    def __init__(self, tokens: Sequence[np.ndarray]) -> None:
        self.tokens = tokens

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[index].astype(np.uint32), np.ones(len(self.tokens[index]), dtype=bool)


@torch.no_grad()
def isolation_leak(
    model: Callable[..., LossOutput],
    vocab_size: int,
    device: torch.device,
    neighbour: int = PROBE_TOKENS,
    part: Part = WHOLE,
) -> float:
    """How much a neighbour in the pack changes a sample's token losses; 0 where samples are kept apart.

    Two samples share a pack; the first one is replaced by two of half its length and other tokens; the losses
    of the second one, which is no longer than these, are compared. A collective (under ZeRO-3 it gathers the
    model).

    Args:
        model: the DeepSpeed engine, or a `PackedCausalLM`.
        neighbour: tokens of the first sample; between `turning_length` and twice as many, it shows positions
            that depend on length.
        part: this rank's of a pack.

    Returns:
        The largest absolute change over the largest loss, on any rank.
    """
    first, second = _probe(vocab_size, neighbour)
    changed = (first + vocab_size // 2 + 1) % vocab_size
    half = neighbour // 2
    before = _token_losses(model, [first, second], device, part)
    after = _token_losses(model, [changed[:half], changed[half:], second], device, part)
    rows = before.shape[0]
    positions = torch.arange(part[0] * rows, (part[0] + 1) * rows, device=device)
    of_second = (positions >= neighbour) & (positions < neighbour + len(second))
    return _relative(before[of_second], after[of_second])


@torch.no_grad()
def sharing_error(
    model: Callable[..., LossOutput],
    vocab_size: int,
    device: torch.device,
    neighbour: int = PROBE_TOKENS,
    part: Part = WHOLE,
) -> float:
    """How much token losses of a pack change when ranks share it; otherwise as `isolation_leak`."""
    samples = _probe(vocab_size, neighbour)
    shared = _token_losses(model, samples, device, part)
    whole = _token_losses(model, samples, device, WHOLE, part[1])
    return _relative(whole.unflatten(0, (part[1], -1))[part[0]], shared)


def _probe(vocab_size: int, neighbour: int) -> list[np.ndarray]:
    """Tokens of the two samples."""
    length = min(neighbour // 2, PROBE_TOKENS // 2)
    tokens = np.arange(neighbour + length) % vocab_size
    return [tokens[:neighbour], tokens[neighbour:]]


def _token_losses(
    model: Callable[..., LossOutput],
    samples: list[np.ndarray],
    device: torch.device,
    part: Part,
    multiple: int = 1,
) -> torch.Tensor:
    """Of this rank's rows of a pack whose rows are a multiple of `multiple`."""
    count, lengths = len(samples), np.array([len(tokens) for tokens in samples], np.int32)
    pack = Pack(np.zeros(count, np.int32), np.arange(count), lengths)
    rows = rows_of(int(lengths.sum()), max(multiple, part[1]))
    batch = collate(pack, [_Samples(samples)], rows, 0).part(*part).to(device)
    return model(**model_inputs(batch, 1.0)).token_loss


def _relative(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest change over the largest value on any rank; NaN where there is one."""
    zero = before.new_zeros(1)
    here = [torch.cat([zero, x.abs()]).max().item() for x in (before - after, before)]
    changes, sizes = np.array(distributed.gather_objects(here)).T
    return float(np.max(changes) / max(np.max(sizes), 1e-12))
