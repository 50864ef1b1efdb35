"""Settings of `versatune-ds search`: how a mixture is looked for, at what cost, and what it must keep.

What is to be lowered is `weights.objective`; bounds of the mixture are `domains.min_weight`, `max_weight` and
`max_epochs`, as in the run that it is for.

What is not covered: the other sections (`config/schema.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from versatune_ds.config.model import Model
from versatune_ds.config.section import Section


class Search(Section):
    """Many short runs, or merged adapters, and a surface through their held-out losses."""

    way: Literal["proxies", "adapters"] = "proxies"
    """`proxies`: a short run for each mixture that is tried. `adapters`: one adapter a domain is trained, and
    a mixture is their weighted sum, which is only evaluated."""
    budget_tokens: int = Field(ge=1)
    """Most tokens of all runs together, from their first to their last step. A token that is only evaluated
    counts as a third."""
    steps: int = Field(ge=1)
    """Optimizer steps of a run."""
    rounds: int = Field(3, ge=1)
    """The first half of the mixtures is drawn at random, the others are chosen in so many rounds, from what
    is known by then."""
    limits: dict[str, float] = Field({})
    """Domain -> how far its held-out loss may rise over that of the untrained model, e.g. `{code: 0.01}`;
    below 0: how far it must fall. Kept by the upper end of the predicted interval."""
    model: Model | None = None
    """Model of all runs, usually a small one with the same tokenizer. None: the run's `model`."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; None: `optimizer.lr`, times 10 for an adapter where the run has none."""
    packs_per_step: int | None = Field(None, ge=1)
    """Packs in an optimizer step; None: `batch.packs_per_step`."""
    workers: int = Field(2, ge=1)
    """Runs at the same time, each a process of one rank; on GPUs one a device."""
    part: str = Field("0/1", pattern=r"^[0-9]+/[1-9][0-9]*$")
    """INDEX/COUNT: of COUNT processes with one `run.dir` this one does every COUNT-th run, from INDEX on."""

    @property
    def share(self) -> tuple[int, int]:
        """Index and count of `part`."""
        index, count = self.part.split("/")
        return int(index), int(count)

    def problems(self) -> Iterator[str]:
        index, count = self.share
        if index >= count:
            yield f"part {self.part}: the first of {count} is 0, the last one {count - 1}"
        for name, limit in self.limits.items():
            if limit <= -1:
                yield f"limits: {name} would need a loss below 0 ({limit} is a share of the untrained loss)"
