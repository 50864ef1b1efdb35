"""What to try next, and what to take: the objective and the limits, read off one surface a domain.

A surface holds y = log(l / b), l the held-out loss of a domain after a run and b before it, so that predicted
losses are b exp(y). The objective is sum_j o_j l_j. Its standard error is taken as sum_j o_j l_j se(y_j): not
less than the true one, however the domains' errors hang together. Intervals are 95 % t intervals of a run's
loss, with n - 1 degrees of freedom.

    next    the lowest objective within reach (mean minus one standard error of the surface), limits kept by
            the means minus theirs; then as if the mean had been found there, and again
            (Srinivas et al., arXiv 0912.3995; batches as in Ginsbourger et al., 2010, "kriging believer")
    taken   the lowest mean, limits kept by the upper end; where none keeps them, the least overstepped

What is not covered: bounds of mixtures (`bounds`), and drawing them (`design`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from versatune_ds.apps.search.design import Bounded, draw
from versatune_ds.apps.search.surface import Array, Surface

NUM_CANDIDATES = 500
APART = 0.02
"""Total variation distance (half the sum of absolute differences) of what is tried next from all that was:
the same run again has the same samples and says the same."""
REFINED = (30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Candidates close to the best one so far: parameters of Dirichlet distributions around it, ever narrower."""


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """What is wanted.

    Attributes:
        objective: float64[k], o, sum 1.
        base: float64[k], b.
        limits: float64[k], most that log(l / b) may be; infinite without a limit.
    """

    objective: Array
    base: Array
    limits: Array

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        objective: Mapping[str, float] | None,
        limits: Mapping[str, float],
        base: Array,
    ) -> Goal:
        """From settings: `weights.objective` and `search.limits`, by domain."""
        weights = np.array([1 / len(names) if objective is None else objective[name] for name in names])
        logs = np.array([np.log1p(limits[name]) if name in limits else np.inf for name in names])
        return cls(weights / weights.sum(), base, logs)

    def value(self, losses: Array) -> Array:
        """The objective, float64[...], of losses float64[..., k]."""
        return losses @ self.objective


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What the surfaces say of m mixtures; losses in nats per supervised token.

    Attributes:
        loss, low, high: float64[m, k], and the ends of the 95 % intervals of a run.
        objective, objective_error: float64[m], and the standard error of the surface.
        half_width: float64[m], of the objective's 95 % interval of a run.
        over: float64[m], how far the most overstepped limit is, in log(l / b), by the upper end of a run's
            interval. At most 0: all are kept.
        over_at_best: float64[m], the same by the mean minus one standard error of the surface.
    """

    loss: Array
    low: Array
    high: Array
    objective: Array
    objective_error: Array
    half_width: Array
    over: Array
    over_at_best: Array


def predict(surfaces: Sequence[Surface], goal: Goal, points: Array) -> Prediction:
    """Losses and objective at float64[m, k] mixtures."""
    mean, error, run_error = (
        np.stack(parts, axis=1) for parts in zip(*(s.at(points) for s in surfaces), strict=True)
    )
    wide = stdtrit(len(surfaces[0].values) - 1, 0.975) * run_error
    loss = goal.base * np.exp(mean)
    return Prediction(
        loss=loss,
        low=loss * np.exp(-wide),
        high=loss * np.exp(wide),
        objective=goal.value(loss),
        objective_error=goal.value(loss * error),
        half_width=goal.value(loss * wide),
        over=(mean + wide - goal.limits).max(axis=1),
        over_at_best=(mean - error - goal.limits).max(axis=1),
    )


def next_points(
    surfaces: Sequence[Surface], goal: Goal, centres: Sequence[Array], size: int, bounded: Bounded, seed: int
) -> list[Array]:
    """The `size` mixtures that are most worth trying.

    Args:
        centres: what candidates are drawn around, beside the best mixture known.
        seed: of the candidates.
    """
    generator = np.random.default_rng(seed)
    known, _ = best(surfaces, goal, centres, bounded, seed)
    wide = draw(centres, NUM_CANDIDATES, len(known), bounded, generator)
    candidates = np.stack([known, *wide, *draw([known], NUM_CANDIDATES, 30.0, bounded, generator)])
    chosen: list[Array] = []
    for _ in range(size):
        found = predict(surfaces, goal, candidates)
        reach = found.objective - found.objective_error
        apart = np.abs(candidates[:, None] - surfaces[0].points[None]).sum(axis=2) / 2
        near = apart.min(axis=1) < APART
        point = candidates[first_of(reach, np.where(near, np.inf, found.over_at_best))]
        chosen.append(point)
        surfaces = [surface.with_point(point) for surface in surfaces]
    return chosen


def best(
    surfaces: Sequence[Surface], goal: Goal, centres: Sequence[Array], bounded: Bounded, seed: int
) -> tuple[Array, bool]:
    """The mixture to take, and whether it keeps the limits."""
    generator = np.random.default_rng(seed)
    tried = [bounded(point) for point in surfaces[0].points]
    candidates = [*tried, *draw(centres, NUM_CANDIDATES, tried[0].size, bounded, generator)]
    for narrow in REFINED:
        point, _ = take(surfaces, goal, candidates)
        candidates = [point, *draw([point], NUM_CANDIDATES // 2, narrow, bounded, generator)]
    return take(surfaces, goal, candidates)


def take(surfaces: Sequence[Surface], goal: Goal, candidates: Sequence[Array]) -> tuple[Array, bool]:
    """Of some mixtures the one to take, and whether it keeps the limits."""
    found = predict(surfaces, goal, np.stack(candidates))
    i = first_of(found.objective, found.over)
    return candidates[i], bool(found.over[i] <= 0)


def first_of(values: Array, over: Array) -> int:
    """Index of the lowest value among those with `over` <= 0; where there is none, of the lowest `over`."""
    kept = over <= 0
    return int(np.where(kept, values, np.inf).argmin() if kept.any() else over.argmin())
