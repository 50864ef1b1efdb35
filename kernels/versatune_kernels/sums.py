"""Sums of token losses per sample, in a fixed order.

How: tokens are brought into the order of their id by a stable sort, so each id is one contiguous
segment with its tokens in the order of the batch; every segment is then summed on its own in
float64. No atomics are used, so the result is the same on every run, and a NaN stays in its own
segment (a one-hot product or a difference of running sums would spread it: 0 * NaN = NaN).

What is not covered: sums over ranks or steps; add the float64 results.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentSums(NamedTuple):
    """One value per sample; a segment without tokens holds 0, 0 and 0."""

    sums: Tensor
    """float64 [num_segments]."""
    counts: Tensor
    """int64 [num_segments]."""
    squares: Tensor
    """float64 [num_segments]. Sum of the squared values."""


def segment_sums(
    values: Tensor, labels: Tensor, ignore_index: int, ids: Tensor | None, num_segments: int
) -> SegmentSums:
    """Sum, number and sum of squares of `values` per id.

    Args:
        values: float32 [N].
        labels: integer [N]. Only tokens whose label is not `ignore_index` are summed and counted.
        ignore_index: the label of tokens that have no target.
        ids: integer [N] below num_segments, or None. Negative ids belong to no segment.
        num_segments: length of the results; 0 without ids.
    """
    device = values.device
    if ids is None or values.numel() == 0:
        return SegmentSums(
            torch.zeros(num_segments, dtype=torch.float64, device=device),
            torch.zeros(num_segments, dtype=torch.int64, device=device),
            torch.zeros(num_segments, dtype=torch.float64, device=device),
        )
    # Tokens that belong nowhere get the id behind the last one, so that they sort to the end.
    mine = (labels != ignore_index) & (ids >= 0)
    keys = torch.where(mine, ids.to(torch.int64), num_segments)
    sorted_keys, order = torch.sort(keys, stable=True)
    bounds = torch.searchsorted(sorted_keys, torch.arange(num_segments + 1, dtype=torch.int64, device=device))
    in_order = values.to(torch.float64).index_select(0, order)
    return SegmentSums(_reduce(in_order, bounds), bounds.diff(), _reduce(in_order.square(), bounds))


def _reduce(values: Tensor, bounds: Tensor) -> Tensor:
    """Sum of each segment bounds[i]..bounds[i + 1] - 1."""
    # unsafe=True skips a check of the bounds that would make the host wait for the device.
    return torch.segment_reduce(values, "sum", offsets=bounds, axis=0, unsafe=True, initial=0.0)
