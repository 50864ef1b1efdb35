"""When a checkpoint is due: every n steps, at milestones, and before too much work could be lost.

`checkpoint.max_lost_minutes` bounds the work that a crash at the worst moment costs. That moment is just
before a checkpoint is complete: everything since the one before it is lost, the time that saving took
included. So a checkpoint has to begin while

    time trained since the last complete one + longest recent step + longest recent save <= limit

still holds, or the next step would be one too many. `LossBound` measures these on one rank with a monotonic
clock, which no change of the wall clock moves; the other ranks are told at the step boundary.

With saving in the background training goes on meanwhile, and one checkpoint at most is in flight: the bound
can be kept if saving takes less than half of it.

What is not covered: the time between a crash and the restart, and what the loading of a checkpoint takes.
"""

from __future__ import annotations

from collections import deque

from versatune_ds.config.schema import Checkpoint

RECENT_STEPS, RECENT_SAVES = 20, 5
FIRST_SAVE_SHARE = 0.5
"""The first checkpoint comes after this share of the limit: how long saving takes is not known before."""


def checkpoint_due(settings: Checkpoint, step: int) -> bool:
    """True when a checkpoint is to be written after `step` finished optimizer steps."""
    every, milestone = settings.every_n_steps, settings.milestone_every_n_steps
    return bool((every and step % every == 0) or (milestone and step % milestone == 0))


class LossBound:
    """Decides when to save so that at most `limit_s` of work can be lost.

    All times are seconds of one monotonic clock.

    Args:
        now: start of the run; what was done before it is safe.
    """

    def __init__(self, limit_s: float, now: float) -> None:
        self.limit_s = limit_s
        self._safe_at = now
        self._boundary = now
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._saves: deque[float] = deque(maxlen=RECENT_SAVES)

    def step_ended(self, now: float) -> None:
        """A step boundary. The time since the one before, evaluation included and saving not, is a step's."""
        self._steps.append(now - self._boundary)
        self._boundary = now

    def waited(self, now: float) -> None:
        """The run stood still for saving until `now`."""
        self._boundary = now

    def saved(self, began: float, resumed: float, completed: float) -> None:
        """A checkpoint begun at `began` is complete; training went on from its state at `resumed`."""
        self._safe_at = resumed
        self._saves.append(completed - began)

    @property
    def step_s(self) -> float:
        """Longest recent step."""
        return max(self._steps, default=0.0)

    @property
    def save_s(self) -> float:
        """Longest recent save, from its beginning until it was complete; before any is known, a guess."""
        return max(self._saves, default=FIRST_SAVE_SHARE * self.limit_s)

    def due(self, now: float) -> bool:
        """True when saving after the next step might be too late."""
        return now - self._safe_at + self.step_s + self.save_s > self.limit_s

    @property
    def interval_s(self) -> float:
        """Training time between two checkpoints; not above 0 when the bound cannot be kept."""
        return self.limit_s - self.step_s - self.save_s
