"""What every judge gives, and the words in which the two language-model judges are asked.

A judge reads a text and gives a probability for each domain, summing to 1, or says why it cannot. Nothing is
guessed: an answer that cannot be read is a judgement without probabilities, counted in knowledge.json.

What is not covered: the judges themselves (`classifier.py`, `endpoint.py`, `local_model.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

PROMPT_VERSION = 1
"""Raised when the words below change: judgements of different versions are not mixed."""

QUESTION = """Here is a text between two lines of equals signs. It may be cut off, or may make little sense.

{line}
{text}
{line}

Which one of these domains does it belong to: {names}?
Answer with the name of the domain and nothing else."""
LINE = "=" * 20
UNKNOWN = "unknown: unlike all that the judge has learned from"
"""Problem of a text that no domain gets."""
PLAIN_ENDING = "\n\nDomain:"
"""Behind the question where there is no chat template: the name follows after a space."""


@dataclass(frozen=True, eq=False)
class Judgement:
    index: int
    """Of the text."""
    probabilities: npt.NDArray[np.float64] | None
    """float64[k] in table order, sum 1; None: the judge could not place the text."""
    problem: str | None = None
    """Why there are no probabilities."""
    name_mass: float | None = None
    """Language models: probability that they gave to domain names at all, before it was scaled to 1."""

    def to_json(self, names: Sequence[str]) -> dict[str, Any]:
        """Line of judgements.jsonl."""
        given = self.probabilities
        return {
            "index": self.index,
            "probabilities": None if given is None else dict(zip(names, given.tolist(), strict=True)),
            "problem": self.problem,
            "name_mass": self.name_mass,
        }


class DomainJudge(Protocol):
    texts_at_once: int
    """How many texts `judge` takes best."""
    on_every_rank: bool
    """Whether each rank judges its share; False: rank 0 judges all."""

    def identity(self) -> dict[str, Any]:
        """What decides its judgements; judgements of different identities are not mixed."""
        ...

    def open(self) -> None:
        """Load or train what judging needs; not called when everything is judged already."""
        ...

    def judge(self, texts: Sequence[tuple[int, str]]) -> Iterator[Judgement]:
        """Judgements of (index, text) pairs, in any order; those before an error count."""
        ...

    def facts(self) -> dict[str, Any]:
        """What is known about it once it is open, for knowledge.json."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


def question(text: str, names: Sequence[str]) -> str:
    """The question about a text, in words."""
    return QUESTION.format(line=LINE, text=text, names=", ".join(names))
