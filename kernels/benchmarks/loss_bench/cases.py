"""What is measured: the heads of named models, and which of their cases a sweep visits.

A case is a head (H, V), a number of tokens N, the share of them that has a label, and a dtype. The
sweep "star" varies one axis at a time around a base case; "full" is the whole grid.

What is not covered: how a case is timed (`worker`), and what it is timed against (`candidates`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Head(NamedTuple):
    """A language-model head, weight [vocab_size, hidden_size]."""

    hidden_size: int
    vocab_size: int


HEADS = {
    # hidden_size and vocab_size of the models' config.json on the Hugging Face hub
    "qwen2.5-7b": Head(3584, 152064),
    "qwen2.5-14b": Head(5120, 152064),
    "qwen2.5-32b": Head(5120, 152064),
    "llama-2-13b": Head(5120, 32000),
    "llama-3-8b": Head(4096, 128256),
    # for CPUs: a vocabulary of full size on a narrow model, and one for tests
    "small": Head(256, 152064),
    "tiny": Head(32, 1031),
}
GPU_HEADS = ("qwen2.5-32b", "qwen2.5-14b", "qwen2.5-7b", "llama-2-13b", "llama-3-8b")
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Case:
    """One measurement's problem."""

    head: str
    hidden_size: int
    vocab_size: int
    num_tokens: int
    """N, rows of hidden states."""
    supervised: float
    """Share of the rows that has a label, 0..1."""
    dtype: str
    sharpness: float = 3.0
    """Standard deviation of the random logits; trained models lie around 3 to 9."""
    states: str | None = None
    """File of real hidden states; None: random ones."""

    @property
    def num_valid(self) -> int:
        """Rows that have a label."""
        return max(1, round(self.supervised * self.num_tokens))

    @property
    def useful_flops(self) -> float:
        """FLOPs of the three products logits, dX and dW over the rows that have a label."""
        return 6.0 * self.hidden_size * self.vocab_size * self.num_valid

    def describe(self) -> str:
        """A short name for tables."""
        return f"{self.head} N={self.num_tokens} {self.supervised:.0%} {self.dtype}"

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        return {**asdict(self), "num_valid": self.num_valid, "useful_flops": self.useful_flops}


def plan_cases(
    heads: Sequence[str],
    tokens: Sequence[int],
    supervised: Sequence[float],
    dtypes: Sequence[str],
    *,
    sweep: str,
    sharpness: float,
) -> list[Case]:
    """The cases of a sweep in the order of measurement; heads of equal shape are measured once.

    Args:
        heads: names in `HEADS`; the first is the base of a star.
        tokens: N; the base of a star is 8192 if named, else the largest.
        supervised: shares; the base of a star is the first.
        dtypes: each gets the whole sweep.
        sweep: "star" or "full".
        sharpness: standard deviation of the logits.
    """
    base_tokens = 8192 if 8192 in tokens else max(tokens)
    points = list(itertools.product(heads, tokens, supervised))
    if sweep == "star":
        base = (heads[0], base_tokens, supervised[0])
        points = [base] + [
            point for point in points if sum(a != b for a, b in zip(point, base, strict=True)) == 1
        ]
    cases: dict[tuple[Any, ...], Case] = {}
    for dtype, (head, num_tokens, share) in itertools.product(dtypes, points):
        shape = HEADS[head]
        case = Case(head, *shape, num_tokens, share, dtype, sharpness)
        cases.setdefault((shape, num_tokens, share, dtype), case)
    return list(cases.values())
