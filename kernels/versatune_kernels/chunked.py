"""The portable backend: gradients computed in the forward pass, one chunk of rows at a time.

How: for the scalar loss the gradient of every logit is known as soon as the row's softmax is, up
to the upstream factor. So one pass over the rows does all the work, and a training call costs
three matrix products per chunk instead of the four of "recompute the logits in backward":

    1. logits   [C, V]  = x [C, H] @ weight.T            result in fp32
    2. in place [C, V]: softmax, loss, gradient of the logits (fp32), then rounded to weight.dtype;
       a few rows at a time, which stay in the CPU's cache from the first operation to the last
    3. d_x      [C, H]  = d_logits @ weight              sum in fp32
    4. d_weight [V, H] += d_logits.T @ x                 sum in fp32

backward (`fused_op.py`) multiplies both results by upstream / normalizer and rounds each once to
its own dtype. Rows whose label is ignored are dropped before step 1.

Precision: with p = softmax(z), label y and token weight w,

    d loss / d z_v = w * (p_v - [v = y])        (with `by_probability` w * p_y in place of w)

is formed in fp32 and rounded afterwards: p - 1 of a confident target rounded too early is 0.
On CPUs that multiply bf16, each product of steps 3 and 4 (a chunk and a block of the vocabulary) is
rounded to bf16 before it enters its fp32 sum: errors average out there, and it takes half the time.
1 / normalizer stays out of the logits' gradients, where it would underflow in fp16. Summing the
chunks' weight gradients in bf16 instead loses accuracy with every chunk (a known training bug).

What is not covered: `logits_dtype="compute"` (logits are always fp32 here). The CUDA branch of
`product_` has not been run on a GPU yet.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from versatune_kernels.contract import ForwardPass, Spec, ValidTokens
from versatune_kernels.products import product_
from versatune_kernels.sizing import auto_chunk_tokens

VOCAB_BLOCK = 8192
"""16-bit weights are multiplied this many rows at a time: the fp32 copy of a block that the
portable product needs is then small beside a chunk (H = 5120: 168 MB)."""

CPU_ROW_BLOCK_BYTES = 2 * 2**20
"""Logits that step 2 works on at a time: about what a core's caches hold."""

GPU_ROW_BLOCK_BYTES = 128 * 2**20
"""The same on a GPU: few enough launches, and a 16-bit copy that is small beside a chunk."""


def chunked_pass(hidden: Tensor, weight: Tensor, tokens: ValidTokens, spec: Spec) -> ForwardPass:
    """Loss of every row and the gradients, without the full logits.

    Args:
        hidden: [N, H] bf16, fp16 or fp32.
        weight: [V, H] of the same dtype.
        tokens: the rows that count.
        spec: how logits become a loss, which gradients, and the size of the chunks.

    Returns:
        ForwardPass; both gradients are float32.
    """
    num_rows, (vocab_size, hidden_size) = tokens.labels.numel(), weight.shape
    chunk = spec.chunk_tokens or auto_chunk_tokens(num_rows, hidden_size, vocab_size)
    nll = hidden.new_empty(num_rows, dtype=torch.float32)
    objective = torch.empty_like(nll)
    d_hidden = d_weight = None
    if spec.grad_hidden:
        d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
    if spec.grad_weight:
        d_weight = weight.new_empty(weight.shape, dtype=torch.float32)
        if num_rows == 0:
            d_weight.zero_()

    rows = min(chunk, num_rows)
    buffers = _Buffers(
        logits=hidden.new_empty((rows, vocab_size), dtype=torch.float32),
        d_x=hidden.new_empty((rows, hidden_size), dtype=torch.float32) if spec.grad_hidden else None,
    )
    for start in range(0, num_rows, chunk):
        part = slice(start, min(start + chunk, num_rows))
        _run_chunk(hidden, weight, tokens, spec, part, buffers, nll, objective, d_hidden, d_weight)

    is_zero = tokens.nonzero == 0
    for gradient in (d_hidden, d_weight):
        # Beside NaN a product with 0 would not do. On the CPU reading the number costs nothing.
        if gradient is not None and (gradient.device.type != "cpu" or bool(is_zero)):
            gradient.masked_fill_(is_zero, 0)
    return ForwardPass(nll, objective, d_hidden, d_weight, tokens.inverse)


