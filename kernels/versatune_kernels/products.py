"""Matrix products of 16-bit operands that are rounded at most once, on every device.

How: on CUDA cuBLAS multiplies 16-bit operands, sums in fp32 and writes, or adds to, a result in
their dtype or in fp32 (`out_dtype`, torch 2.8 and later). On CPUs torch has no such product and may
round in between, so the operands are widened first, except where the caller allows one rounding and
the CPU multiplies bf16: that takes about half the time. Results go straight into `out`, which may be
a view with padded rows.

What is not covered: TF32 for fp32 operands; the setting of `torch.backends.cuda.matmul` holds.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
"""Settings of torch, on by default."""


@contextlib.contextmanager
def fp32_partial_sums() -> Iterator[None]:
    """Within it cuBLAS keeps the parts of a sum that it cuts up (split-K) in fp32, not in the result's bits.

    It may cut where a product has few tiles and long sums: few rows times a vocabulary. With parts in bf16,
    emulated (16 rows, H 64, V 152,064, sigma 3), the error of d_hidden is 0.20 % whole, 0.27 in 2 parts and
    up to 0.40 in 8.
    """
    settings = torch.backends.cuda.matmul
    changed = [name for name in REDUCTIONS if getattr(settings, name)]
    for name in changed:
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name in changed:
            setattr(settings, name, True)


def product_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool, may_round: bool = False) -> None:
    """out = a @ b, or out += a @ b.

    Args:
        out: [M, N], the operands' dtype or fp32; without `accumulate` its old content is ignored,
            NaN included.
        a: [M, K].
        b: [K, N].
        accumulate: whether to add to `out`.
        may_round: whether the product (not the sum in `out`) may be rounded to the operands' dtype
            on its way to an fp32 `out`. A gradient is rounded to it in the end anyway; a logit that
            goes through a softmax should not be.
    """
    beta = 1 if accumulate else 0
    if out.dtype == a.dtype and (out.dtype == torch.float32 or a.is_cuda):
        out.addmm_(a, b, beta=beta)
    elif a.is_cuda and accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif may_round and a.dtype == torch.bfloat16 and _cpu_multiplies_bf16():
        product = torch.mm(a, b)
        out.add_(product) if accumulate else out.copy_(product)
    elif out.dtype == torch.float32:
        out.addmm_(a.float(), b.float(), beta=beta)
    else:
        out.copy_(torch.addmm(out.float(), a.float(), b.float(), beta=beta))


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 with instructions of the CPU (AVX512-BF16), summing in fp32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
