"""Whose next tokens lower the objective most: estimated from a run's own held-out probes, for `marginal`.

The objective is L = sum_j o_j l_j, with l_j the held-out loss of domain j and o_j the user's weights.
Between two probes domain j was trained on T_j supervised tokens, and its held-out loss rose by r_j with
standard error se_j over the same samples (`samples.rise_of`). The gain of its tokens in this window is

    g_j = -o_j r_j / T_j       its standard error o_j se_j / T_j            nats per trained token

Windows are pooled by precision P (1 / error^2), those before counting `MEMORY` of what they did at the next:

    P <- MEMORY P + P_new      G <- (MEMORY P G + P_new g) / (MEMORY P + P_new)      se(G) = 1 / sqrt(P)

What a rule reads is the advantage of each domain over the mean gain of the mixture w, in units of the
mixture's own speed, at most 1 in size, and 0 where it is within z standard errors:

    a_j = (G_j - sum_i w_i G_i) / sum_i w_i |G_i|

What is not covered: what the tokens of one domain do to the loss of another; it is counted to the domain
whose loss it is. A domain without tokens keeps its last estimate, which fades.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from versatune_ds.domain.probes.samples import Array, SampleLosses, rise_of
from versatune_ds.foundations.errors import StateError
from versatune_ds.strategies.simplex import Vector

MEMORY = 0.5


class MarginalGains:
    """See the module docstring; the same on every rank. `objective`: o, float64[k], >= 0."""

    def __init__(self, objective: Vector) -> None:
        self.objective = objective
        self._previous: Sequence[Array] | None = None
        self.precision = np.zeros(len(objective))
        """P; 0 where nothing is known."""
        self._pooled = np.zeros(len(objective))
        """P G."""

    @property
    def gains(self) -> Vector:
        """G, float64[k]; 0 where nothing is known."""
        known = self.precision > 0
        return np.divide(self._pooled, self.precision, out=np.zeros(len(known)), where=known)

    @property
    def stderr(self) -> Vector:
        """float64[k], of `gains`; infinite where nothing is known, 0 for a domain that is no objective."""
        unknown = np.where(self.objective > 0, np.inf, 0.0)
        return np.divide(1.0, np.sqrt(self.precision), out=unknown, where=self.precision > 0)

    def observe(self, probe: SampleLosses, tokens: Vector) -> None:
        """Take in a probe, and the supervised tokens float64[k] trained on since the one before it.

        Raises:
            StateError: it has other samples than the one before it.
        """
        previous = self._previous
        self._previous = probe.losses
        if previous is None:
            return
        self.precision *= MEMORY
        self._pooled *= MEMORY
        for j, (now, then) in enumerate(zip(probe.losses, previous, strict=True)):
            rise = rise_of(now, then, probe.tokens[j])
            scale = self.objective[j] / tokens[j] if tokens[j] > 0 else 0.0
            if scale > 0 and rise.stderr > 0:
                new = 1.0 / (scale * rise.stderr) ** 2
                self.precision[j] += new
                self._pooled[j] -= new * scale * rise.value

    def advantage(self, weights: Vector, z: float) -> Vector:
        """a, float64[k], each in -1 .. 1; 0 for a domain of which nothing is known."""
        gains, stderr, found = self.gains, self.stderr, np.zeros(len(weights))
        known = np.isfinite(stderr)
        share = np.where(known, weights, 0.0)
        share = share / (math.fsum(share) or 1.0)
        mean, speed = math.fsum(share * gains), math.fsum(share * np.abs(gains))
        if speed <= 0:
            return found
        errors = np.where(known, stderr, 0.0)
        for j in np.flatnonzero(known):
            of_difference = math.sqrt(math.fsum(((np.arange(len(share)) == j) - share) ** 2 * errors**2))
            difference = gains[j] - mean
            if abs(difference) > z * of_difference:
                found[j] = min(1.0, max(-1.0, difference / speed))
        return found

    def sentence(self, names: Sequence[str]) -> str:
        """The estimates in words."""
        told = ", ".join(
            f"{name} {g * 1e6:.4g} +- {s * 1e6:.2g}" if math.isfinite(s) else f"{name} unknown"
            for name, g, s in zip(names, self.gains, self.stderr, strict=True)
        )
        return f"gain in 1e-6 nats of the objective per trained token: {told}"

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON-exact."""
        previous = None if self._previous is None else [values.tolist() for values in self._previous]
        return {"previous": previous, "precision": self.precision.tolist(), "pooled": self._pooled.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; StateError: it is damaged, or of other domains."""
        try:
            previous = state["previous"]
            found = None if previous is None else [np.array(v, dtype=np.float64) for v in previous]
            precision, pooled = (np.array(state[k], dtype=np.float64) for k in ("precision", "pooled"))
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"the state of strategy marginal is damaged: {error!r}") from None
        k = len(self.objective)
        if precision.shape != (k,) or pooled.shape != (k,) or (found is not None and len(found) != k):
            raise StateError("the state of strategy marginal belongs to other domains")
        self._previous, self.precision, self._pooled = found, precision, pooled