class _Buffers(NamedTuple):
    """Memory that every chunk uses again."""

    logits: Tensor
    """float32 [C, V]; becomes the gradient of the logits."""
    d_x: Tensor | None
    """float32 [C, H], when rows are gathered."""


def _run_chunk(
    hidden: Tensor,
    weight: Tensor,
    tokens: ValidTokens,
    spec: Spec,
    part: slice,
    buffers: _Buffers,
    nll: Tensor,
    objective: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Fill the part's rows of `nll`, `objective` and `d_hidden`; add to `d_weight`."""
    x = hidden[part] if tokens.covers_all else hidden.index_select(0, tokens.index[part])
    row_weight = None if tokens.token_weight is None else tokens.token_weight[part]
    logits = buffers.logits[: len(x)]
    blocks = list(vocab_blocks(weight))
    for block in blocks:
        product_(logits[:, block], x, weight[block].T, accumulate=False)
    training = d_hidden is not None or d_weight is not None
    # 16-bit: a row's gradient takes the first half of the memory of its fp32 logits.
    d_logits = logits.view(weight.dtype)[:, : len(weight)]
    for rows in row_blocks(logits):
        place = slice(part.start + rows.start, part.start + rows.stop)
        block_weight = None if row_weight is None else row_weight[rows]
        nll[place], objective[place] = _row_pass_(
            logits[rows], tokens.labels[place], block_weight, spec, training
        )
        if training and weight.dtype != logits.dtype:
            d_logits[rows] = logits[rows].to(weight.dtype)  # by way of a copy: both overlap
    if d_hidden is not None and buffers.d_x is not None:
        d_x = buffers.d_x[: len(x)]
        for block in blocks:
            product_(
                d_x,
                d_logits[:, block],
                weight[block],
                accumulate=block.start > 0,
                may_round=True,
            )
        d_hidden.index_copy_(0, tokens.index[part], d_x)
    if d_weight is not None:
        for block in blocks:
            product_(
                d_weight[block],
                d_logits[:, block].T,
                x,
                accumulate=part.start > 0,
                may_round=True,
            )


def _row_pass_(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor | None,
    spec: Spec,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Loss of each row of a block; `logits` is overwritten, when training with its gradient.

    Args:
        logits: float32 [R, V], raw. On return the gradient of sum(objective) with respect to the
            raw logits when training, else scratch.
        labels: int64 [R].
        row_weight: float32 [R] or None.
        spec: how logits become a loss.
        training: whether the gradient is needed.

    Returns:
        (nll, objective), float32 [R] each.
    """
    target = labels[:, None]
    if spec.logit_scale != 1:
        logits.mul_(spec.logit_scale)
    slope = None
    if spec.softcap > 0:
        logits.div_(spec.softcap).tanh_()
        if training:
            slope = logits.square().neg_().add_(1)  # d softcap / d logit = 1 - tanh^2
        logits.mul_(spec.softcap)

    top = logits.amax(dim=1, keepdim=True)
    below_top = top - logits.gather(1, target)
    exp = logits.sub_(top).exp_()
    exp_sum = exp.sum(dim=1, keepdim=True)
    # Not lse - z_label: at logits of 1e4 that difference has lost all but three digits.
    nll = exp_sum.log() + below_top

    factor = torch.ones_like(nll) if row_weight is None else row_weight[:, None]
    if spec.by_probability:
        factor = factor * (-nll).exp()
    objective = factor * nll

    if training:
        factor = factor * spec.logit_scale
        grad = exp.mul_(factor / exp_sum)
        # gather + scatter writes each row's one element, without the atomics of scatter_add.
        grad.scatter_(1, target, grad.gather(1, target) - factor)
        if slope is not None:
            grad.mul_(slope)
    return nll.squeeze(1), objective.squeeze(1)


def vocab_blocks(weight: Tensor) -> Iterator[slice]:
    """Row ranges of `weight` to multiply at a time: all of an fp32 weight, blocks of others."""
    vocab_size = weight.shape[0]
    step = vocab_size if weight.dtype == torch.float32 else VOCAB_BLOCK
    for start in range(0, vocab_size, step):
        yield slice(start, min(start + step, vocab_size))


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Ranges of rows to take from logits to their gradient at a time."""
    block_bytes = GPU_ROW_BLOCK_BYTES if logits.is_cuda else CPU_ROW_BLOCK_BYTES
    step = max(1, block_bytes // (4 * logits.shape[1]))
    for start in range(0, len(logits), step):
        yield slice(start, min(start + step, len(logits)))
