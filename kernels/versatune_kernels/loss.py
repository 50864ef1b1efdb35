"""The public call: check what the host knows, then run the operator or the reference.

How: everything that reads tensor values happens in `fused_op.py`, in one operator of torch; the
reference is the same work written as plain autograd. The backends only see rows that carry a label.

What is not covered: shifting labels (they come shifted: labels[t] is the target of position t),
collectives (sums and normalizer are the caller's to reduce over ranks), a bias of the head.
"""

import torch
from torch import Tensor

from versatune_kernels import checks
from versatune_kernels.backends import check_name
from versatune_kernels.contract import LossOutput
from versatune_kernels.fused_op import NUM_OUTPUTS, linear_cross_entropy_op
from versatune_kernels.reference import reference_loss
from versatune_kernels.sums import segment_sums
from versatune_kernels.tokens import valid_tokens


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    chunk_tokens: int | str = "auto",
    logits_dtype: str = "fp32",
    by_probability: bool = False,
    backend: str = "auto",
    num_valid: int | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """Cross-entropy of `hidden @ weight.T` against `labels`, without holding the logits.

    loss = sum over valid tokens of token_weight * nll / normalizer; the equations stand in `reference.py`.

    Args:
        hidden: [N, H] or [B, T, H] (N = B * T); bf16, fp16 or fp32; any strides.
        weight: [V, H], the dtype and device of hidden. Its gradient arrives through autograd.
        labels: int32 or int64, [N] or hidden's leading shape, already shifted. Each is a class id
            in 0..V-1 or ignore_index.
        sample_ids: int32 or int64 like labels; the sample of each token, negative for none.
        num_samples: S, length of the per-sample sums; required with sample_ids, may be 0.
        token_weight: floating, like labels; factor of each token in the loss (not in the sums).
        normalizer: divisor of the loss, >= 0: a number, or a tensor of one number on hidden's
            device, which is not read by the host. 0 gives loss 0 and zero gradients, never NaN.
        ignore_index: the label of tokens that have no target.
        logit_scale: factor of the raw logits, > 0; applied before the softcap.
        softcap: logits become softcap * tanh(logits / softcap); 0 is off.
        chunk_tokens: rows of logits held at a time (not by the reference); "auto": `sizing.py`.
        logits_dtype: "fp32", or "compute": the dtype of hidden, as a model in 16-bit computes them,
            at half the memory and less accuracy. The triton backend obeys; the others hold fp32.
        by_probability: multiply each token's loss by its own probability exp(-nll), taken as a constant
            (dynamic fine-tuning, arXiv:2508.05629); the sums stay those of nll.
        backend: "auto", "triton", "chunked" or "reference"; see `backends.py`.
        num_valid: number of labels that differ from ignore_index, where the host knows it. On CUDA
            it saves the one moment where the host waits for the device.
        validate: whether to check values (label and id ranges, num_valid). None: on CUDA by
            device-side asserts that do not make the host wait, elsewhere with a KernelError. True:
            always with a KernelError. False: not at all.

    Returns:
        LossOutput. Only its `loss` is differentiable, in hidden and weight. One backward per call.

    Raises:
        KernelError: wrong shape, dtype, device, option, label, id or backend.
    """
    checks.check_matrices(hidden, weight)
    checks.check_options(ignore_index, logit_scale, softcap, chunk_tokens, logits_dtype)
    check_name(backend)
    labels = checks.flat_tokens("labels", labels, hidden, checks.INTEGER_DTYPES)
    checks.check_num_valid(num_valid, labels.numel())
    checks.check_samples(sample_ids, num_samples)
    if sample_ids is not None:
        sample_ids = checks.flat_tokens("sample_ids", sample_ids, hidden, checks.INTEGER_DTYPES)
    if token_weight is not None:
        token_weight = checks.flat_tokens("token_weight", token_weight, hidden, checks.FLOAT_DTYPES)
    divisor = checks.as_normalizer(normalizer, hidden.device)
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    num_samples = num_samples or 0

    if backend == "reference":
        value_checks = checks.ValueChecks(validate, hidden.device)
        checks.check_values(
            value_checks,
            labels,
            ignore_index,
            weight.shape[0],
            num_valid,
            sample_ids,
            num_samples,
            divisor,
        )
        tokens = valid_tokens(labels, token_weight, divisor, ignore_index, num_valid)
        # Autocast would round the fp32 parts of the arithmetic.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            loss, nll = reference_loss(
                flat_hidden, weight, tokens, float(logit_scale), float(softcap), by_probability
            )
        token_loss = nll.new_zeros(labels.numel()).index_copy_(0, tokens.index, nll)
        return LossOutput(
            loss, token_loss, *segment_sums(token_loss, labels, ignore_index, sample_ids, num_samples)
        )

    training = torch.is_grad_enabled()
    outputs = linear_cross_entropy_op(
        flat_hidden,
        weight,
        labels,
        sample_ids,
        token_weight,
        divisor,
        num_samples,
        num_valid,
        ignore_index,
        validate,
        float(logit_scale),
        float(softcap),
        logits_dtype,
        0 if chunk_tokens == "auto" else chunk_tokens,
        training and flat_hidden.requires_grad,
        training and weight.requires_grad,
        by_probability,
        backend,
    )
    return LossOutput(*outputs[:NUM_OUTPUTS])
