"""The loss as a textbook writes it: full logits in fp32, gradients by autograd.

This file is the definition that every other backend is held against. With x = hidden[i] and
raw logits r = weight @ x,

    z      = softcap * tanh(logit_scale * r / softcap)      (softcap = 0: z = logit_scale * r)
    lse    = log sum_v exp(z_v)
    nll    = lse - z_label
    smooth = lse - mean_v z_v
    loss   = sum_i w_i * ((1 - s) * nll_i + s * smooth_i + z_loss * lse_i^2) / normalizer

Sources: label smoothing as in torch.nn.functional.cross_entropy (Szegedy et al. 2016,
arXiv:1512.00567); z-loss: PaLM (arXiv:2204.02311, section 5); softcap: Gemma 2 (arXiv:2408.00118).

What is not covered: memory. It holds several fp32 tensors of n * V elements.
"""

import torch
from torch import Tensor

from versatune_kernels.contract import LossOptions, ValidTokens


def reference_loss(
    hidden: Tensor, weight: Tensor, tokens: ValidTokens, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """Loss and per-row negative log-likelihood.

    Args:
        hidden: [N, H] bf16, fp16 or fp32.
        weight: [V, H] of the same dtype.
        tokens: the rows that count.
        options: how logits become a loss.

    Returns:
        (float32 [], float32 [n]); the first is differentiable in hidden and weight.
    """
    x = hidden.index_select(0, tokens.index).float()
    z = x @ weight.float().T * options.logit_scale  # [n, V]
    if options.softcap > 0:
        z = options.softcap * torch.tanh(z / options.softcap)
    lse = z.logsumexp(dim=1)
    # log_softmax keeps the small loss of a confident row, which lse - z_label would round away.
    nll = -z.log_softmax(dim=1).gather(1, tokens.labels[:, None]).squeeze(1)

    per_token = nll
    if options.label_smoothing > 0:
        smooth = lse - z.mean(dim=1)
        per_token = (1 - options.label_smoothing) * nll + options.label_smoothing * smooth
    if options.z_loss > 0:
        per_token = per_token + options.z_loss * lse.square()
    if tokens.token_weight is not None:
        per_token = tokens.token_weight * per_token

    if float(tokens.normalizer) == 0:
        # Sums over no element: exactly 0 with exactly zero gradients, tied to both inputs.
        return (hidden[:0].sum() + weight[:0].sum()).float(), nll.detach()
    return (per_token.double().sum() / tokens.normalizer).float(), nll.detach()
