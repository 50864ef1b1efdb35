"""Which implementation computes the loss, and why.

What: `resolve_backend` turns the `backend=` argument into a name and a reason for the log. "auto"
never fails; a backend asked for by name that cannot run is an error, never a silent fallback.

How: Triton is looked for, imported and checked once per process, and only where it may be used.
With TRITON_INTERPRET=1 Triton runs kernels on the CPU, element by element in numpy: right for tests,
far too slow for anything else, so "auto" never picks it.

What is not covered: whether the GPU at hand is faster with another choice.
"""

import difflib
import functools
import os
from typing import NamedTuple

import torch

from versatune_kernels.errors import KernelError

BACKENDS = ("auto", "triton", "chunked", "reference")

OLDEST_CAPABILITY = (8, 0)
"""CUDA compute capability from which on GPUs multiply bf16 (Ampere)."""


class ResolvedBackend(NamedTuple):
    """A backend that can run here."""

    name: str
    """"triton", "chunked" or "reference"."""
    reason: str
    """One sentence for the log."""


def resolve_backend(backend: str = "auto", device_type: str = "cpu") -> ResolvedBackend:
    """Name of the implementation that `backend` stands for on a device, with the reason.

    Args:
        backend: "auto", "triton", "chunked" or "reference".
        device_type: "cuda" or "cpu".

    Raises:
        KernelError: the name is unknown, or the backend asked for by name cannot run here.
    """
    check_name(backend)
    if backend == "chunked":
        return ResolvedBackend("chunked", "asked for by name")
    if backend == "reference":
        return ResolvedBackend(
            "reference", "asked for by name; it holds the full [tokens, vocabulary] logits in fp32"
        )
    if device_type != "cuda":
        if backend == "auto":
            return ResolvedBackend("chunked", f"auto: Triton needs CUDA, this is {device_type}")
        return _interpreted(device_type)
    problem = _triton_problem() or _gpu_problem()
    if problem is None:
        reason = "asked for by name" if backend == "triton" else "auto: CUDA and Triton are here"
        return ResolvedBackend("triton", reason)
    if backend == "auto":
        return ResolvedBackend("chunked", f"auto: {problem}")
    raise KernelError(f'backend="triton": {problem}. Use backend="chunked", or "auto".')


def check_name(backend: str) -> None:
    """Raise KernelError unless `backend` is a known name."""
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend), BACKENDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise KernelError(f"unknown backend {backend!r}. Known: {', '.join(BACKENDS)}.{hint}")


def _interpreted(device_type: str) -> ResolvedBackend:
    """The Triton backend in Triton's interpreter, or the reason why not."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(
            f'backend="triton" needs a CUDA device, and hidden is on {device_type}. Use '
            'backend="chunked", or "auto"; for tests set TRITON_INTERPRET=1 before Triton is '
            "imported (very slow)."
        )
    problem = _triton_problem()
    if problem is not None:
        raise KernelError(f'backend="triton": {problem}. Use backend="chunked", or "auto".')
    return ResolvedBackend("triton", "asked for by name, in Triton's interpreter: for tests only")


@functools.cache
def _triton_problem() -> str | None:
    """Why the Triton backend cannot be used, or None."""
    try:
        import versatune_kernels.triton_backend  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install 'triton>=3.6'"
    return None


@functools.cache
def _gpu_problem() -> str | None:
    """Why the GPU is too old, or None."""
    if torch.cuda.get_device_capability() >= OLDEST_CAPABILITY:
        return None
    return f"{torch.cuda.get_device_name()} is older than Ampere, which Triton's bf16 needs"
