"""Held-out losses of a probe, sample by sample, and how they changed between two probes of the same samples.

With S_i and b_i the summed token losses of sample i at two probes, n_i its supervised tokens and
d_i = S_i - b_i, the rise of a domain over its n samples is

    r = sum d_i / sum n_i                                   nats per supervised token
    se(r)^2 = n / (n - 1) * sum (d_i - r n_i)^2 / (sum n_i)^2

(ratio estimator: Cochran, Sampling Techniques, 3rd ed., section 2.11). Both probes read the same samples, so
what both find hard cancels.

What is not covered: measuring (`engine/evaluate.py`), and what follows from a rise (`guard`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from versatune_ds.domain.statistics import DomainSums
from versatune_ds.foundations.errors import StateError

Array = npt.NDArray[np.float64]


class SampleLosses(NamedTuple):
    """Held-out losses of a probe, the same samples each time; one array per domain, empty without data."""

    losses: Sequence[Array]
    """float64[n]: summed token losses in nats."""
    tokens: Sequence[Array]
    """[n]: supervised tokens."""

    @property
    def sums(self) -> DomainSums:
        ids = np.concatenate([np.full(len(values), j) for j, values in enumerate(self.losses)])
        return DomainSums.from_samples(
            ids, np.concatenate(self.losses), np.concatenate(self.tokens), len(self.losses)
        )


class Rise(NamedTuple):
    """How much a held-out loss has risen: nats per supervised token; `stderr` is NaN below two samples."""

    value: float
    stderr: float

    def beyond(self, z: float) -> bool:
        """Whether it is more than z standard errors; a rise of unknown error is not."""
        return self.value > z * self.stderr


def rise_of(now: Array, then: Array, tokens: Array, whose: str = "") -> Rise:
    """`Rise` of one domain between two probes; float64[n] each. Without a supervised token: NaN.

    Raises:
        StateError: the two probes have other samples.
    """
    if len(now) != len(then):
        raise StateError(
            f"{whose}a probe of {len(now)} held-out samples after one of {len(then)}; go on with the "
            "weights.probe_samples and held-out data that the run began with"
        )
    n, total = int((tokens > 0).sum()), math.fsum(tokens)
    if total <= 0:
        return Rise(math.nan, math.nan)
    change = now - then
    value = math.fsum(change) / total
    residual = math.fsum((change - value * tokens) ** 2)
    return Rise(value, math.sqrt(n / (n - 1) * residual) / total if n >= 2 else math.nan)
