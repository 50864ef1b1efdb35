"""KL divergence of a model's predictions from its base's, without the full logits.

For row i with logits z of `hidden` under `weight`, b of `base` under `base_weight` (or under `weight`, too),
after scale and cap, p = softmax(z), q = softmax(b):

    KL_i = sum_v q_v (log q_v - log p_v) = KL(base || hidden),     d KL_i / d z_v = p_v - q_v

"Forward" KL: what the base holds likely must stay likely. It is the distillation loss of Learning without
Forgetting (arXiv:1606.09282, the old network's outputs as targets) up to the base's entropy, a constant.

How: as `chunked.py`, the gradient is known as soon as the two softmaxes are. Logits of C rows are held at a
time, twice, in fp32; then d_x [C, H] = (p - q) @ weight, and d_weight [V, H] += (p - q).T @ x, summed in
fp32. Equal inputs give exactly 0 and gradient 0.

What is not covered: gradients of `base` and `base_weight`, which are frozen, and of single rows; a second
backward.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from versatune_kernels.chunked import row_blocks, vocab_blocks
from versatune_kernels.errors import KernelError
from versatune_kernels.products import product_
from versatune_kernels.sizing import auto_chunk_tokens


class LinearKL(NamedTuple):
    """What `linear_kl` returns."""

    total: Tensor
    """float32 [], sum over the rows; what has a gradient."""
    rows: Tensor
    """float32 [n], of each row, detached."""


def linear_kl(
    hidden: Tensor,
    base: Tensor,
    weight: Tensor,
    base_weight: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    chunk_tokens: int = 0,
) -> LinearKL:
    """KL(softmax(base @ base_weight.T) || softmax(hidden @ weight.T)) of each row, in nats.

    Args:
        hidden: [n, H] bf16, fp16 or fp32.
        base: [n, H] of the same dtype.
        weight: [V, H] of the same dtype.
        base_weight: [V, H] of the same dtype; None: `weight`, which must not need a gradient then.
        logit_scale, softcap: as in `linear_cross_entropy`, for both.
        chunk_tokens: rows whose logits are held at a time; 0: `kl_chunk_tokens`.

    Raises:
        KernelError: shapes or dtypes that do not fit, or a base that trains.
    """
    of_base = weight if base_weight is None else base_weight
    fits = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or hidden.shape != base.shape or weight.shape != of_base.shape:
        raise KernelError(
            f"hidden {list(hidden.shape)}, base {list(base.shape)}, weight {list(weight.shape)} and "
            f"base_weight {list(of_base.shape)} must be [n, H], [n, H], [V, H] and [V, H]"
        )
    if not hidden.dtype == base.dtype == weight.dtype == of_base.dtype:
        raise KernelError(f"dtypes differ: {hidden.dtype}, {base.dtype}, {weight.dtype}, {of_base.dtype}")
    if of_base.requires_grad or base.requires_grad:
        raise KernelError("the base gets no gradient here: its states and its weight must be frozen")
    found = _LinearKL.apply(hidden, base, weight, of_base, logit_scale, softcap, chunk_tokens)  # type: ignore[no-untyped-call]
    return LinearKL(*found)


def kl_chunk_tokens(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Rows whose logits are held at a time, twice: together as large as a chunk of the loss."""
    return max(1, auto_chunk_tokens(2 * num_tokens, hidden_size, vocab_size) // 2)


class _LinearKL(torch.autograd.Function):
    """Gradients of the total are computed in forward; backward multiplies them by its upstream."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        base: Tensor,
        weight: Tensor,
        base_weight: Tensor,
        scale: float,
        softcap: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        num_rows, (vocab_size, hidden_size) = len(hidden), weight.shape
        chunk = chunk or kl_chunk_tokens(num_rows, hidden_size, vocab_size)
        kl = hidden.new_empty(num_rows, dtype=torch.float32)
        trains_hidden, _, trains_weight, *_ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden, dtype=torch.float32) if trains_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if trains_weight else None
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            for start in range(0, num_rows, chunk):
                rows = slice(start, min(start + chunk, num_rows))
                both = ((hidden[rows], weight), (base[rows], base_weight))
                d_x = None if d_hidden is None else d_hidden[rows]
                kl[rows] = _chunk(*both, scale, softcap, d_x, d_weight)
        ctx.gradients, ctx.dtype = (d_hidden, d_weight), hidden.dtype
        ctx.mark_non_differentiable(kl)
        return kl.sum(), kl

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise KernelError("a second backward through linear_kl: its gradient was handed out already")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        scaled = [d if d is None else d.mul_(upstream).to(ctx.dtype) for d in (d_hidden, d_weight)]
        return scaled[0], None, scaled[1], None, None, None, None


def _chunk(
    model: tuple[Tensor, Tensor],
    base: tuple[Tensor, Tensor],
    scale: float,
    softcap: float,
    d_x: Tensor | None,
    d_weight: Tensor | None,
) -> Tensor:
    """KL of each row, float32 [C]; fills d_x [C, H] with its gradient and adds that of the weight.

    Args:
        model, base: hidden states [C, H] and output weight [V, H].
    """
    x, weight = model
    blocks = list(vocab_blocks(weight))
    both = x.new_empty((2, len(x), len(weight)), dtype=torch.float32)
    for logits, (states, head) in zip(both, (model, base), strict=True):
        for block in blocks:
            product_(logits[:, block], states, head[block].T, accumulate=False)
    kl = x.new_empty(len(x), dtype=torch.float32)
    gradient = both[0].view(weight.dtype)[:, : len(weight)]  # takes the place of the logits, as in `chunked`
    for rows in row_blocks(both[0]):
        z, b = both[0, rows], both[1, rows]
        slope = torch.full((), scale, dtype=torch.float32, device=x.device)
        for logits in (b, z):
            logits.mul_(scale)
            if softcap > 0:
                logits.div_(softcap).tanh_()
                slope = scale * (1 - logits.square())  # of the last one, z
                logits.mul_(softcap)
            logits.sub_(logits.logsumexp(1, keepdim=True))
        q = b.exp()
        kl[rows] = (q * b.sub_(z)).sum(1)
        if d_x is not None or d_weight is not None:
            gradient[rows] = z.exp_().sub_(q).mul_(slope).to(weight.dtype)
    for block in blocks:
        if d_x is not None:
            product_(d_x, gradient[:, block], weight[block], accumulate=block.start > 0, may_round=True)
        if d_weight is not None:
            product_(d_weight[block], gradient[:, block].T, x, accumulate=True, may_round=True)
    return kl
