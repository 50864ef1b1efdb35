"""The guard: which domains are being overfitted, seen from held-out and training losses.

A domain has risen while its held-out loss is more than z standard errors above its lowest one, on the same
samples (`samples.rise_of`). It is overfitted while it has risen and its training loss, of the window before
the probe, is more than z standard errors below that of the window before its lowest held-out loss: where
both rise, others disturb it or it lacks training, and taking its share would be wrong. After `probes`
overfitted probes in a row it is held: its share goes to the others. A held domain comes back when its loss is
no longer risen, or when it has risen beyond noise since it was held: then leaving it out harms it more than
training on it did.

With `go_back` the model returns to where the domain was best when it is held (mSFT, arXiv 2603.21606). Its
loss is low again then, which is no reason to come back; the lowest losses of the others are looked for anew.

What is not covered: the checkpoints themselves (`engine/run.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from versatune_ds.config.weights import Domains, Guard
from versatune_ds.domain.probes.samples import Array, Rise, SampleLosses, rise_of
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.json_input import finite
from versatune_ds.strategies.rules import Mask
from versatune_ds.strategies.simplex import Vector, limit_weights

NOT_KNOWN = Rise(math.nan, math.nan)


def without(weights: Vector, held: Mask, *, min_weight: float, max_weight: float) -> Vector:
    """Weights with the shares of held domains given to the others, in proportion, within floor and cap.

    Where no other domain has a share, nobody can take theirs and the weights stand.
    """
    kept = np.where(held, 0.0, weights)
    if not held.any() or kept.max() <= 0:
        return weights.copy()
    return limit_weights(kept, kept, min_weight=min_weight, max_weight=max_weight)


class OverfitGuard:
    """What the guard of a run knows; the same on every rank, since all are given the same losses."""

    def __init__(self, names: Sequence[str], settings: Guard) -> None:
        self.names, self.settings = tuple(names), settings
        k = len(names)
        self._best: list[Array | None] = [None] * k
        self._at_hold: list[Array | None] = [None] * k
        self.best_steps = [0] * k
        """Step of the probe with each domain's lowest loss."""
        self._trained: list[Rise] = [NOT_KNOWN] * k
        """Training loss and its error in the window before that probe, or the first one since with any."""
        self.overfitted = [0] * k
        """Probes in a row that each domain has been overfitted."""
        self.rises: list[Rise] = [NOT_KNOWN] * k
        """Of the held-out loss at the last probe, against the best one."""
        self.falls: list[Rise] = [NOT_KNOWN] * k
        """Of the training loss, between the same two."""
        self.back_to: int | None = None
        """Step to go back to after the last probe; None: nobody was held, or that was not asked for."""

    @property
    def held(self) -> Mask:
        """bool[k]: domains whose share the others have."""
        return np.array([losses is not None for losses in self._at_hold])

    @property
    def kept_steps(self) -> set[int]:
        """Steps whose checkpoints `go_back` may need."""
        if not self.settings.go_back:
            return set()
        watched = zip(self.best_steps, self._best, self._at_hold, strict=True)
        return {step for step, best, at_hold in watched if best is not None and at_hold is None}

    def guarded(self, weights: Vector, limits: Domains) -> Vector:
        """`without` for the domains that are held now."""
        return without(weights, self.held, min_weight=limits.min_weight, max_weight=limits.max_weight)

    def stands(self, weights: Vector) -> list[str]:
        """A sentence where all domains with a share are held, so that the weights stand."""
        if (weights[~self.held] > 0).any():
            return []
        return ["every domain with a share is overfitted: the weights stand; see evaluation.patience"]

    def observe(self, step: int, probe: SampleLosses, training: DomainSums) -> tuple[list[str], list[str]]:
        """Take in the probe after `step`; returns in words who is held from now on, and who comes back.

        Args:
            training: sums of the training steps since the probe before.

        Raises:
            StateError: the probe has other samples than those before it.
        """
        said: tuple[list[str], list[str]] = ([], [])
        watched, z = ~self.held, self.settings.noise_z
        trained = [Rise(*pair) for pair in zip(training.mean_loss(), training.stderr(), strict=True)]
        for j, (now, tokens) in enumerate(zip(probe.losses, probe.tokens, strict=True)):
            best = self._best[j]
            self.rises[j] = rise = rise_of(now, now if best is None else best, tokens, f"{self.names[j]}: ")
            is_best = best is None or rise.value < 0
            if is_best:
                self._best[j], self.best_steps[j] = now, step
            if is_best or math.isnan(self._trained[j].stderr):
                self._trained[j] = trained[j]
            then, lately = self._trained[j], trained[j]
            self.falls[j] = Rise(then.value - lately.value, math.hypot(then.stderr, lately.stderr))
            has_risen, is_known = rise.beyond(z), not math.isnan(self.falls[j].stderr)
            if not has_risen or (is_known and not self.falls[j].beyond(z)):
                self.overfitted[j] = 0
            elif is_known:  # else nothing was learned about it in this window
                self.overfitted[j] += 1
            was_held = self._at_hold[j] is not None
            if sentence := self._decide(j, now, tokens, has_risen):
                said[was_held].append(sentence)
        self.back_to = None
        if said[0] and self.settings.go_back:
            self._return(watched & self.held)
        return said

    def _return(self, held_now: Mask) -> None:
        """The model goes back to the earliest of these domains' best probes."""
        self.back_to = min(step for step, is_held in zip(self.best_steps, held_now, strict=True) if is_held)
        for j in np.flatnonzero(held_now):
            self._at_hold[j] = self._best[j]
        for j in np.flatnonzero(~self.held):
            self._best[j], self.overfitted[j] = None, 0

    def _decide(self, j: int, now: Array, tokens: Array, has_risen: bool) -> str | None:
        name, best, rise, z = self.names[j], self.best_steps[j], self.rises[j], self.settings.noise_z
        at_hold = self._at_hold[j]
        if at_hold is None:
            if self.overfitted[j] < self.settings.probes:
                return None
            self._at_hold[j] = now
            return (
                f"overfitting: {name} is {rise.value:.4g} nats (standard error {rise.stderr:.2g}) above its "
                f"lowest held-out loss, that of step {best}, though its training loss has fallen by "
                f"{self.falls[j].value:.4g} since, at {self.overfitted[j]} probes in a row: held, its share "
                "goes to the others"
            )
        since = rise_of(now, at_hold, tokens)
        if (has_risen or self.settings.go_back) and not since.beyond(z):
            return None
        self._at_hold[j], self.overfitted[j] = None, 0
        if self.settings.go_back:  # its checkpoint is not kept any more
            self._best[j] = None
        why = f"{since.value:.4g} nats (standard error {since.stderr:.2g}) higher since it was held"
        return f"{name} comes back: {why if has_risen else 'no longer above its lowest loss beyond noise'}"

    def to_json(self) -> dict[str, Any]:
        """By domain, for weights.jsonl: what was decided and from what numbers."""
        return {
            name: {
                "held": self._at_hold[j] is not None,
                "rise": finite(self.rises[j].value),
                "stderr": finite(self.rises[j].stderr),
                "training_fall": finite(self.falls[j].value),
                "training_fall_stderr": finite(self.falls[j].stderr),
                "probes": self.overfitted[j],
                "best_step": self.best_steps[j],
            }
            for j, name in enumerate(self.names)
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-exact."""
        return {
            "best": [None if values is None else values.tolist() for values in self._best],
            "at_hold": [None if values is None else values.tolist() for values in self._at_hold],
            "best_steps": list(self.best_steps),
            "risen": list(self.overfitted),
            "trained": [[finite(value) for value in pair] for pair in self._trained],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned.

        Raises:
            StateError: it is damaged, or of other domains.
        """
        try:
            best, at_hold = (
                [None if values is None else np.array(values, dtype=np.float64) for values in state[key]]
                for key in ("best", "at_hold")
            )
            best_steps, risen = [int(v) for v in state["best_steps"]], [int(v) for v in state["risen"]]
            pairs = state.get("trained", [NOT_KNOWN] * len(self.names))  # version 0.1 did not ask for it
            trained = [Rise(*(math.nan if v is None else float(v) for v in pair)) for pair in pairs]
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state of weights.guard is damaged: {error!r}") from None
        if any(len(values) != len(self.names) for values in (best, at_hold, best_steps, risen, trained)):
            raise StateError("the state of weights.guard belongs to other domains")
        self._best, self._at_hold, self.best_steps, self.overfitted = best, at_hold, best_steps, risen
        self._trained = trained
