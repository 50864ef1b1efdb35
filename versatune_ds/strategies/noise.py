"""Is an update of the weights more than noise? Its standard error, from those of the losses.

With w(l) the weights that a rule makes of the losses l, and se_i the standard error of l_i, to first order

    se(w_j)^2 = sum_i ((w_j(l + se_i e_i) - w_j(l - se_i e_i)) / 2)^2

The losses of different domains come from different samples, so their errors add up in squares. Whole standard
errors are tried, not derivatives, so that gates and clipped excesses count as far as the noise reaches.

What is not covered: errors of the reference losses, which stay the same from update to update.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from versatune_ds.strategies.simplex import Vector


def update_stderr(rule: Callable[[Vector], Vector], stderr: Vector) -> Vector:
    """float64[k]: standard errors of the weights that `rule` gives.

    Args:
        rule: what is added to the losses, float64[k] -> weights float64[k].
        stderr: float64[k], of the losses; 0 or NaN for losses that are not of this window.
    """
    square = np.zeros_like(stderr)
    for i in np.flatnonzero(stderr > 0):
        shift = np.zeros_like(stderr)
        shift[i] = stderr[i]
        square += ((rule(shift) - rule(-shift)) / 2) ** 2
    return np.sqrt(square)


def refusal(before: Vector, after: Vector, stderr: Vector, z: float) -> str | None:
    """Why an update from `before` to `after` is not applied: it is not longer than z of its standard errors.

    Both are Euclidean lengths over the domains. None: it is applied.
    """
    moved, noise = (math.sqrt(math.fsum(v * v)) for v in (after - before, stderr))
    if moved > z * noise or moved == 0:
        return None
    return (
        f"refused as noise: the update is {moved:.4g} long, with a standard error of {noise:.4g} (update_z "
        f"{z:g}); the weights stand and the window goes on"
    )
