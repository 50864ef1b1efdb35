"""The best evaluation so far, and early stopping: has the held-out loss stopped falling?

What is not covered: keeping the parameters of the best evaluation (`engine/checkpointing`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OVERALL = "overall"
Select = str | Mapping[str, float]
"""`evaluation.select`: OVERALL, a domain, or the weights of domains."""


def selected_loss(
    select: Select, losses: Mapping[str, float | None], tokens: Mapping[str, int]
) -> float | None:
    """What an evaluation is judged by, in nats per supervised token.

    Args:
        losses: of each domain; None or not finite where it is not known.
        tokens: supervised held-out tokens of each domain; the weights of OVERALL.

    Returns:
        sum(weight x loss) / sum(weights); None where a loss that counts is not known.
    """
    if select == OVERALL:
        weights: Mapping[str, float] = tokens
    else:
        weights = {select: 1.0} if isinstance(select, str) else select
    counted = [(weight, losses.get(name)) for name, weight in weights.items() if weight > 0]
    if not counted or any(loss is None or not math.isfinite(loss) for _, loss in counted):
        return None
    return math.fsum(w * loss for w, loss in counted if loss is not None) / math.fsum(w for w, _ in counted)


@dataclass
class EarlyStopping:
    """Knows the best evaluation and counts those since. The same numbers give the same on all ranks.

    Args:
        patience: how many without a lower loss are too many (`evaluation.patience`); None: never.
        select: what the losses are of.
    """

    patience: int | None
    select: Select = OVERALL
    best_loss: float = math.inf
    """Lowest loss so far, nats per supervised token."""
    best_step: int = 0
    """Of the first evaluation that had it; 0: there is none."""
    last_step: int | None = None
    """Of the last evaluation."""
    waited: int = 0
    """Evaluations since the best one."""

    @property
    def exhausted(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def observe(self, step: int, loss: float | None) -> None:
        """Take in the evaluation after `step`; a loss that is None or not finite is not below anything."""
        self.last_step = step
        if loss is not None and loss < self.best_loss:
            self.best_loss, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    def forget_best(self) -> None:
        """The next evaluation with a known loss is the best one, as if none had been before."""
        self.best_loss, self.best_step = math.inf, 0

    def note(self) -> dict[str, Any]:
        """Of the best evaluation: its step, what it was judged by, and the loss."""
        return {"step": self.best_step, "select": self.select, "loss": self.best_loss}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-exact (no infinity)."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        steps = {"best_step": self.best_step, "last_step": self.last_step}
        return {"select": self.select, "best_loss": best, **steps, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, unless it was about another loss."""
        if state.get("select", OVERALL) != self.select:
            return
        self.last_step = state.get("last_step")
        self.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
        self.best_step, self.waited = int(state["best_step"]), int(state["waited"])
