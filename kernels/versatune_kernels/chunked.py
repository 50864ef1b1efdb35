"""The portable backend: gradients computed in the forward pass, one chunk of rows at a time.

How: for the scalar loss the gradient of every logit is known as soon as the row's softmax is, up
to the upstream factor. So one pass over the rows does all the work, and a training call costs
three matrix products per chunk instead of the four of "recompute the logits in backward":

    1. logits   [C, V]  = x [C, H] @ weight.T            result in fp32
    2. in place [C, V]: softmax, loss, gradient of the logits (fp32), then rounded to weight.dtype
    3. d_x      [C, H]  = d_logits @ weight              result in fp32
    4. d_weight [V, H] += d_logits.T @ x                 sum in fp32

backward multiplies both results by upstream / normalizer, rounds each once to its own dtype and
returns them. Rows whose label is ignored are dropped before step 1.

Precision: with p = softmax(z), label y, token weight w, smoothing s, z-loss factor c,

    d loss / d z_v = w * (p_v * (1 + 2 * c * lse) - (1 - s) * [v = y] - s / V)

is formed in fp32 and rounded afterwards: p - 1 of a confident target rounded too early is 0.
1 / normalizer stays out of the logits' gradients, where it would underflow in fp16. Summing the
chunks' weight gradients in bf16 instead loses accuracy with every chunk (a known training bug).

What is not covered: gradients of gradients; a second backward through one call (both are errors);
torch.compile. The CUDA branch of `_product_` has not been run on a GPU yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from versatune_kernels.contract import LossOptions, ValidTokens
from versatune_kernels.errors import KernelError

VOCAB_BLOCK = 8192
"""16-bit weights are multiplied this many rows at a time: the fp32 copy of a block that the
portable product needs is then small beside a chunk (H = 5120: 168 MB)."""


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: ValidTokens,
    options: LossOptions,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Loss and per-row negative log-likelihood, without the full logits.

    Args:
        hidden: [N, H] bf16, fp16 or fp32.
        weight: [V, H] of the same dtype.
        tokens: the rows that count.
        options: how logits become a loss.
        chunk_tokens: C, rows of logits held at a time.

    Returns:
        (float32 [], float32 [n]); the first is differentiable in hidden and weight.
    """
    training = torch.is_grad_enabled()
    loss, nll = _ChunkedLoss.apply(
        hidden,
        weight,
        tokens,
        options,
        chunk_tokens,
        training and hidden.requires_grad,
        training and weight.requires_grad,
    )
    return loss, nll


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        tokens: ValidTokens,
        options: LossOptions,
        chunk_tokens: int,
        grad_hidden: bool,
        grad_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.like = (_Like(hidden), _Like(weight))
        ctx.tokens = tokens
        ctx.spent = False

        num_rows = tokens.labels.numel()
        # Nothing to learn from: backward makes zeros, so the graph stays tied to both inputs.
        is_zero = num_rows == 0 or _is_zero_on_host(tokens.normalizer)
        grads = _Gradients(
            x=hidden.new_empty((num_rows, hidden.shape[1]), dtype=torch.float32)
            if grad_hidden and not is_zero
            else None,
            weight=weight.new_zeros(weight.shape, dtype=torch.float32)
            if grad_weight and not is_zero
            else None,
        )
        nll, objective = _run_chunks(hidden, weight, tokens, options, chunk_tokens, grads)
        ctx.grads = grads
        ctx.mark_non_differentiable(nll)
        total = objective.sum(dtype=torch.float64)
        return _divide(total, tokens.normalizer).float(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _d_nll: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise KernelError(
                "second backward through one linear_cross_entropy call: its gradients are computed "
                "in forward and were handed out by the first backward. Call "
                "linear_cross_entropy again, add the losses before one backward, or use "
                'backend="reference".'
            )
        ctx.spent = True
        grads, ctx.grads = ctx.grads, None
        tokens: ValidTokens = ctx.tokens
        hidden_like, weight_like = ctx.like
        scale = _divide(d_loss, tokens.normalizer)

        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            if grads.x is None:
                d_hidden = hidden_like.zeros()
            else:
                d_hidden = _scale_(grads.x, scale, tokens.normalizer).to(hidden_like.dtype)
                if not tokens.covers_all:
                    d_hidden = hidden_like.zeros().index_copy_(0, tokens.index, d_hidden)
        if ctx.needs_input_grad[1]:
            if grads.weight is None:
                d_weight = weight_like.zeros()
            else:
                d_weight = _scale_(grads.weight, scale, tokens.normalizer).to(weight_like.dtype)
        return d_hidden, d_weight, None, None, None, None, None


class _Like:
    """Shape, dtype and device of an input, kept without keeping the input (ZeRO-3 releases it)."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass
class _Gradients:
    """fp32 gradients of the sum over tokens, before upstream / normalizer. None: not needed."""

    x: Tensor | None
    """[n, H]"""
    weight: Tensor | None
    """[V, H]"""


# ---- one pass over the rows --------------------------------------------------------------------


def _run_chunks(
    hidden: Tensor,
    weight: Tensor,
    tokens: ValidTokens,
    options: LossOptions,
    chunk_tokens: int,
    grads: _Gradients,
) -> tuple[Tensor, Tensor]:
    """nll and weighted objective of every valid row, float32 [n] each; fills `grads`."""
    num_rows = tokens.labels.numel()
    nll = hidden.new_empty(num_rows, dtype=torch.float32)
    objective = torch.empty_like(nll)
    training = grads.x is not None or grads.weight is not None

    rows = hidden if tokens.covers_all else hidden.index_select(0, tokens.index)
    slab_shape = (min(chunk_tokens, num_rows), weight.shape[0])
    slab = hidden.new_empty(slab_shape, dtype=torch.float32)
    needs_rounding = training and weight.dtype != torch.float32
    rounded = weight.new_empty(slab_shape) if needs_rounding else None

    for start in range(0, num_rows, chunk_tokens):
        part = slice(start, min(start + chunk_tokens, num_rows))
        x, labels = rows[part], tokens.labels[part]
        row_weight = None if tokens.token_weight is None else tokens.token_weight[part]
        logits = slab[: len(x)]
        blocks = list(_vocab_blocks(weight))

        for block in blocks:
            _product_(logits[:, block], x, weight[block].T, accumulate=False)
        nll[part], objective[part] = _row_pass_(logits, labels, row_weight, options, training)
        d_logits = logits if rounded is None else rounded[: len(x)].copy_(logits)
        if grads.x is not None:
            for block in blocks:
                _product_(
                    grads.x[part], d_logits[:, block], weight[block], accumulate=block.start > 0
                )
        if grads.weight is not None:
            for block in blocks:
                _product_(grads.weight[block], d_logits[:, block].T, x, accumulate=True)
    return nll, objective


def _row_pass_(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor | None,
    options: LossOptions,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each row of a chunk; `logits` is overwritten, when training with its gradient.

    Args:
        logits: float32 [C, V], raw. On return the gradient of sum(objective) with respect to the
            raw logits when training, else scratch.
        labels: int64 [C].
        row_weight: float32 [C] or None.
        options: how logits become a loss.
        training: whether the gradient is needed.

    Returns:
        (nll, objective), float32 [C] each.
    """
    smoothing, target = options.label_smoothing, labels[:, None]
    if options.logit_scale != 1:
        logits.mul_(options.logit_scale)
    slope = None
    if options.softcap > 0:
        logits.div_(options.softcap).tanh_()
        if training:
            slope = logits.square().neg_().add_(1)  # d softcap / d logit = 1 - tanh^2
        logits.mul_(options.softcap)

    top = logits.amax(dim=1, keepdim=True)
    below_top = top - logits.gather(1, target)
    mean = logits.mean(dim=1, keepdim=True) if smoothing > 0 else None
    exp = logits.sub_(top).exp_()
    exp_sum = exp.sum(dim=1, keepdim=True)
    # Not lse - z_label: at logits of 1e4 that difference has lost all but three digits.
    nll = exp_sum.log() + below_top
    lse = exp_sum.log() + top

    objective = nll
    if mean is not None:
        objective = (1 - smoothing) * nll + smoothing * (lse - mean)
    if options.z_loss > 0:
        objective = objective + options.z_loss * lse.square()
    factor = torch.ones_like(nll) if row_weight is None else row_weight[:, None]
    objective = factor * objective

    if training:
        factor = factor * options.logit_scale
        grad = exp.mul_(factor * (1 + 2 * options.z_loss * lse) / exp_sum)
        if smoothing > 0:
            grad.sub_(factor * (smoothing / logits.shape[1]))
        # gather + scatter writes each row's one element, without the atomics of scatter_add.
        grad.scatter_(1, target, grad.gather(1, target) - factor * (1 - smoothing))
        if slope is not None:
            grad.mul_(slope)
    return nll.squeeze(1), objective.squeeze(1)


# ---- matrix products ---------------------------------------------------------------------------


def _vocab_blocks(weight: Tensor) -> Iterator[slice]:
    """Row ranges of `weight` to multiply at a time: all of an fp32 weight, blocks of others."""
    vocab_size = weight.shape[0]
    step = vocab_size if weight.dtype == torch.float32 else VOCAB_BLOCK
    for start in range(0, vocab_size, step):
        yield slice(start, min(start + step, vocab_size))


def _product_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b: fp32 `out` from operands of any dtype, products not rounded."""
    if a.dtype != torch.float32 and a.device.type == "cuda":
        product = torch.mm(a, b, out_dtype=torch.float32)
        if accumulate:
            out.add_(product)
        else:
            out.copy_(product)
    else:
        # beta=0 ignores what `out` held before, NaN included.
        out.addmm_(a.float(), b.float(), beta=1 if accumulate else 0)


# ---- the normalizer ----------------------------------------------------------------------------


def _is_zero_on_host(normalizer: float | Tensor) -> bool:
    """Whether the normalizer is known to be 0 without asking the device."""
    return not isinstance(normalizer, Tensor) and normalizer == 0


def _divide(value: Tensor, normalizer: float | Tensor) -> Tensor:
    """value / normalizer, and 0 (never NaN) where the normalizer is 0."""
    if isinstance(normalizer, Tensor):
        return torch.where(normalizer == 0, 0, value / normalizer)
    return torch.zeros_like(value) if normalizer == 0 else value / normalizer


def _scale_(grad: Tensor, scale: Tensor, normalizer: float | Tensor) -> Tensor:
    """grad *= scale; a normalizer of 0 also clears NaN, which 0 * NaN would keep."""
    grad.mul_(scale)
    if isinstance(normalizer, Tensor):
        grad.masked_fill_(normalizer == 0, 0)
    return grad
