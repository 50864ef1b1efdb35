"""Collate: one pack of samples -> one batch of tensors of length T.

Samples lie one after the other; `position_ids` restart and `cu_seqlens` gets a boundary at each, which is
what keeps them apart in attention. Labels are shifted here, once, so that position t holds the token that t
must predict; a sample's last position predicts nothing. Padding is at the end, a segment of its own without
labels: with T = pack_len every pack costs the same number of slots. A pack without samples is all padding.

Where ranks share a pack, each takes a slice of its rows (`Batch.part`), cut from the whole batch: labels are
shifted before, and boundaries stay those of the pack.

Samples that are compared with the base model are laid out a second time, alone (`compare`).

What is not covered: which samples share a pack (planner, packing), and attention masks (engine).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from versatune_ds.data.plan.packing import Pack
from versatune_ds.foundations.constants import IGNORE_INDEX, PADDING_ID
from versatune_ds.foundations.errors import DataError

COMPARED_ROWS = 64
"""Rows of compared samples are padded to a multiple of this: few different shapes."""

Tensors = TypeVar("Tensors", "Batch", "Compared")


class TokenSource(Protocol):
    """What collate reads of a domain's token cache."""

    def sample(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[Any]]:
        """(tokens uint32[n], mask bool[n]); mask marks the tokens to be predicted, or float32[n]: weighs."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A pack as tensors; T positions, S samples.

    Made on the CPU. `to` moves every tensor; the three integers always stay on the host, where kernels and
    loss need them as launch arguments without waiting for the device.

    Attributes:
        input_ids: int64[T], tokens; the pad token in padding.
        labels: int64[T], the token after each position where it is supervised, else IGNORE_INDEX.
        position_ids: int64[T], 0, 1, ... from each sample's (and the padding's) beginning.
        cu_seqlens: int32[S + 1], or [S + 2] with padding: where segments begin, and T.
        sample_ids: int32[T], 0..S-1, the sample of each position; -1 in padding.
        sample_domains: int32[S], domain of each sample.
        max_seqlen: length of the longest segment, padding included.
        num_tokens: real tokens, without padding.
        supervised_tokens: labels that are not IGNORE_INDEX.
        token_weight: float32[T], factor of each label in the loss, 0 without one; None: 1.
        parts: ranks that share the pack. Of more than one, all [T] and the two counts are those of one
            rank's rows; the rest is the pack's.
        compared: samples that are compared with the base model; None: none in the whole step.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    sample_ids: torch.Tensor
    sample_domains: torch.Tensor
    max_seqlen: int
    num_tokens: int
    supervised_tokens: int
    token_weight: torch.Tensor | None = None
    parts: int = 1
    compared: Compared | None = None

    def part(self, rank: int, parts: int) -> Batch:
        """The rows of one of the `parts` ranks that share the pack; `parts` divides T."""
        if parts == 1:
            return self
        rows = len(self.input_ids) // parts
        mine = slice(rank * rows, (rank + 1) * rows)
        labels, sample_ids, weight = self.labels[mine], self.sample_ids[mine], self.token_weight
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[mine],
            labels=labels,
            position_ids=self.position_ids[mine],
            sample_ids=sample_ids,
            num_tokens=int((sample_ids != PADDING_ID).sum()),
            supervised_tokens=int((labels != IGNORE_INDEX).sum()),
            token_weight=None if weight is None else weight[mine],
            parts=parts,
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch with all tensors on `device`; the copies overlap with the host from pinned memory."""
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked host memory; needs an accelerator (torch raises without one)."""
        return _mapped(self, torch.Tensor.pin_memory)


@dataclass(frozen=True, eq=False)
class Compared:
    """Samples of a pack that are compared with the base model.

    Attributes:
        batch: these samples alone; perhaps none.
        rows: int64[n], positions of their labels in the pack.
        own_rows: int64[n], the same in `batch`.
        normalizer: labels compared in the step over all ranks, divided by the ranks, > 0.
    """

    batch: Batch
    rows: torch.Tensor
    own_rows: torch.Tensor
    normalizer: float


def _mapped(record: Tensors, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    """The record with all its tensors changed, also those of a record in it."""
    changed: dict[str, Any] = {}
    for name, value in vars(record).items():
        if isinstance(value, torch.Tensor):
            changed[name] = change(value)
        elif isinstance(value, Batch | Compared):
            changed[name] = _mapped(value, change)  # type: ignore[type-var]
    return dataclasses.replace(record, **changed)


def rows_of(length: int, parts: int) -> int:
    """Rows of a pack that `parts` ranks can share evenly: `length`, at least 1, rounded up to a multiple."""
    return -(-max(length, 1) // parts) * parts


def collate(pack: Pack, sources: Sequence[TokenSource | None], pack_len: int, pad_id: int) -> Batch:
    """Read a pack's samples and lay them out.

    Args:
        pack: the samples; may be empty.
        sources: token cache of each domain, in table order; None for a domain that no pack names.
        pack_len: T, at least the tokens of the pack.
        pad_id: token id of padding; any valid id, its positions are never read.

    Raises:
        DataError: a sample is not as long as it was when the pack was planned, or the pack overflows.
    """
    num_samples, num_tokens = len(pack), pack.length
    if num_tokens > pack_len:
        raise DataError(f"a pack of {num_tokens} tokens does not fit batch.pack_len = {pack_len}")
    lengths = pack.lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    tokens = np.full(pack_len, pad_id, dtype=np.int64)
    weights = np.zeros(pack_len, dtype=np.float32)
    has_weights = False
    for domain, sample, end, length in zip(pack.domains, pack.samples, ends, lengths, strict=True):
        source = sources[domain]
        if source is None:
            raise DataError(f"a pack names domain {domain}, which has no token cache")
        sample_tokens, mask = source.sample(int(sample))
        if len(sample_tokens) != length:
            raise DataError(
                f"domain {domain}: sample {sample} has {len(sample_tokens)} tokens and was planned with "
                f"{length}; the token cache has changed, prepare it again and start a new run"
            )
        tokens[end - length : end] = sample_tokens
        weights[end - length : end] = mask
        has_weights |= mask.dtype != np.bool_

    supervised = weights > 0
    labels = np.full(pack_len, IGNORE_INDEX, dtype=np.int64)
    labels[:-1][supervised[1:]] = tokens[1:][supervised[1:]]
    labels[ends - 1] = IGNORE_INDEX
    token_weight = np.where(labels != IGNORE_INDEX, np.append(weights[1:], np.float32(0)), np.float32(0))

    segments, segment_samples = lengths, np.arange(num_samples)
    if num_tokens < pack_len:
        segments = np.append(segments, pack_len - num_tokens)
        segment_samples = np.append(segment_samples, PADDING_ID)
    starts = np.cumsum(segments) - segments
    return Batch(
        input_ids=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(np.arange(pack_len) - np.repeat(starts, segments)),
        cu_seqlens=torch.from_numpy(np.append(starts, pack_len).astype(np.int32)),
        sample_ids=torch.from_numpy(np.repeat(segment_samples, segments).astype(np.int32)),
        sample_domains=torch.from_numpy(pack.domains.astype(np.int32)),
        max_seqlen=int(segments.max()),
        num_tokens=num_tokens,
        supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        token_weight=torch.from_numpy(token_weight) if has_weights else None,
    )


def compare(
    batch: Batch,
    pack: Pack,
    chosen: npt.NDArray[np.bool_],
    sources: Sequence[TokenSource | None],
    pad_id: int,
    normalizer: float,
) -> Batch:
    """The whole batch of a pack with its chosen samples (bool[S]) to be compared; see `Compared`."""
    part = Pack(pack.domains[chosen], pack.samples[chosen], pack.lengths[chosen])
    alone = collate(part, sources, max(1, -(-part.length // COMPARED_ROWS)) * COMPARED_ROWS, pad_id)
    of_chosen = torch.from_numpy(np.repeat(chosen, pack.lengths))
    rows = torch.nonzero(of_chosen & (batch.labels[: len(of_chosen)] != IGNORE_INDEX)).flatten()
    own_rows = torch.nonzero(alone.labels != IGNORE_INDEX).flatten()
    return dataclasses.replace(batch, compared=Compared(alone, rows, own_rows, normalizer))
