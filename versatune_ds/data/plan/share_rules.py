"""Whose turn it is: domains are drawn so that their shares follow the weights.

Both rules keep a credit per domain, target minus drawn in units of the weights: after n units, d of them of
a domain, its credit is credit0 + n * weight - d, computed anew each time, so that rounding errors do not add
up.

What is not covered: which of a domain's samples comes (order), and when a step is full (planner).
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class ShareRule:
    """Chooses the domain of the next draw so that achieved shares follow the weights.

    Args:
        weights: k shares >= 0, at least one above 0; a domain of weight 0 is never drawn.
        credit: k credits to go on from.
    """

    def __init__(self, weights: Sequence[float], credit: Sequence[float]) -> None:
        self._weights = weights
        self._start = credit
        self._active = [i for i, weight in enumerate(weights) if weight > 0]
        self._units = 0
        self._drawn = [0] * len(weights)

    def pick(self) -> int:
        """Domain of the next draw."""
        raise NotImplementedError

    def add(self, domain: int, size: int) -> None:
        """Count a draw of `size` units."""
        self._units += size
        self._drawn[domain] += size
        self._schedule(domain)

    def _schedule(self, domain: int) -> None:
        """Note what `pick` asks of a domain that was drawn."""

    def credit(self) -> list[float]:
        """Target minus drawn per domain, in units."""
        return [
            start + weight * self._units - drawn
            for start, weight, drawn in zip(self._start, self._weights, self._drawn, strict=True)
        ]


class ChairmanRule(ShareRule):
    """Tijdeman's chairman assignment: shares of draws within one sample after every draw.

    With m domains of weight > 0 and slack = 1 / (2m - 2), a domain may be drawn once its credit, next
    weight included, is at least slack; among those the one is drawn whose credit would first exceed
    1 - slack. Then |credit| <= 1 - slack after every draw (R. Tijdeman, The chairman assignment problem,
    Discrete Mathematics 32, 1980). Drawing the largest credit instead reaches 1.12 samples (20 domains).

    The bound holds from credits of 0 and for constant weights. At a change no rule that does not know the
    future can keep it: weights that move at every draw to the domains behind force 1/2 + ... + 1/m.
    The credits are kept, so nothing is lost, and the planner ends steps at settled credits.
    """

    def __init__(self, weights: Sequence[float], credit: Sequence[float]) -> None:
        super().__init__(weights, credit)
        m = len(self._active)
        self._slack = 1 / (2 * m - 2) if m > 1 else 0.0
        self._release = [0.0] * len(weights)
        self._deadline = [0.0] * len(weights)
        for domain in self._active:
            self._schedule(domain)

    def _schedule(self, domain: int) -> None:
        """Number of draws from which the domain may be, and before which it must be, drawn again."""
        missing = self._drawn[domain] - self._start[domain]
        self._release[domain] = (missing + self._slack) / self._weights[domain]
        self._deadline[domain] = (missing + 1 - self._slack) / self._weights[domain]

    def pick(self) -> int:
        now = self._units + 1
        deadline, release = self._deadline, self._release
        best, best_deadline = -1, math.inf
        for domain in self._active:
            if deadline[domain] < best_deadline and release[domain] <= now:
                best, best_deadline = domain, deadline[domain]
        if best < 0:  # only after a weight change: the credits of the active domains sum to less than 0
            best = min(self._active, key=deadline.__getitem__)
        return best


class DeficitRule(ShareRule):
    """Draws the domain that is furthest behind its target, for units in which samples differ in size.

    Credits stay within a few times the longest sample, so shares of tokens converge as 1 / tokens.
    """

    def pick(self) -> int:
        start, weights, drawn, units = self._start, self._weights, self._drawn, self._units
        return max(self._active, key=lambda i: start[i] + weights[i] * units - drawn[i])


def spread_over_remaining(weights: Sequence[float], remaining: Sequence[float]) -> list[float]:
    """Weights without exhausted domains (0 draws remain), scaled to sum to 1; all 0 when none is left."""
    left = [weight if draws > 0 else 0.0 for weight, draws in zip(weights, remaining, strict=True)]
    total = math.fsum(left)
    return [weight / total for weight in left] if total > 0 else left
