"""Sums of token losses per sample or per domain, in a fixed order.

How: tokens are brought into the order of their id by a stable sort, so each id is one contiguous
segment with its tokens in the order of the batch; every segment is then summed on its own in
float64. No atomics are used, so the result is the same on every run, and a NaN stays in its own
segment (a one-hot product or a difference of running sums would spread it: 0 * NaN = NaN).

What is not covered: sums over ranks or steps; add the float64 results.
"""

import torch
from torch import Tensor


def segment_sums(
    values: Tensor, valid: Tensor, ids: Tensor | None, num_segments: int
) -> tuple[Tensor, Tensor]:
    """Sum of `values` and number of tokens per id.

    Args:
        values: float32 [N].
        valid: bool [N]. Only these tokens are summed and counted.
        ids: integer [N] below num_segments, or None. Negative ids belong to no segment.
        num_segments: length of both results; 0 without ids.

    Returns:
        (float64 [num_segments], int64 [num_segments]). A segment without tokens holds 0 and 0.
    """
    device = values.device
    if ids is None or values.numel() == 0:
        return (
            torch.zeros(num_segments, dtype=torch.float64, device=device),
            torch.zeros(num_segments, dtype=torch.int64, device=device),
        )
    # Tokens that belong nowhere get the id behind the last one, so that they sort to the end.
    keys = torch.where(valid & (ids >= 0), ids.to(torch.int64), num_segments)
    sorted_keys, order = torch.sort(keys, stable=True)
    bounds = torch.searchsorted(
        sorted_keys, torch.arange(num_segments + 1, dtype=torch.int64, device=device)
    )
    sorted_values = values.to(torch.float64).index_select(0, order)
    # unsafe=True skips a check of the bounds that would make the host wait for the device.
    sums = torch.segment_reduce(
        sorted_values, "sum", offsets=bounds, axis=0, unsafe=True, initial=0.0
    )
    return sums, bounds.diff()
