"""What every backend receives and what the caller gets back.

Shape legend of the package: N tokens, H hidden size, V vocabulary size, S samples, n <= N
tokens whose label is not `ignore_index` ("valid" tokens), C rows of one chunk.

What is not covered: how anything is computed (see `reference.py`, `chunked.py`,
`triton_backend.py`, `sums.py`).
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """The result of `linear_cross_entropy`. Only `loss` is differentiable.

    The per-token loss and all sums hold the plain negative log-likelihood (nats): no token weight, no
    normalizer. They are what a model reports, whatever it is trained on. Without token weights,
    `loss * normalizer` is their sum.
    """

    loss: Tensor
    """float32 []. sum over valid tokens of token_weight * nll / normalizer (see `by_probability`)."""
    token_loss: Tensor
    """float32 [N]. Negative log-likelihood of each token; 0 where the label is ignored."""
    sample_loss: Tensor
    """float64 [S]. Sum of token_loss over the valid tokens of each sample; [0] without ids."""
    sample_tokens: Tensor
    """int64 [S]. Number of valid tokens of each sample."""
    sample_loss_sq: Tensor
    """float64 [S]. Sum of token_loss ** 2 over the valid tokens of each sample."""


class Spec(NamedTuple):
    """What is constant over the calls of a head; explained in `linear_cross_entropy`."""

    logit_scale: float
    softcap: float
    logits_dtype: str
    chunk_tokens: int
    """0: by the rule in `sizing.py`."""
    grad_hidden: bool
    """Whether the gradient of hidden will be asked for."""
    grad_weight: bool
    """Whether the gradient of weight will be asked for."""
    by_probability: bool = False


@dataclass(frozen=True)
class ValidTokens:
    """The n rows that carry a label. All tensors live on the device of `hidden`."""

    index: Tensor
    """int64 [n]. Positions in 0..N-1, ascending."""
    labels: Tensor
    """int64 [n]. Class ids in 0..V-1."""
    token_weight: Tensor | None
    """float32 [n], or None for all ones."""
    normalizer: Tensor
    """float64 []. The divisor of the loss, >= 0; the host need not read it."""
    inverse: Tensor
    """float32 []. 1 / normalizer; 0 where that is 0."""
    nonzero: Tensor
    """float32 []. 1; 0 where the normalizer is 0."""
    covers_all: bool
    """True when n == N, so that no row has to be gathered."""
    ignore_index: int
    """Label of tokens without a target. A row has it only if the caller counted `num_valid` too
    high; the Triton backend gives such a row loss and gradient 0."""


class ForwardPass(NamedTuple):
    """What one pass over the rows yields."""

    nll: Tensor
    """float32 [n]."""
    objective: Tensor
    """float32 [n]. What the loss sums, not normalized."""
    d_hidden: Tensor | None
    """[N, H], zero at ignored tokens; None when not wanted. Lacks the factor `pending`."""
    d_weight: Tensor | None
    """[V, H]; None when not wanted. Lacks the factor `pending`."""
    pending: Tensor
    """float32 []. What backward multiplies both gradients by, beside the upstream gradient. 0: the
    normalizer is 0 and the gradients are exactly 0, whatever they hold now."""
