"""What a probe of packed samples finds on the real model, before anything is trained on it.

A neighbour's tokens change nothing, nor does it that several ranks share the pack. A model that fails is an
error, never a warning.

What is not covered: the bounds, which are the backend's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class LabelledSamples:
    """A token source in memory; every token has a label."""

    def __init__(self, tokens: Sequence[np.ndarray]) -> None:
        self.tokens = tokens

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens[index].astype(np.uint32), np.ones(len(self.tokens[index]), dtype=bool)


class Probed(NamedTuple):
    """Largest absolute changes of token losses over the largest loss, on any rank."""

    leak: float
    """By a neighbour in the pack; 0 where samples are kept apart."""
    error: float
    """By sharing the pack; 0 where it is not shared."""


@torch.no_grad()
def probe_packs(
    model: Callable[..., LossOutput],
    vocab_size: int,
    device: torch.device,
    neighbour: int = PROBE_TOKENS,
    part: Part = WHOLE,
) -> Probed:
    """How much token losses depend on what they must not depend on.

    Two samples share a pack; the first one is replaced by two of half its length and other tokens; the losses
    of the second one, which is no longer than these, are compared. A collective (under ZeRO-3 it gathers the
    model).

    Args:
        model: the DeepSpeed engine, or a `PackedCausalLM`.
        neighbour: tokens of the first sample; between `turning_length` and twice as many, it shows positions
            that depend on length.
        part: this rank's of a pack.
    """
    length, half = min(neighbour // 2, PROBE_TOKENS // 2), neighbour // 2
    first, second = np.split(np.arange(neighbour + length) % vocab_size, [neighbour])
    changed = (first + vocab_size // 2 + 1) % vocab_size
    before = _token_losses(model, [first, second], device, part)
    after = _token_losses(model, [changed[:half], changed[half:], second], device, part)
    rows = before.shape[0]
    positions = torch.arange(part[0] * rows, (part[0] + 1) * rows, device=device)
    of_second = (positions >= neighbour) & (positions < neighbour + length)
    leak = _relative(before[of_second], after[of_second])
    if part[1] == 1:
        return Probed(leak, 0.0)
    whole = _token_losses(model, [first, second], device, WHOLE, part[1])
    return Probed(leak, _relative(whole.unflatten(0, (part[1], -1))[part[0]], before))


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
    batch = collate(pack, [LabelledSamples(samples)], rows, 0).part(*part).to(device)
    return model(**model_inputs(batch, 1.0)).token_loss


def _relative(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest change over the largest value on any rank; NaN where there is one."""
    zero = before.new_zeros(1)
    here = [torch.cat([zero, x.abs()]).max().item() for x in (before - after, before)]
    changes, sizes = np.array(distributed.gather_objects(here)).T
    return float(np.max(changes) / max(np.max(sizes), 1e-12))
