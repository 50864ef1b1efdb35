"""Checks of what the caller passed in.

How: shapes, dtypes, devices and options are always checked; that costs nothing. Checks that must
read tensor values are made by `ValueChecks` in one of three ways:

    "host"    read the values and raise a KernelError that names the first offender
    "device"  CUDA: a device-side assert, which never makes the host wait. As with torch's own
              cross-entropy, the program ends with "device-side assert triggered" at a later call;
              run again with validate=True to get the KernelError
    "off"     not at all

Values are read inside the operator (`fused_op.py`), so that torch.compile never sees a branch on
them.

What is not covered: NaN or infinite hidden states. They give a NaN loss, which the caller sees.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from versatune_kernels.errors import KernelError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGER_DTYPES = (torch.int32, torch.int64)
LOGITS_DTYPES = ("fp32", "compute")
BAD_INPUT = "versatune_kernels: bad input; use validate=True"
"""What a device-side assert says."""


class ValueChecks:
    """Requires conditions on tensor values, in the way that fits the device."""

    def __init__(self, validate: bool | None, device: torch.device) -> None:
        """validate: True host, False off, None host except on CUDA, where it is device."""
        if validate is None:
            self.mode = "device" if device.type == "cuda" else "host"
        else:
            self.mode = "host" if validate else "off"

    def require(self, holds: Tensor, message: Callable[[], str]) -> None:
        """`holds` is a bool tensor of any shape, all of it must be True; `message` may be slow."""
        if self.mode == "off":
            return
        if self.mode == "device":
            torch._assert_async(holds.all(), BAD_INPUT)
        elif not bool(holds.all()):
            raise KernelError(message())


def check_matrices(hidden: Tensor, weight: Tensor) -> None:
    """hidden [N, H] or [B, T, H] and weight [V, H]: same H, floating dtype and device."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise KernelError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")
        if tensor.dtype not in FLOAT_DTYPES:
            raise KernelError(f"{name} is {tensor.dtype}; allowed: {_names(FLOAT_DTYPES)}. Cast it first.")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise KernelError(
            f"weight has shape {list(weight.shape)}; expected [vocabulary, hidden] with at least "
            "one row. An empty weight is what ZeRO-3 leaves outside the forward of the module that "
            "owns it: call the loss inside that module's forward."
        )
    if hidden.dim() not in (2, 3):
        raise KernelError(
            f"hidden has shape {list(hidden.shape)}; expected [tokens, hidden] or [batch, time, hidden]."
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise KernelError(
            f"hidden has {hidden.shape[-1]} features and weight {weight.shape[1]} "
            f"(shapes {list(hidden.shape)} and {list(weight.shape)}); they must be equal. "
            "weight is [vocabulary, hidden], as nn.Linear stores it."
        )
    if hidden.dtype != weight.dtype:
        raise KernelError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one to the other's dtype "
            "(under autocast: hidden.to(weight.dtype))."
        )
    if hidden.device != weight.device:
        raise KernelError(f"hidden is on {hidden.device} but weight on {weight.device}; move one of them.")


