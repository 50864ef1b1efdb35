"""The fused loss as one operator of torch, for eager mode, torch.compile and CUDA graphs.

How: `versatune_kernels::linear_cross_entropy` does everything that reads values: checks, dropping
ignored rows, the backend's pass, sums. To torch.compile it is one opaque node whose output shapes
follow from its inputs' (`_fake`). It also returns both gradients, complete but for one factor;
backward multiplies them by the upstream gradient, in place, and hands them out. They exist once,
so there is one backward per call.

What is not covered: gradients of gradients; a second backward (an error); the reference backend,
which is plain autograd.
"""

from typing import Any

import torch
from torch import Tensor

from versatune_kernels import checks
from versatune_kernels.backends import resolve_backend
from versatune_kernels.chunked import chunked_pass
from versatune_kernels.contract import Spec
from versatune_kernels.errors import KernelError
from versatune_kernels.sums import segment_sums
from versatune_kernels.tokens import valid_tokens

NUM_OUTPUTS = 5
"""Leading outputs of the operator: the fields of LossOutput, in order. Then d_hidden, d_weight and
the factor that both lack."""


@torch.library.custom_op("versatune_kernels::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor,
    num_samples: int,
    num_valid: int | None,
    ignore_index: int,
    validate: bool | None,
    logit_scale: float,
    softcap: float,
    logits_dtype: str,
    chunk_tokens: int,
    grad_hidden: bool,
    grad_weight: bool,
    by_probability: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of LossOutput, d_hidden, d_weight (empty where not wanted) and their factor.

    Operators take no records: what stands between `validate` and `backend` are the fields of `Spec`.

    Args:
        hidden: [N, H].
        weight: [V, H].
        labels, sample_ids: integer [N].
        token_weight: floating [N], or None.
        normalizer: float64 [].
        The others as in `loss.linear_cross_entropy`.
    """
    spec = Spec(logit_scale, softcap, logits_dtype, chunk_tokens, grad_hidden, grad_weight, by_probability)
    value_checks = checks.ValueChecks(validate, hidden.device)
    is_triton = _is_triton(hidden, backend)
    on_device = is_triton and value_checks.mode == "device"
    if not on_device:
        checks.check_values(
            value_checks,
            labels,
            ignore_index,
            weight.shape[0],
            num_valid,
            sample_ids,
            num_samples,
            normalizer,
        )
    of_tokens = (labels, token_weight, normalizer, ignore_index, num_valid)
    if is_triton:
        from versatune_kernels import triton_backend

        run, sum_up = triton_backend.triton_pass, triton_backend.triton_segment_sums
        tokens = triton_backend.triton_tokens(
            *of_tokens,
            ids=sample_ids,
            num_segments=num_samples,
            vocab_size=weight.shape[0],
            check=on_device,
        )
    else:
        run, sum_up, tokens = chunked_pass, segment_sums, valid_tokens(*of_tokens)
    # Autocast would round the fp32 parts of the arithmetic.
    with torch.autocast(device_type=hidden.device.type, enabled=False), torch.no_grad():
        done = run(hidden, weight, tokens, spec)

    total = done.objective.sum(dtype=torch.float64)
    loss = torch.where(normalizer == 0, 0, total / normalizer).float()
    token_loss = done.nll.new_zeros(labels.numel()).index_copy_(0, tokens.index, done.nll)
    return (
        loss,
        token_loss,
        *sum_up(token_loss, labels, ignore_index, sample_ids, num_samples),
        hidden.new_empty(0) if done.d_hidden is None else done.d_hidden,
        hidden.new_empty(0) if done.d_weight is None else done.d_weight,
        done.pending,
    )


def _is_triton(hidden: Tensor, backend: str) -> bool:
    return resolve_backend(backend, hidden.device.type).name == "triton"


@linear_cross_entropy_op.register_fake
def _fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sample_ids: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor,
    num_samples: int,
    num_valid: int | None,
    ignore_index: int,
    validate: bool | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    spec, backend = Spec(*rest[:-1]), rest[-1]
    keeps_dtype = _is_triton(hidden, backend) and hidden.dtype != torch.float16
    grad_dtype = hidden.dtype if keeps_dtype else torch.float32

    def gradient(tensor: Tensor, is_wanted: bool) -> Tensor:
        if not is_wanted:
            return hidden.new_empty(0)
        return torch.empty_like(tensor, dtype=grad_dtype, memory_format=torch.contiguous_format)

    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(labels.shape, dtype=torch.float32),
        hidden.new_empty(num_samples, dtype=torch.float64),
        hidden.new_empty(num_samples, dtype=torch.int64),
        hidden.new_empty(num_samples, dtype=torch.float64),
        gradient(hidden, spec.grad_hidden),
        gradient(weight, spec.grad_weight),
        hidden.new_empty((), dtype=torch.float32),
    )


@torch.library.custom_op("versatune_kernels::finish_gradient", mutates_args=())
def finish_gradient_op(gradient: Tensor, upstream: Tensor, pending: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream * pending as `dtype`, on the Triton backend, in new memory."""
    from versatune_kernels import triton_backend

    return triton_backend.scaled_gradient(gradient, upstream, pending, dtype, in_place=False)


@finish_gradient_op.register_fake
def _(gradient: Tensor, upstream: Tensor, pending: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, *_, backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else backward gets zeros as large as both gradients
    ctx.save_for_backward(*output[NUM_OUTPUTS:])
    ctx.num_inputs = len(inputs)
    ctx.dtype = weight.dtype
    ctx.is_triton = _is_triton(hidden, backend)
    ctx.spent = False


def _backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.spent:
        raise KernelError(
            "second backward through one linear_cross_entropy call: its gradients are computed "
            "in forward and were handed out by the first backward. Call "
            "linear_cross_entropy again, add the losses before one backward, or use "
            'backend="reference".'
        )
    ctx.spent = True
    d_hidden, d_weight, pending = ctx.saved_tensors
    finish = _finish_with_triton if ctx.is_triton else _finish_with_torch
    return (
        finish(d_hidden, d_loss, pending, ctx.dtype) if ctx.needs_input_grad[0] else None,
        finish(d_weight, d_loss, pending, ctx.dtype) if ctx.needs_input_grad[1] else None,
        *(None for _ in range(ctx.num_inputs - 2)),
    )


# The last factor and the one rounding. In place, unless a compiler traces: its backward may run
# twice, and would then scale twice.


def _is_traced(gradient: Tensor) -> bool:
    """Whether a compiler traces with a stand-in of the tensor. `torch.compiler.is_compiling()` does not tell:
    torch 2.11 says False where AOT traces forward and backward together."""
    return type(gradient) is not Tensor


def _finish_with_torch(gradient: Tensor, upstream: Tensor, pending: Tensor, dtype: torch.dtype) -> Tensor:
    """`chunked` has already cleared what must be 0."""
    scale = upstream * pending
    if _is_traced(gradient):
        return (gradient * scale).to(dtype)
    return gradient.mul_(scale).to(dtype)


def _finish_with_triton(gradient: Tensor, upstream: Tensor, pending: Tensor, dtype: torch.dtype) -> Tensor:
    if _is_traced(gradient):
        return finish_gradient_op(gradient, upstream, pending, dtype)
    from versatune_kernels import triton_backend

    return triton_backend.scaled_gradient(gradient, upstream, pending, dtype, in_place=True)


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)
