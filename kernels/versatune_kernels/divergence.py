"""KL divergence of two sets of hidden states under one output layer, without the full logits.

For row i with logits z of `hidden` and b of `base`, after scale and cap, p = softmax(z), q = softmax(b):

    KL_i = sum_v q_v (log q_v - log p_v) = KL(base || hidden),     d KL_i / d z_v = p_v - q_v

"Forward" KL: what the base holds likely must stay likely. It is the distillation loss of Learning without
Forgetting (arXiv:1606.09282, the old network's outputs as targets) up to the base's entropy, a constant.

How: as `chunked.py`, the gradient is known as soon as the two softmaxes are. Logits of C rows are held at a
time, twice, in fp32; then d_x [C, H] = (p - q) @ weight. Equal hidden states give exactly 0 and gradient 0.

What is not covered: gradients of `base` and of `weight`, which are frozen; a second backward.
"""

from typing import Any

import torch
from torch import Tensor

from versatune_kernels.chunked import row_blocks, vocab_blocks
from versatune_kernels.errors import KernelError
from versatune_kernels.products import product_
from versatune_kernels.sizing import auto_chunk_tokens


def linear_kl(
    hidden: Tensor,
    base: Tensor,
    weight: Tensor,
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    chunk_tokens: int = 0,
) -> Tensor:
    """KL(softmax(base @ weight.T) || softmax(hidden @ weight.T)) of each row, in nats.

    Args:
        hidden: [n, H] bf16, fp16 or fp32; the only input with a gradient.
        base: [n, H] of the same dtype.
        weight: [V, H] of the same dtype; must not need a gradient.
        logit_scale, softcap: as in `linear_cross_entropy`, for both.
        chunk_tokens: rows whose logits are held at a time; 0: `kl_chunk_tokens`.

    Returns:
        float32 [n].

    Raises:
        KernelError: shapes or dtypes that do not fit, or a weight that trains.
    """
    if hidden.shape != base.shape or hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:]:
        raise KernelError(
            f"hidden {list(hidden.shape)}, base {list(base.shape)} and weight {list(weight.shape)} must be "
            "[n, H], [n, H] and [V, H]"
        )
    if not hidden.dtype == base.dtype == weight.dtype:
        raise KernelError(f"dtypes differ: {hidden.dtype}, {base.dtype}, {weight.dtype}")
    if weight.requires_grad or base.requires_grad:
        raise KernelError("weight and base get no gradient here: both must be frozen")
    kl: Tensor = _LinearKL.apply(hidden, base, weight, logit_scale, softcap, chunk_tokens)  # type: ignore[no-untyped-call]
    return kl


def kl_chunk_tokens(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Rows whose logits are held at a time, twice: together as large as a chunk of the loss."""
    return max(1, auto_chunk_tokens(2 * num_tokens, hidden_size, vocab_size) // 2)


class _LinearKL(torch.autograd.Function):
    """The gradient of each row's KL is computed in forward; backward multiplies it by the row's upstream."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, base: Tensor, weight: Tensor, scale: float, softcap: float, chunk: int
    ) -> Tensor:
        num_rows, (vocab_size, hidden_size) = len(hidden), weight.shape
        chunk = chunk or kl_chunk_tokens(num_rows, hidden_size, vocab_size)
        kl = hidden.new_empty(num_rows, dtype=torch.float32)
        d_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if hidden.requires_grad else None
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            for start in range(0, num_rows, chunk):
                rows = slice(start, min(start + chunk, num_rows))
                d_x = None if d_hidden is None else d_hidden[rows]
                kl[rows] = _chunk(hidden[rows], base[rows], weight, scale, softcap, d_x)
        ctx.d_hidden, ctx.dtype = d_hidden, hidden.dtype
        return kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        d_hidden, ctx.d_hidden = ctx.d_hidden, None
        if d_hidden is None:
            raise KernelError("a second backward through linear_kl: its gradient was handed out already")
        return d_hidden.mul_(upstream[0].unsqueeze(1)).to(ctx.dtype), None, None, None, None, None


def _chunk(
    x: Tensor, base: Tensor, weight: Tensor, scale: float, softcap: float, d_x: Tensor | None
) -> Tensor:
    """KL of each row, float32 [C]; fills d_x [C, H] with its gradient."""
    blocks = list(vocab_blocks(weight))
    both = x.new_empty((2, len(x), len(weight)), dtype=torch.float32)
    for logits, states in zip(both, (x, base), strict=True):
        for block in blocks:
            product_(logits[:, block], states, weight[block].T, accumulate=False)
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
        if d_x is not None:
            gradient[rows] = z.exp_().sub_(q).mul_(slope).to(weight.dtype)
    if d_x is not None:
        for block in blocks:
            product_(d_x, gradient[:, block], weight[block], accumulate=block.start > 0, may_round=True)
    return kl