def flat_tokens(name: str, tensor: Tensor, hidden: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """A per-token tensor as [N], after checking its shape ([N] or hidden's), dtype and device."""
    if not isinstance(tensor, Tensor):
        raise KernelError(f"{name} is a {type(tensor).__name__}; pass a torch.Tensor.")
    num_tokens = math.prod(hidden.shape[:-1])
    if tensor.shape not in (hidden.shape[:-1], (num_tokens,)):
        raise KernelError(
            f"{name} has shape {list(tensor.shape)}; expected one value per token: "
            f"{list(hidden.shape[:-1])} for hidden of shape {list(hidden.shape)}."
        )
    if tensor.dtype not in dtypes:
        raise KernelError(f"{name} is {tensor.dtype}; allowed: {_names(dtypes)}.")
    if tensor.device != hidden.device:
        raise KernelError(f"{name} is on {tensor.device} but hidden on {hidden.device}; move {name} there.")
    if tensor.requires_grad:
        raise KernelError(
            f"{name} requires a gradient, but the loss is differentiable in hidden and weight "
            f"only; pass {name}.detach()."
        )
    return tensor.reshape(-1)


def check_samples(ids: Tensor | None, num_samples: int | None) -> None:
    """Ids come with their number of samples."""
    if num_samples is not None and (
        isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0
    ):
        raise KernelError(f"num_samples={num_samples!r}; expected an integer >= 0.")
    if ids is None and num_samples is not None:
        raise KernelError(f"num_samples={num_samples} without sample_ids: pass both or neither.")
    if ids is not None and num_samples is None:
        raise KernelError(
            "sample_ids without num_samples: pass num_samples, the length of the sums to return "
            "(reading it from the ids would make the host wait for the device)."
        )


def check_num_valid(num_valid: int | None, num_tokens: int) -> None:
    """The caller's count is a possible one."""
    if num_valid is None:
        return
    if isinstance(num_valid, bool) or not isinstance(num_valid, int):
        raise KernelError(f"num_valid={num_valid!r}; expected an integer or None.")
    if not 0 <= num_valid <= num_tokens:
        raise KernelError(f"num_valid={num_valid} for {num_tokens} tokens; check the count.")


def as_normalizer(normalizer: float | Tensor, device: torch.device) -> Tensor:
    """The normalizer as a detached float64 [] tensor on `device`."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise KernelError(f"normalizer has shape {list(normalizer.shape)}; expected one number.")
        if normalizer.requires_grad:
            raise KernelError(
                "normalizer requires a gradient, but the loss is differentiable in hidden and "
                "weight only; pass normalizer.detach()."
            )
        if normalizer.device == device:
            return normalizer.reshape(()).double()
        if normalizer.device.type != "cpu":
            raise KernelError(f"normalizer is on {normalizer.device} but hidden on {device}; move it there.")
        normalizer = float(normalizer)
    if isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise KernelError(f"normalizer={normalizer!r}; expected a number or a tensor of one number.")
    if not math.isfinite(normalizer) or normalizer < 0:
        raise KernelError(_bad_normalizer(normalizer))
    # A fill, unlike a copy from the host, does not make the host wait.
    return torch.full((), float(normalizer), dtype=torch.float64, device=device)


# ---- checks that read values --------------------------------------------------------------------


def check_values(
    checks: ValueChecks,
    labels: Tensor,
    ignore_index: int,
    vocab_size: int,
    num_valid: int | None,
    sample_ids: Tensor | None,
    num_samples: int,
    normalizer: Tensor,
) -> None:
    """Labels, ids, the count of valid labels and the normalizer hold what they may hold.

    Args:
        checks: how to require it.
        labels: integer [N].
        ignore_index: the label of tokens without a target.
        vocab_size: V.
        num_valid: the caller's count of other labels, or None.
        sample_ids: integer [N], or None.
        num_samples: S.
        normalizer: float64 [].
    """
    if checks.mode == "off":
        return
    valid = labels != ignore_index
    _check_labels(labels, valid, vocab_size, checks)
    if num_valid is not None:
        checks.require(
            valid.sum() == num_valid,
            lambda: (
                f"num_valid={num_valid}, but {int(valid.sum())} labels differ from "
                f"ignore_index={ignore_index}. Count the shifted labels, or leave num_valid out."
            ),
        )
    if sample_ids is not None:
        _check_ids(sample_ids, num_samples, checks)
    checks.require(torch.isfinite(normalizer) & (normalizer >= 0), lambda: _bad_normalizer(float(normalizer)))


def _check_labels(labels: Tensor, valid: Tensor, vocab_size: int, checks: ValueChecks) -> None:
    """Every valid label is a class id in 0..V-1."""
    in_range = ~valid | ((labels >= 0) & (labels < vocab_size))

    def message() -> str:
        where = int((~in_range).nonzero()[0])
        return (
            f"label {int(labels[where])} of token {where} is outside 0..{vocab_size - 1} and is "
            f"not ignore_index ({int((~in_range).sum())} such labels). Check that the tokenizer "
            "fits the model's vocabulary; mark tokens without a target with ignore_index."
        )

    checks.require(in_range, message)


def _check_ids(ids: Tensor, num_samples: int, checks: ValueChecks) -> None:
    """Every id stays below the number of samples."""
    in_range = ids < num_samples

    def message() -> str:
        where = int((~in_range).nonzero()[0])
        return (
            f"sample_ids holds {int(ids[where])} at token {where}, but num_samples={num_samples} allows "
            f"0..{num_samples - 1}; negative ids mean 'none'. Raise num_samples or correct the ids."
        )

    checks.require(in_range, message)


# ---- options ------------------------------------------------------------------------------------


def check_options(
    ignore_index: int, logit_scale: float, softcap: float, chunk_tokens: int | str, logits_dtype: str
) -> None:
    """Each option lies in its range."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise KernelError(f"ignore_index={ignore_index!r}; expected an integer such as -100.")
    _check_option("logit_scale", logit_scale, lambda value: value > 0, "> 0 (1 is off)")
    _check_option("softcap", softcap, lambda value: value >= 0, ">= 0 (0 is off)")
    is_count = isinstance(chunk_tokens, int) and not isinstance(chunk_tokens, bool) and chunk_tokens >= 1
    if chunk_tokens != "auto" and not is_count:
        raise KernelError(
            f"chunk_tokens={chunk_tokens!r}: expected 'auto' or a number of tokens >= 1. "
            "Smaller chunks need less memory; 'auto' is a good start."
        )
    if logits_dtype not in LOGITS_DTYPES:
        raise KernelError(
            f"logits_dtype={logits_dtype!r}. Known: 'fp32', and 'compute' for the dtype of hidden."
        )


def _check_option(name: str, value: float, holds: Callable[[float], bool], allowed: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not holds(value):
        raise KernelError(f"{name}={value!r}; expected a finite number {allowed}.")


def _bad_normalizer(value: float) -> str:
    return (
        f"normalizer={value}; expected a finite number >= 0, usually the global number of "
        "supervised tokens of the optimizer step (0 gives loss 0)."
    )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
