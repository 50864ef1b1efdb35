"""Points of the simplex (weights that sum to 1) and the limits they must keep.

`project` finds the weights inside given bounds that change the proposed proportions least: one common
factor s with `w_j = clip(s * v_j, lower_j, upper_j)` and `sum w = 1`. That is the projection in the
Kullback-Leibler sense, and it is chosen over the Euclidean one because domains that touch no bound keep
their ratios exactly: a floor under one domain takes from the others in proportion, as the update rules do.

All sums are exactly rounded (`math.fsum`), so they do not depend on the order of terms or on how numpy
vectorises them; equal inputs give equal bits.

What is not covered: a limit on passes over a domain's data (`versatune_ds.data.plan.planner`).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from versatune_ds.foundations.errors import ConfigError

Vector = npt.NDArray[np.float64]
"""float64[k]: one number per domain, in the order of the domain table."""

SUM_TOLERANCE = 1e-12
"""Weights whose sum is this close to 1 are on the simplex; they are left as they are, bit for bit."""

NEGLIGIBLE = 1e-290
"""Proposed weights below this share of the largest one count as 0, so that quotients stay finite."""


def normalise(values: Vector) -> Vector:
    """Scale `values` (float64[k], >= 0, not all 0) to sum 1; one that does already is kept bit for bit."""
    values = np.array(values, dtype=np.float64)
    total = math.fsum(values)
    if not (np.isfinite(values).all() and (values >= 0).all() and total > 0):
        raise ValueError(f"cannot be weights: {values.tolist()}; expected numbers >= 0, not all 0")
    return values if abs(total - 1.0) <= SUM_TOLERANCE else values / total


def project(proposed: Vector, lower: Vector, upper: Vector) -> Vector:
    """The weights within bounds that keep the proportions of `proposed`; see the module docstring.

    Exact (sorted break points of a piecewise linear function, no iteration), deterministic and idempotent.
    Where all positive entries are at their upper bound and weight is left, the entries proposed as 0 share it
    equally within their bounds.

    Args:
        proposed: float64[k], >= 0; it need not sum to 1.
        lower, upper: float64[k], 0 <= lower <= upper.

    Returns:
        float64[k], sum 1 within `SUM_TOLERANCE`, lower <= w <= upper exactly.

    Raises:
        ConfigError: no weights satisfy the bounds.
        ValueError: an input is not finite or negative.
    """
    for values in (proposed, lower, upper):
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"expected finite numbers >= 0, found {values.tolist()}")
    _check_feasible(lower, upper)
    inside = (proposed >= lower).all() and (proposed <= upper).all()
    if inside and abs(math.fsum(proposed) - 1.0) <= SUM_TOLERANCE:
        return np.array(proposed, dtype=np.float64)
    largest = float(proposed.max())
    direction = proposed / largest if largest > 0 else np.zeros_like(proposed)
    positive = direction > NEGLIGIBLE
    weights = np.where(positive, upper, lower)
    room = 1.0 - math.fsum(weights)
    if room <= 0:
        target = 1.0 - math.fsum(lower[~positive])
        weights[positive] = _scale_to(direction[positive], lower[positive], upper[positive], target)
    else:
        target = 1.0 - math.fsum(upper[positive])
        equal = np.ones(int((~positive).sum()))
        weights[~positive] = _scale_to(equal, lower[~positive], upper[~positive], target)
    return weights


def limit_weights(
    proposed: Vector,
    previous: Vector,
    *,
    min_weight: float,
    max_weight: float,
    max_relative_change: float | None = None,
) -> Vector:
    """`proposed` projected onto floor, cap and step limit: |w_j - w_old_j| <= c w_old_j.

    Where `previous` itself breaks the floor or cap (they were changed between two runs), the step is
    measured from its own projection: floor and cap always hold, and the problem always has a solution.

    Args:
        proposed: float64[k], what the update rule wants.
        previous: float64[k] on the simplex, the weights in force.
        max_relative_change: c; None: no step limit.

    Raises:
        ConfigError: floor or cap cannot be kept by k weights that sum to 1.
    """
    lower = np.full(proposed.shape, float(min_weight))
    upper = np.full(proposed.shape, float(max_weight))
    if max_relative_change is not None:
        anchor = project(previous, lower, upper)
        lower = np.maximum(lower, (1.0 - max_relative_change) * anchor)
        upper = np.minimum(upper, (1.0 + max_relative_change) * anchor)
    return project(proposed, lower, upper)


def entropy(weights: Vector) -> float:
    """Shannon entropy in nats; exp of it is the effective number of domains."""
    return -math.fsum(w * math.log(w) for w in weights.tolist() if w > 0)


def weights_digest(weights: Vector) -> int:
    """63-bit hash of the float64 bytes (little-endian), to compare across ranks in one int64."""
    data = (np.asarray(weights, dtype="<f8") + 0.0).tobytes()  # + 0.0: -0.0 and 0.0 are one weight
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def _check_feasible(lower: Vector, upper: Vector) -> None:
    if (lower > upper).any():
        j = int(np.argmax(lower > upper))
        raise ConfigError(
            f"weight {j} would have to be >= {lower[j]:.6g} and <= {upper[j]:.6g}: "
            "lower min_weight or raise max_weight"
        )
    least, most = math.fsum(lower), math.fsum(upper)
    if least > 1.0 + SUM_TOLERANCE or most < 1.0 - SUM_TOLERANCE:
        raise ConfigError(
            f"no weights sum to 1 within the limits: the lower ones sum to {least:.6g}, the upper ones "
            f"to {most:.6g}; lower min_weight or raise max_weight"
        )


def _scale_to(direction: Vector, lower: Vector, upper: Vector, target: float) -> Vector:
    """clip(s * direction, lower, upper) with the s for which it sums to `target`; direction > 0."""

    def total(scale: float) -> float:
        return math.fsum(np.clip(scale * direction, lower, upper))

    # The sum grows piecewise linearly with s; it bends where an entry leaves `lower` or reaches `upper`.
    bends = np.unique(np.concatenate([lower / direction, upper / direction])).tolist()
    below = [s for s in bends if total(s) <= target]
    above = [s for s in bends if total(s) > target]
    if not below:
        return lower.copy()
    if not above:
        return upper.copy()
    start, end = below[-1], above[0]
    at_lower = lower / direction >= end
    at_upper = upper / direction <= start
    moving = ~(at_lower | at_upper)
    weights = np.where(at_lower, lower, upper)
    if moving.any():  # none moves where rounding alone parts the sums at `start` and `end`
        scale = (target - math.fsum(weights[~moving])) / math.fsum(direction[moving])
        weights[moving] = np.clip(scale * direction, lower, upper)[moving]
    return weights
