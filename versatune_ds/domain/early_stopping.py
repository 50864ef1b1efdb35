"""Early stopping: has the held-out loss stopped falling?

What is not covered: keeping the parameters of the best evaluation; a stopped run ends with its last ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class EarlyStopping:
    """Counts evaluations in a row that did not lower the loss. The same numbers give the same on all ranks.

    Args:
        patience: how many are too many (`evaluation.patience`); None: never.
    """

    patience: int | None
    best_loss: float = math.inf
    """Lowest loss so far, nats per supervised token."""
    best_step: int = 0
    waited: int = 0
    """Evaluations since the best one."""

    @property
    def exhausted(self) -> bool:
        """Whether training should end."""
        return self.patience is not None and self.waited >= self.patience

    def observe(self, step: int, loss: float | None) -> None:
        """Take in the evaluation after `step`; a loss that is None or not finite is not below anything."""
        if loss is not None and loss < self.best_loss:
            self.best_loss, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-exact (no infinity)."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_loss": best, "best_step": self.best_step, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
        self.best_step, self.waited = int(state["best_step"]), int(state["waited"])
