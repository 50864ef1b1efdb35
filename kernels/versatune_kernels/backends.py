"""Which implementation computes the loss, and why.

What: `resolve_backend` turns the `backend=` argument into a name and a reason for the log. "auto"
never fails; a backend asked for by name that cannot run is an error, never a silent fallback.

What is not covered: a Triton backend. It will be one more name here and one more file beside
`chunked.py`; callers that say "auto" will get it without a change.
"""

import difflib
from typing import NamedTuple

from versatune_kernels.errors import KernelError

BACKENDS = ("auto", "chunked", "reference", "triton")


class ResolvedBackend(NamedTuple):
    """A backend that can run here."""

    name: str
    """"chunked" or "reference"."""
    reason: str
    """One sentence for the log."""


def resolve_backend(backend: str = "auto") -> ResolvedBackend:
    """Name of the implementation that `backend` stands for, with the reason.

    Args:
        backend: "auto", "chunked", "reference" or "triton".

    Raises:
        KernelError: the name is unknown, or this version has no such backend.
    """
    if backend == "auto":
        return ResolvedBackend(
            "chunked", "auto: the portable chunked backend; this version has no Triton backend"
        )
    if backend == "chunked":
        return ResolvedBackend("chunked", "asked for by name")
    if backend == "reference":
        return ResolvedBackend(
            "reference", "asked for by name; it holds the full [tokens, vocabulary] logits in fp32"
        )
    if backend == "triton":
        raise KernelError(
            'backend="triton": this version has no Triton backend. Use backend="chunked", '
            'or backend="auto", which takes the Triton backend as soon as there is one.'
        )
    near = difflib.get_close_matches(str(backend), BACKENDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise KernelError(f"unknown backend {backend!r}. Known: {', '.join(BACKENDS)}.{hint}")
