"""The Triton backend: cuBLAS for the products, one kernel in place for everything between them.

How: the same three products per chunk as `chunked.py` explains, with these differences.

    1. logits   [C, V]  = x @ weight.T         fp32, or the weight's dtype (`logits_dtype`)
    2. row_kernel: loss, and the gradient over the logits' own memory, rounded to weight.dtype
    3. d_hidden [C, H]  = d_logits @ weight    written in hidden's dtype
    4. d_weight [V, H] += d_logits.T @ x       few chunks: weight's dtype; many: fp32 (`sizing.py`)

Only one buffer of C * V logits exists. Under fp32 logits and a 16-bit weight the gradient of row i
takes the first half of the row's memory; the products of step 3 and 4 see it as rows that are
2 * stride apart.

1 / normalizer is read on the device and goes into the logits' gradients, so that backward has
nothing left to do but multiply by the upstream gradient, in place. fp16 is the exception: 1 / N
would underflow there, and sums that are not normalized could overflow. Its gradients stay in fp32
until backward.

What is not covered: the kernels have only run in Triton's interpreter and been compiled for
Ampere, Hopper and Blackwell; nothing here has run on a GPU yet.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from versatune_kernels import checks, triton_kernels
from versatune_kernels.contract import ForwardPass, Spec, ValidTokens
from versatune_kernels.products import fp32_partial_sums, product_
from versatune_kernels.sizing import DEFAULT_MULTIPROCESSORS, row_stride, triton_chunks
from versatune_kernels.sums import SegmentSums, segment_sums

VOCAB_TILE = 4096
"""Logits that a program of the row kernel holds at a time: 16 per thread of 8 warps."""

TILE_ROWS = 2
"""Of a tile, over which each lane keeps a maximum and a sum of its own: with 2,048 lanes a thread of 8 warps
has 8, and no other thread's values go into them."""

TOKEN_TILE = 1024
"""Tokens that a program of the token and segment kernels reads at a time."""

SCALE_TILE = 4096
"""Elements of a gradient that a program scales at a time."""

MAX_SEGMENT_READS = 2**28
"""Every segment's program reads every id; above so many reads sorting the ids is cheaper."""


@fp32_partial_sums()
def triton_pass(hidden: Tensor, weight: Tensor, tokens: ValidTokens, spec: Spec) -> ForwardPass:
    """Loss of every row and the gradients; arguments as `chunked.chunked_pass`.

    Returns:
        ForwardPass; gradients in the dtype of their tensor, float32 for float16.
    """
    num_rows, (vocab_size, hidden_size) = tokens.labels.numel(), weight.shape
    chunk, fp32_sum = triton_chunks(
        spec, num_rows, hidden_size, vocab_size, weight.dtype, _multiprocessors(hidden.device)
    )
    if weight.dtype == torch.float16:
        factor, pending, grad_dtype = torch.ones_like(tokens.inverse), tokens.inverse, torch.float32
    else:
        factor, pending, grad_dtype = tokens.inverse, tokens.nonzero, weight.dtype

    nll = hidden.new_empty(num_rows, dtype=torch.float32)
    objective = torch.empty_like(nll)
    d_hidden = d_weight = None
    if spec.grad_hidden:
        empty = torch.empty if tokens.covers_all else torch.zeros
        d_hidden = empty(hidden.shape, dtype=grad_dtype, device=hidden.device)
    if spec.grad_weight:
        # With no row there is no product that would write it.
        empty = torch.empty if num_rows else torch.zeros
        dtype = torch.float32 if fp32_sum else grad_dtype
        d_weight = empty(weight.shape, dtype=dtype, device=weight.device)

    logits, d_logits = _slab(weight, min(chunk, num_rows), spec)
    for start in range(0, num_rows, chunk):
        part = slice(start, min(start + chunk, num_rows))
        x = hidden[part] if tokens.covers_all else hidden.index_select(0, tokens.index[part])
        z, d_z = logits[: len(x)], d_logits[: len(x)]
        product_(z, x, weight.T, accumulate=False)
        _launch_rows(z, d_z, tokens, part, factor, nll, objective, spec)
        if d_hidden is not None and tokens.covers_all:
            product_(d_hidden[part], d_z, weight, accumulate=False)
        elif d_hidden is not None:
            d_x = d_hidden.new_empty(x.shape)
            product_(d_x, d_z, weight, accumulate=False)
            d_hidden.index_copy_(0, tokens.index[part], d_x)
        if d_weight is not None:
            product_(d_weight, d_z.T, x, accumulate=start > 0)
    del logits, d_logits  # before the sum is rounded
    if d_weight is not None:
        d_weight = d_weight.to(grad_dtype)
    return ForwardPass(nll, objective, d_hidden, d_weight, pending)


