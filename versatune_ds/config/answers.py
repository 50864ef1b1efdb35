"""Settings of scored answers: what the model is asked at every evaluation, and how its answers are scored.

What is not covered: the scores themselves, and finding a user's function (`engine/answers/scoring.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import Field

from versatune_ds.config.section import Section

SCORES = ("exact", "number", "label")
FUNCTION = re.compile(r"(.+\.py|[A-Za-z_][\w.]*):([A-Za-z_]\w*)")
"""A function of a file, or of a module that can be imported."""


class Answers(Section):
    """Held-out samples that the model answers itself, greedily, at every evaluation."""

    samples: int = Field(ge=1)
    """Held-out samples of each domain; the same ones every time, in every run on these data."""
    max_new_tokens: int = Field(ge=1)
    """Longest answer in tokens; a longer one is cut there."""
    score: str | dict[str, str] = "exact"
    """`exact` (but for white space), `number` (the last one), `label` (the first one) or a function of the
    user's, `module:function` or `path.py:function`; or one for each domain that is asked."""
    batch_size: int = Field(8, ge=1)
    """Samples that a rank answers at once."""

    def problems(self) -> Iterator[str]:
        for name in self.score.values() if isinstance(self.score, dict) else [self.score]:
            if name not in SCORES and not FUNCTION.fullmatch(name):
                yield f"score {name!r}: give {', '.join(SCORES)}, module:function or path.py:function"
        if self.score == {}:
            yield "score names no domain"

    @property
    def named(self) -> set[str]:
        """Domains that `score` names; empty: all are asked."""
        return set(self.score) if isinstance(self.score, dict) else set()

    def score_of(self, domain: str) -> str | None:
        """How this domain's answers are scored; None: it is not asked."""
        return self.score.get(domain) if isinstance(self.score, dict) else self.score
