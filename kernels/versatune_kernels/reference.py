"""The loss as a textbook writes it: full logits in fp32, gradients by autograd.

This file is the definition that every other backend is held against. With x = hidden[i] and
raw logits r = weight @ x,

    z      = softcap * tanh(logit_scale * r / softcap)      (softcap = 0: z = logit_scale * r)
    nll    = log sum_v exp(z_v) - z_label
    loss   = sum_i w_i * nll_i / normalizer

and with `by_probability` w_i * exp(-nll_i) in place of w_i, through which no gradient flows.

Sources: of the softcap Gemma 2 (arXiv:2408.00118), of `by_probability` DFT (arXiv:2508.05629).

What is not covered: memory. It holds several fp32 tensors of n * V elements.
"""

import torch
from torch import Tensor

from versatune_kernels.contract import ValidTokens


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: ValidTokens,
    logit_scale: float,
    softcap: float,
    by_probability: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and per-row negative log-likelihood.

    Args:
        hidden: [N, H] bf16, fp16 or fp32.
        weight: [V, H] of the same dtype.
        tokens: the rows that count.
        logit_scale, softcap, by_probability: as in `linear_cross_entropy`.

    Returns:
        (float32 [], float32 [n]); the first is differentiable in hidden and weight.
    """
    x = hidden.index_select(0, tokens.index).float()
    z = x @ weight.float().T * logit_scale  # [n, V]
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    # log_softmax keeps the small loss of a confident row, which logsumexp - z_label would round away.
    nll = -z.log_softmax(dim=1).gather(1, tokens.labels[:, None]).squeeze(1)
    per_token = nll if tokens.token_weight is None else tokens.token_weight * nll
    if by_probability:
        per_token = per_token * (-nll.detach()).exp()

    if float(tokens.normalizer) == 0:
        # Sums over no element: exactly 0 with exactly zero gradients, tied to both inputs.
        return (hidden[:0].sum() + weight[:0].sum()).float(), nll.detach()
    return (per_token.double().sum() / tokens.normalizer).float(), nll.detach()