def triton_tokens(
    labels: Tensor,
    token_weight: Tensor | None,
    normalizer: Tensor,
    ignore_index: int,
    num_valid: int | None,
    *,
    ids: Tensor | None,
    num_segments: int,
    vocab_size: int,
    check: bool,
) -> ValidTokens:
    """`tokens.valid_tokens` in one launch, where that takes a dozen and its sort.

    Args:
        ids: integer [N], or None; only to be checked.
        num_segments: S.
        vocab_size: V.
        check: whether the device asserts what `checks.check_values` asks, in one more launch.
        The others as there.
    """
    if num_valid is None:
        num_valid = int((labels != ignore_index).sum())
    index = torch.empty(num_valid, dtype=torch.int64, device=labels.device)
    kept_labels = torch.empty_like(index)
    kept_weight = None if token_weight is None else torch.empty_like(index, dtype=torch.float32)
    inverse, nonzero, holds = (torch.empty((), dtype=torch.float32, device=labels.device) for _ in range(3))
    with _on(labels.device):
        triton_kernels.tokens_kernel[(1,)](
            labels.contiguous(),
            labels if ids is None else ids.contiguous(),
            inverse if token_weight is None else token_weight.contiguous(),
            normalizer,
            index,
            kept_labels,
            inverse if kept_weight is None else kept_weight,
            inverse,
            nonzero,
            holds,
            labels.numel(),
            num_valid,
            ignore_index,
            vocab_size,
            num_segments,
            HAS_IDS=ids is not None,
            HAS_TOKEN_WEIGHT=token_weight is not None,
            TILE=TOKEN_TILE,
            num_warps=4,
        )
    if check:
        torch._assert_async(holds, checks.BAD_INPUT)
    covers_all = num_valid == labels.numel()
    return ValidTokens(
        index, kept_labels, kept_weight, normalizer, inverse, nonzero, covers_all, ignore_index
    )


def _slab(weight: Tensor, rows: int, spec: Spec) -> tuple[Tensor, Tensor]:
    """[C, V] views for logits and, over the same memory, their gradient in the weight's dtype."""
    vocab_size = weight.shape[0]
    dtype = torch.float32 if spec.logits_dtype == "fp32" else weight.dtype
    slab = torch.empty((rows, row_stride(vocab_size)), dtype=dtype, device=weight.device)
    return slab[:, :vocab_size], slab.view(weight.dtype)[:, :vocab_size]


def _launch_rows(
    logits: Tensor,
    d_logits: Tensor,
    tokens: ValidTokens,
    part: slice,
    factor: Tensor,
    nll: Tensor,
    objective: Tensor,
    spec: Spec,
) -> None:
    """Run the row kernel on a chunk: the part's nll and objective, and `d_logits`."""
    has_weight = tokens.token_weight is not None
    tile = min(VOCAB_TILE, triton.next_power_of_2(logits.shape[1]))
    with _on(logits.device):
        triton_kernels.row_kernel[(len(logits),)](
            logits,
            d_logits,
            tokens.labels[part],
            tokens.token_weight[part] if tokens.token_weight is not None else factor,
            factor,
            nll[part],
            objective[part],
            logits.stride(0),
            d_logits.stride(0),
            tokens.ignore_index,
            spec.logit_scale,
            spec.softcap,
            VOCAB_SIZE=logits.shape[1],
            HAS_TOKEN_WEIGHT=has_weight,
            HAS_SOFTCAP=spec.softcap > 0,
            BY_PROBABILITY=spec.by_probability,
            TRAINING=spec.grad_hidden or spec.grad_weight,
            TILE=tile,
            LANES=max(tile // TILE_ROWS, 1),
            num_warps=8,
        )


def triton_segment_sums(
    values: Tensor, labels: Tensor, ignore_index: int, ids: Tensor | None, num_segments: int
) -> SegmentSums:
    """Sums, counts and squares per id; arguments and result as `sums.segment_sums`."""
    num_tokens = values.numel()
    if ids is None or num_segments == 0 or num_tokens * num_segments > MAX_SEGMENT_READS:
        return segment_sums(values, labels, ignore_index, ids, num_segments)
    sums = torch.empty(num_segments, dtype=torch.float64, device=values.device)
    counts = torch.empty(num_segments, dtype=torch.int64, device=values.device)
    squares = torch.empty_like(sums)
    with _on(values.device):
        triton_kernels.segment_kernel[(num_segments,)](
            values.contiguous(),
            labels.contiguous(),
            ids.contiguous(),
            sums,
            counts,
            squares,
            num_tokens,
            ignore_index,
            TILE=TOKEN_TILE,
            num_warps=4,
        )
    return SegmentSums(sums, counts, squares)


def scaled_gradient(
    gradient: Tensor, upstream: Tensor, pending: Tensor, dtype: torch.dtype, *, in_place: bool
) -> Tensor:
    """gradient * upstream * pending as `dtype`, rounded once.

    Args:
        gradient: contiguous, of any shape.
        upstream: float32 [].
        pending: float32 []. 0 gives zeros, also beside NaN.
        dtype: of the result.
        in_place: whether the result may take the gradient's memory, where the dtypes agree.
    """
    in_place = in_place and gradient.dtype == dtype
    out = gradient if in_place else torch.empty_like(gradient, dtype=dtype)
    if gradient.numel() == 0:
        return out
    tiles = triton.cdiv(gradient.numel(), SCALE_TILE)
    with _on(gradient.device):
        triton_kernels.scale_kernel[(min(tiles, 8 * _multiprocessors(gradient.device)),)](
            gradient,
            out,
            upstream,
            pending,
            gradient.numel(),
            IN_PLACE=in_place,
            TILE=SCALE_TILE,
            num_warps=8,
        )
    return out


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
