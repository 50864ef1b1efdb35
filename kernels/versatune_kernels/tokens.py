"""Which rows of the batch count: everything that has no label is dropped before the first product.

What is not covered: the sums per sample, which are over all N tokens (`sums.py`).
"""

import torch
from torch import Tensor

from versatune_kernels.contract import ValidTokens


def valid_tokens(
    labels: Tensor,
    token_weight: Tensor | None,
    normalizer: Tensor,
    ignore_index: int,
    num_valid: int | None,
) -> ValidTokens:
    """The rows that carry a label, in the order of the batch.

    Args:
        labels: int32 or int64 [N].
        token_weight: floating [N], or None.
        normalizer: float64 [].
        ignore_index: the label of tokens that have no target.
        num_valid: number of other labels, where the host knows it. None: on CUDA the host waits.
    """
    valid = labels != ignore_index
    if num_valid is None:
        index = valid.nonzero().squeeze(1)
    elif num_valid == labels.numel():
        index = torch.arange(num_valid, device=labels.device)
    else:
        # A stable sort of "ignored" puts valid rows first and keeps their order; the shape of the
        # result is known to the host, so it need not wait.
        index = torch.sort((~valid).to(torch.uint8), stable=True).indices[:num_valid]
    is_zero = normalizer == 0
    return ValidTokens(
        index=index,
        labels=labels.index_select(0, index).to(torch.int64),
        token_weight=None if token_weight is None else token_weight.index_select(0, index).float(),
        normalizer=normalizer,
        inverse=torch.where(is_zero, 0, 1 / normalizer).float(),
        nonzero=(~is_zero).float(),
        covers_all=index.numel() == labels.numel(),
        ignore_index=ignore_index,
    )
