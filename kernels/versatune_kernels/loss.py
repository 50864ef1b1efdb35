"""The public call: check, drop ignored rows, run a backend, sum per sample and domain.

How: `linear_cross_entropy` below is the order of work. The backends only see rows that carry a
label; everything else is the same for all of them.

What is not covered: shifting labels (they come shifted: labels[t] is the target of position t),
collectives (sums and normalizer are the caller's to reduce over ranks), a bias of the head.
"""

import torch
from torch import Tensor

from versatune_kernels import checks
from versatune_kernels.backends import resolve_backend
from versatune_kernels.chunked import chunked_loss
from versatune_kernels.contract import LossOptions, LossOutput, ValidTokens
from versatune_kernels.reference import reference_loss
from versatune_kernels.sizing import resolve_chunk_tokens
from versatune_kernels.sums import segment_sums


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    sample_ids: Tensor | None = None,
    num_samples: int | None = None,
    domain_ids: Tensor | None = None,
    num_domains: int | None = None,
    token_weight: Tensor | None = None,
    normalizer: float | Tensor = 1.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    chunk_tokens: int | str = "auto",
    backend: str = "auto",
    num_valid: int | None = None,
    validate: bool | None = None,
) -> LossOutput:
    """Cross-entropy of `hidden @ weight.T` against `labels`, without holding the logits.

    loss = sum over valid tokens of token_weight * (smoothed nll + z_loss * lse^2) / normalizer;
    the equations and their sources stand at the head of `reference.py`.

    Args:
        hidden: [N, H] or [B, T, H] (N = B * T); bf16, fp16 or fp32; any strides.
        weight: [V, H], the dtype and device of hidden. Its gradient arrives through autograd.
        labels: int32 or int64, [N] or hidden's leading shape, already shifted. Each is a class id
            in 0..V-1 or ignore_index.
        sample_ids: int32 or int64 like labels; the sample of each token, negative for none.
        num_samples: S, length of the per-sample sums; required with sample_ids, may be 0.
        domain_ids: int32 or int64 like labels; the domain of each token, negative for none.
        num_domains: k, length of the per-domain sums; required with domain_ids.
        token_weight: floating, like labels; factor of each token in the loss (not in the sums).
        normalizer: divisor of the loss, >= 0: a number, or a tensor of one number on hidden's
            device, which is not read by the host. 0 gives loss 0 and zero gradients, never NaN.
        ignore_index: the label of tokens that have no target.
        z_loss: factor of lse^2, >= 0.
        label_smoothing: in [0, 1), as in torch.nn.functional.cross_entropy.
        logit_scale: factor of the raw logits, > 0; applied before the softcap.
        softcap: logits become softcap * tanh(logits / softcap); 0 is off.
        chunk_tokens: rows of logits held at a time by the chunked backend; "auto": see `sizing.py`.
        backend: "auto", "chunked" or "reference"; see `backends.py`.
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
    checks.check_options(ignore_index, z_loss, label_smoothing, logit_scale, softcap)
    chosen = resolve_backend(backend)
    value_checks = checks.ValueChecks(validate, hidden.device)

    labels = checks.flat_tokens("labels", labels, hidden, checks.INTEGER_DTYPES)
    valid = labels != ignore_index
    checks.check_labels(labels, valid, weight.shape[0], value_checks)
    checks.check_num_valid(num_valid, valid, ignore_index, value_checks)
    if sample_ids is not None:
        sample_ids = checks.flat_tokens("sample_ids", sample_ids, hidden, checks.INTEGER_DTYPES)
    if domain_ids is not None:
        domain_ids = checks.flat_tokens("domain_ids", domain_ids, hidden, checks.INTEGER_DTYPES)
    checks.check_ids("sample_ids", sample_ids, "num_samples", num_samples, value_checks)
    checks.check_ids("domain_ids", domain_ids, "num_domains", num_domains, value_checks)
    if token_weight is not None:
        token_weight = checks.flat_tokens("token_weight", token_weight, hidden, checks.FLOAT_DTYPES)
    divisor = checks.check_normalizer(normalizer, hidden.device, value_checks)

    tokens = _valid_tokens(labels, valid, token_weight, divisor, num_valid)
    options = LossOptions(float(z_loss), float(label_smoothing), float(logit_scale), float(softcap))
    chunk = resolve_chunk_tokens(
        chunk_tokens, tokens.labels.numel(), weight.shape[1], weight.shape[0]
    )
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])

    # Autocast would round the fp32 parts of the arithmetic.
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        if chosen.name == "chunked":
            loss, nll = chunked_loss(flat_hidden, weight, tokens, options, chunk)
        else:
            loss, nll = reference_loss(flat_hidden, weight, tokens, options)

    token_loss = nll.new_zeros(labels.numel()).index_copy_(0, tokens.index, nll)
    sample_loss, sample_tokens = segment_sums(token_loss, valid, sample_ids, num_samples or 0)
    domain_loss, domain_tokens = segment_sums(token_loss, valid, domain_ids, num_domains or 0)
    return LossOutput(loss, token_loss, sample_loss, sample_tokens, domain_loss, domain_tokens)


def _valid_tokens(
    labels: Tensor,
    valid: Tensor,
    token_weight: Tensor | None,
    normalizer: float | Tensor,
    num_valid: int | None,
) -> ValidTokens:
    """The rows that carry a label, in the order of the batch."""
    if num_valid is None:
        index = valid.nonzero().squeeze(1)  # on CUDA the host waits here for the count
    else:
        # A stable sort of "ignored" puts valid rows first and keeps their order; the shape of the
        # result is known to the host, so it need not wait.
        index = torch.sort((~valid).to(torch.uint8), stable=True).indices[:num_valid]
    return ValidTokens(
        index=index,
        labels=labels.index_select(0, index).to(torch.int64),
        token_weight=None if token_weight is None else token_weight.index_select(0, index).float(),
        normalizer=normalizer,
        covers_all=index.numel() == labels.numel(),
    )
