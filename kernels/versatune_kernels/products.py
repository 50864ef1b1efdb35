"""Matrix products of 16-bit operands that are rounded at most once, on every device.

How: on CUDA cuBLAS multiplies 16-bit operands, sums in fp32 and writes, or adds to, a result in
their dtype or in fp32 (`out_dtype`, torch 2.8 and later). On CPUs torch has no such product and may
round in between, so the operands are widened first. Results go straight into `out`, which may be a
view with padded rows.

What is not covered: TF32 for fp32 operands and reduced-precision sums inside cuBLAS; the settings
of `torch.backends.cuda.matmul` hold.
"""

import torch
from torch import Tensor


def product_(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b.

    Args:
        out: [M, N], the operands' dtype or fp32; without `accumulate` its old content is ignored,
            NaN included.
        a: [M, K].
        b: [K, N].
        accumulate: whether to add to `out`.
    """
    beta = 1 if accumulate else 0
    if out.dtype == a.dtype and (out.dtype == torch.float32 or a.is_cuda):
        out.addmm_(a, b, beta=beta)
    elif a.is_cuda and accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif out.dtype == torch.float32:
        out.addmm_(a.float(), b.float(), beta=beta)
    else:
        out.copy_(torch.addmm(out.float(), a.float(), b.float(), beta=beta))
