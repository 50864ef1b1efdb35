"""What changes from step to step, and what a checkpoint therefore holds beside model and optimizer.

What is not covered: the file it is written to (`engine/checkpointing`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from versatune_ds.data.plan.planner import PlannerState
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.early_stopping import OVERALL, EarlyStopping, selected_loss
from versatune_ds.engine.prepared import Prepared
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.records import EvalRecord

log = get_logger(__name__)

MIN_LOSSES = 10
"""Losses that must be known before one can leap."""


def is_spike(loss: float, earlier: Sequence[float], factor: float) -> bool:
    """Whether `loss` is more than `factor` times the median of the earlier ones (nats per token)."""
    return len(earlier) >= MIN_LOSSES and loss > factor * median(earlier)


class SpikeGuard:
    """The losses of the last applied steps, over all ranks and domains.

    Args:
        factor: `train.spike_factor`; None: nothing is a spike.
        window: how many losses to remember.
        losses: those of an earlier process.
    """

    def __init__(self, factor: float | None, window: int, losses: Iterable[float] = ()) -> None:
        self.factor = factor
        self._losses = deque(losses, maxlen=window)

    def is_spike(self, loss: float | None) -> bool:
        """Whether a step with this loss (None: it had no supervised token) is to be skipped."""
        return self.factor is not None and loss is not None and is_spike(loss, self._losses, self.factor)

    def observe(self, loss: float | None) -> None:
        """Remember the loss of an applied step, if it had one."""
        if loss is not None:
            self._losses.append(loss)

    def state(self) -> list[float]:
        return list(self._losses)


@dataclass
class TrainState:
    """The state of a run after `planner.step` steps; the same on all ranks."""

    planner: PlannerState
    """After the last step that was taken."""
    controller: WeightController
    spikes: SpikeGuard
    early_stopping: EarlyStopping
    skipped_in_a_row: int

    @classmethod
    def of(cls, prepared: Prepared, saved: Mapping[str, Any] | None) -> TrainState:
        """Before the first step, or as a checkpoint has it.

        Args:
            saved: what `to_json` returned, among other keys.

        Raises:
            ConfigError, StateError: it was saved with other data or settings.
        """
        train, evaluation = prepared.config.train, prepared.config.evaluation
        state = cls(
            PlannerState.initial(len(prepared.table)),
            prepared.new_controller(),
            SpikeGuard(train.spike_factor, train.spike_window, () if saved is None else saved["losses"]),
            EarlyStopping(evaluation.patience, evaluation.select or OVERALL),
            0,
        )
        if saved is not None:
            state.planner = PlannerState.from_json(saved["planner"])
            state.planner.check(prepared.corpus, prepared.planner)
            state.controller.load_state(saved["controller"])
            state.early_stopping.load_state(saved["early_stopping"])
            state.skipped_in_a_row = int(saved["skipped_in_a_row"])
        return state

    def observe_evaluation(self, record: EvalRecord, total_steps: int) -> None:
        """Decide whether to stop early, and say so. The model before the first step is never the best."""
        stopping, done = self.early_stopping, record.step
        if done == 0:
            return
        stopping.observe(
            done, selected_loss(stopping.select, record.domain_loss, record.domain_supervised_tokens)
        )
        if stopping.exhausted and done < total_steps:
            log.info(
                "stopping early after step %d: %d evaluations in a row without a lower held-out loss than "
                "%.4f after step %d (evaluation.patience)",
                done,
                stopping.waited,
                stopping.best_loss,
                stopping.best_step,
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "planner": self.planner.to_json(),
            "controller": self.controller.state(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "losses": self.spikes.state(),
            "early_stopping": self.early_stopping.state(),
        }
