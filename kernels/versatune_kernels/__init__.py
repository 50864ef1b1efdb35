"""Fused linear + cross-entropy with per-token and per-sample losses.

What: `linear_cross_entropy(hidden, weight, labels, ...)` is the language-model head and its loss in
one differentiable call. It never holds the full logits matrix and returns the loss of every token and
sample next to the scalar that is trained on.

`linear_kl` is its companion: the KL divergence of what a model predicts from what its base predicts.

How: one signature, several backends (`reference`: readable and slow; `chunked`: portable; `triton`:
for GPUs), picked by `backend=`. Read `contract.py` for what comes out, `fused_op.py` for the order
of work, `chunked.py` for the arithmetic, `triton_kernels.py` for its fast form.

What is not covered: a head whose vocabulary is split over ranks.

The package needs torch only (and Triton for its backend) and is usable by itself.
"""

from versatune_kernels.backends import ResolvedBackend, resolve_backend
from versatune_kernels.contract import LossOutput
from versatune_kernels.divergence import LinearKL, linear_kl
from versatune_kernels.errors import KernelError
from versatune_kernels.loss import linear_cross_entropy
from versatune_kernels.sizing import auto_chunk_tokens

__all__ = [
    "KernelError",
    "LinearKL",
    "LossOutput",
    "ResolvedBackend",
    "auto_chunk_tokens",
    "linear_cross_entropy",
    "linear_kl",
    "resolve_backend",
]
