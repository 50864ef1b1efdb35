"""What a mixture may be: floor and cap of every share, and how often a domain's samples may be repeated.

The finished run draws n_j samples of domain j. In the unit of the weights (u_j: 1, or the mean tokens or
supervised tokens of a sample) n_j u_j is in proportion to w_j, and all samples fill the run's T tokens:

    n_j = T (w_j / u_j) / sum_i w_i m_i / u_i          m_i: mean tokens of a sample

`domains.max_epochs` limits n_j as in the planner (`data/plan/corpus.py`), which would spread what is over it
over other domains: not the mixture that was asked for.

What is not covered: repetition in the short runs of a search, which is less than in the finished run.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from versatune_ds.apps.search.surface import Array
from versatune_ds.config.weights import Domains
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings, token_supply, too_short
from versatune_ds.strategies.simplex import project

ATTEMPTS = 50
"""A cap moves with the mixture, as samples differ in length; it settles after a few."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds of mixtures of k domains.

    Attributes:
        least, most: of every share.
        tokens: T of the finished run.
        sizes: float64[k], samples of each domain.
        draws: float64[k], most draws of each domain; infinite without a limit.
        mean_tokens: float64[k], m.
        units: float64[k], u.
    """

    least: float
    most: float
    tokens: float
    sizes: Array
    draws: Array
    mean_tokens: Array
    units: Array

    @classmethod
    def of(cls, domains: Domains, corpus: Corpus, planner: PlannerSettings, steps: int) -> Bounds:
        """Bounds of a run of so many steps; ConfigError where the data do not last so long."""
        sizes = np.array(corpus.num_samples, dtype=np.float64)
        last = sum(token_supply(corpus, planner, np.ones_like(sizes))) / planner.tokens_per_step
        if last < steps:
            raise too_short(math.floor(last), steps)
        mean_tokens = np.array(corpus.num_tokens) / sizes
        supervised = np.array(corpus.num_supervised) / sizes
        units = {"samples": np.ones(len(sizes)), "tokens": mean_tokens, "supervised_tokens": supervised}
        return cls(
            domains.min_weight,
            domains.max_weight,
            float(steps * planner.tokens_per_step),
            sizes,
            np.array(planner.draw_limits(corpus)),
            mean_tokens,
            units[planner.weight_unit],
        )

    def passes(self, shares: Array) -> Array:
        """float64[k]: how often the finished run sees each domain's samples."""
        return self._draws_per_share(shares) * shares / self.sizes

    def nearest(self, shares: Array) -> Array:
        """The mixture within all bounds that keeps the proportions of float64[k] `shares` (sum 1) best.

        Raises:
            ConfigError: there is none.
        """
        lower, found = np.full(len(shares), self.least), shares
        for _ in range(ATTEMPTS):
            upper = np.minimum(self.most, self.draws / self._draws_per_share(found))
            before, found = found, project(shares, np.minimum(lower, upper), upper)
            if np.allclose(found, before, rtol=0, atol=1e-9):
                break
        return found

    def _draws_per_share(self, shares: Array) -> Array:
        """float64[k]: n / w."""
        return self.tokens / (self.units * float(shares @ (self.mean_tokens / self.units)))
