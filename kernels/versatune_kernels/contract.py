"""What every backend receives and what the caller gets back.

Shape legend of the package: N tokens, H hidden size, V vocabulary size, S samples, k domains,
n <= N tokens whose label is not `ignore_index` ("valid" tokens), C rows of one chunk.

What is not covered: how anything is computed (see `reference.py`, `chunked.py`, `sums.py`).
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """The result of `linear_cross_entropy`. Only `loss` is differentiable.

    The per-token loss and all sums hold the plain negative log-likelihood (nats): no token weight,
    no label smoothing, no z-loss, no normalizer. They are what a model reports, whatever it is
    trained on. With token weights, smoothing and z-loss off, `loss * normalizer` is their sum.
    """

    loss: Tensor
    """float32 []. sum over valid tokens of token_weight * (smoothed nll + z-loss) / normalizer."""
    token_loss: Tensor
    """float32 [N]. Negative log-likelihood of each token; 0 where the label is ignored."""
    sample_loss: Tensor
    """float64 [S]. Sum of token_loss over the valid tokens of each sample; [0] without ids."""
    sample_tokens: Tensor
    """int64 [S]. Number of valid tokens of each sample."""
    domain_loss: Tensor
    """float64 [k]. Sum of token_loss over the valid tokens of each domain; [0] without ids."""
    domain_tokens: Tensor
    """int64 [k]. Number of valid tokens of each domain."""


@dataclass(frozen=True)
class LossOptions:
    """How raw logits become a loss; the fields are explained in `linear_cross_entropy`."""

    z_loss: float
    label_smoothing: float
    logit_scale: float
    softcap: float


@dataclass(frozen=True)
class ValidTokens:
    """The n rows that carry a label. All tensors live on the device of `hidden`."""

    index: Tensor
    """int64 [n]. Positions in 0..N-1, ascending."""
    labels: Tensor
    """int64 [n]. Class ids in 0..V-1."""
    token_weight: Tensor | None
    """float32 [n], or None for all ones."""
    normalizer: float | Tensor
    """The divisor of the loss: a float, or a float32 [] tensor that the host need not read."""
    covers_all: bool
    """True when n == N, so that no row has to be gathered."""
