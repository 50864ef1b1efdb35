"""The rivals: ours, torch, Hugging Face's eager loss, Liger, cut-cross-entropy, QuACK, and three
bare products.

Each computes the mean loss over the labelled rows, forward and backward. A variant is a setting of
its knobs: "default" as its authors ship it, "best chunk" the fastest of a few chunk sizes, "frozen
head" without dW, and named precisions where the library has a choice. Libraries are imported only
when they are measured; one that is absent is reported as such.

`three products` is the ceiling: logits, dX and dW of the labelled rows by the vendor's matrix
product, without a softmax. Nothing that computes both gradients can be faster.

What is not covered: losses whose head is split over ranks, and a library's own tuning beyond chunk
and precision."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Inputs:
    """What a loss is computed from."""

    hidden: Tensor
    """[N, H], requires a gradient."""
    weight: Tensor
    """[V, H], requires a gradient unless a variant freezes it."""
    labels: Tensor
    """int64 [N]; IGNORE_INDEX where there is no label."""
    sample_ids: Tensor
    """int32 [N], the sample of each row."""
    num_samples: int
    num_valid: int
    """Rows that have a label, known to the host as in training."""


class NoSuchKnob(Exception):
    """The installed version does not have the option that a variant needs."""


@dataclass(frozen=True)
class Variant:
    """A setting of a candidate's knobs."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the candidate's `loss`."""
    sweeps_chunk: bool = False
    """True: `chunk` is chosen from a few sizes by measuring them."""
    frozen: bool = False
    """The head needs no gradient, as beside an adapter."""
    on: tuple[str, ...] = ("cpu", "cuda")
    """Device types it is measured on."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute the loss."""

    name: str
    package: str
    """The installed distribution that computes it; it must be there."""
    module: str
    """What is imported from it."""
    variants: tuple[Variant, ...]
    loss: Callable[..., Any]
    """(inputs, chunk=None, **options) -> the mean loss, or a LossOutput whose token losses and sums the gate
    checks too; None: it has run backward itself (the ceiling)."""
    on: tuple[str, ...] = ("cpu", "cuda")
    is_ceiling: bool = False

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if importlib.util.find_spec(self.module.split(".")[0]) is None:
            return "not installed"
        return None

    def version(self) -> str | None:
        """Version of the installed package."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "source tree" if self.missing() is None else None


# ---- ours --------------------------------------------------------------------------------------


def ours(inputs: Inputs, chunk: int | None = None, *, backend: str, sums: bool = True, **knobs: Any) -> Any:
    """`versatune_kernels.linear_cross_entropy`, by default with its per-sample sums."""
    from versatune_kernels import linear_cross_entropy

    unknown = set(knobs) - set(inspect.signature(linear_cross_entropy).parameters)
    if unknown:
        raise NoSuchKnob(f"this version of versatune_kernels has no {', '.join(sorted(unknown))}")
    segments: dict[str, Any] = {"sample_ids": inputs.sample_ids, "num_samples": inputs.num_samples}
    return linear_cross_entropy(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        normalizer=float(inputs.num_valid),
        num_valid=inputs.num_valid,
        chunk_tokens="auto" if chunk is None else chunk,
        backend=backend,
        **(segments if sums else {}),
        **knobs,
    )


# ---- rivals ------------------------------------------------------------------------------------


def hf_eager(inputs: Inputs, chunk: int | None = None) -> Tensor:
    """What transformers' causal LMs do: all logits, a cast to fp32, cross-entropy as a sum, one division."""
    logits = F.linear(inputs.hidden, inputs.weight).float()
    total = F.cross_entropy(logits, inputs.labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / inputs.num_valid


def torch_loss(inputs: Inputs, chunk: int | None = None, *, chunked: bool, **knobs: Any) -> Tensor:
    """`F.linear_cross_entropy` of torch 2.13: all logits at once by default, in chunks with options."""
    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise NoSuchKnob(f"torch {torch.__version__} has no linear_cross_entropy")
    options = None
    if chunked:
        if chunk is not None:
            knobs = {**knobs, "batch_chunk_size": chunk, "chunking_method": None}
        options = torch.nn.LinearCrossEntropyOptions(**knobs)
    return function(inputs.hidden, inputs.weight, inputs.labels, ignore_index=IGNORE_INDEX, options=options)


def liger(inputs: Inputs, chunk: int | None = None, **knobs: Any) -> Tensor:
    """Liger's fused loss, called by the names of its parameters, which its versions order differently.

    `chunk` is Liger's `chunk_mem_const`: a multiple of its default chunk.
    """
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction
    values = {
        "_input": inputs.hidden,
        "weight": inputs.weight,
        "target": inputs.labels,
        "ignore_index": IGNORE_INDEX,
        "reduction": "mean",
        **knobs,
    }
    if chunk is not None:
        values["chunk_mem_const"] = chunk
    out = function.apply(*_by_name(function.forward, values, skip=1))
    return out[0] if isinstance(out, tuple) else out


def cce(inputs: Inputs, chunk: int | None = None, **knobs: Any) -> Tensor:
    """Apple's cut cross-entropy."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return function(inputs.hidden, inputs.weight, inputs.labels, ignore_index=IGNORE_INDEX, **knobs)


def quack(inputs: Inputs, chunk: int | None = None, **knobs: Any) -> Tensor:
    """QuACK's chunked loss."""
    function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    if chunk is not None:
        knobs["chunk_size"] = chunk
    return function(
        inputs.hidden,
        inputs.weight,
        inputs.labels,
        ignore_index=IGNORE_INDEX,
        reduction="mean",
        **knobs,
    )


def three_products(inputs: Inputs, chunk: int | None = None) -> None:
    """logits = X W^T, dX = D W, dW = D^T X over the labelled rows; the numbers in D do not matter."""
    with torch.no_grad():
        rows = inputs.hidden[: inputs.num_valid]
        logits = rows @ inputs.weight.T
        inputs.hidden.grad = torch.zeros_like(inputs.hidden)
        torch.mm(logits, inputs.weight, out=inputs.hidden.grad[: inputs.num_valid])
        inputs.weight.grad = logits.T @ rows


def _by_name(function: Callable[..., Any], values: dict[str, Any], skip: int) -> list[Any]:
    """`values` in the order of a function's parameters, defaults elsewhere; `skip` leading ones are left out.

    Raises:
        NoSuchKnob: a value that the function has no parameter for.
    """
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    unknown = set(values) - {p.name for p in parameters}
    if unknown:
        raise NoSuchKnob(f"the installed version has no {', '.join(sorted(unknown))}")
    return [values.get(p.name, p.default) for p in parameters]


# In the order of importance, in which a time limit leaves the last ones out. The first variant of each
# comes before all others: its default, where that needs no tuning.
CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate("three products", "torch", "torch", (Variant("ceiling"),), three_products, is_ceiling=True),
        Candidate("hf eager", "torch", "torch", (Variant("default"),), hf_eager),
        Candidate(
            "triton",
            "versatune-ds",
            "versatune_kernels",
            (
                Variant("default", {"backend": "triton"}),
                Variant("best chunk", {"backend": "triton"}, sweeps_chunk=True),
                Variant("16-bit logits", {"backend": "triton", "logits_dtype": "compute"}),
                Variant("loss only", {"backend": "triton", "sums": False}),
                Variant("frozen head", {"backend": "triton"}, frozen=True),
            ),
            ours,
            on=("cuda",),
        ),
        Candidate(
            "liger",
            "liger-kernel",
            "liger_kernel",
            (
                Variant("default"),
                Variant("best chunk", sweeps_chunk=True),
                Variant("fp32 dW sum", {"accum_dtype": torch.float32}),
            ),
            liger,
            on=("cuda",),
        ),
        Candidate(
            "cce",
            "cut-cross-entropy",
            "cut_cross_entropy",
            (
                Variant("default"),
                Variant("exact", {"impl": "cce_exact"}),
                Variant("fp32 dW sum", {"accum_c_fp32": True}),
            ),
            cce,
            on=("cuda",),
        ),
        Candidate(
            "quack",
            "quack-kernels",
            "quack",
            # Its default compiles and times many kernels first, for which a time limit may be too short.
            (
                Variant("not tuned", {"tuned": False}),
                Variant("default"),
                Variant("best chunk", sweeps_chunk=True),
            ),
            quack,
            on=("cuda",),
        ),
        Candidate(
            "chunked",
            "versatune-ds",
            "versatune_kernels",
            (
                Variant("default", {"backend": "chunked"}),
                Variant("best chunk", {"backend": "chunked"}, sweeps_chunk=True),
                Variant("frozen head", {"backend": "chunked"}, frozen=True),
                Variant("loss only", {"backend": "chunked", "sums": False}, on=("cuda",)),
            ),
            ours,
        ),
        Candidate(
            "torch",
            "torch",
            "torch",
            (
                Variant("default", {"chunked": False}),
                Variant("chunked", {"chunked": True}),
                Variant("best chunk", {"chunked": True}, sweeps_chunk=True),
                Variant("accurate", {"chunked": True, "acc_policy": "accurate"}, on=("cuda",)),
            ),
            torch_loss,
        ),
    )
}

CHUNK_SIZES = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LIGER_MULTIPLES = (1, 2, 4, 8, 16)


def chunk_choices(candidate: str, num_tokens: int, device_type: str) -> list[int]:
    """Chunk sizes that "best chunk" tries: five up to N, on a CPU three."""
    if candidate == "liger":
        return list(LIGER_MULTIPLES)
    fitting = [size for size in CHUNK_SIZES if size <= num_tokens] or [num_tokens]
    return fitting[-5:] if device_type == "cuda" else fitting[:3]
