"""Which mixtures are tried: how many the budget allows, the first ones, and candidates for those after.

    proxies     a run for each mixture
    adapters    a run a domain; a mixture costs an evaluation of merged adapters

Two runs, on the start mixture and on the one that was found, check the result.

A run costs steps x packs x pack_len tokens and two evaluations, a held-out token a third of a trained one
(forward only; a backward costs two forwards). Start and uniform mixture come first. The first half of all
mixtures is drawn from Dirichlet distributions, in turn around the start p (parameters k p) and the uniform
mixture (all 1: every mixture alike); the others are chosen (`choice.next_points`).

What is not covered: bounds of mixtures (`bounds`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from versatune_ds.apps.search.surface import Array
from versatune_ds.foundations.errors import ConfigError

EVALUATED = 1 / 3
"""Cost of a held-out token over that of a trained one."""
MOST_MERGED = 10
"""Evaluated mixtures a domain, at most: beyond that the surface is known."""
DECIMALS = 4
LEAST_PARAMETER = 0.05
"""Of a Dirichlet distribution: a domain without a share may be tried too."""
Bounded = Callable[[Array], Array]
"""float64[k] >= 0 -> the nearest mixture within the bounds of the run."""


@dataclasses.dataclass(frozen=True)
class Counts:
    singles: int
    """Runs on one domain."""
    points: int
    """Mixtures that are tried."""
    checks: int
    """Runs that check the result."""
    tokens: float
    """Cost of it all, in trained tokens."""

    @property
    def total(self) -> int:
        """Runs and evaluations."""
        return self.singles + self.points + self.checks


def count(way: str, budget: int, num_domains: int, run_tokens: int, held_out_tokens: int) -> Counts:
    """How many runs and evaluations a budget pays for.

    Args:
        way: `proxies` or `adapters`.
        budget: in trained tokens.
        run_tokens: most tokens of a run.
        held_out_tokens: of one evaluation.

    Raises:
        ConfigError: too few for a surface: at least k + 3 mixtures have to be tried.
    """
    evaluation = EVALUATED * held_out_tokens
    run = run_tokens + 2 * evaluation
    singles, checks = 0 if way == "proxies" else num_domains, 2
    each = run if way == "proxies" else evaluation
    fixed, least = (singles + checks) * run, num_domains + 3
    points = math.floor((budget - fixed) / each)
    if points < least:
        needed = math.ceil(fixed + least * each)
        raise ConfigError(
            f"search.budget_tokens {budget:,} is too little for {way}: {singles + checks} runs of "
            f"{run_tokens:,} tokens and {least} mixtures need {needed:,}; raise it, or lower search.steps, "
            "search.packs_per_step or evaluation.max_samples_per_domain"
        )
    if way == "adapters":
        points = min(points, max(least, MOST_MERGED * num_domains))
    return Counts(singles, points, checks, fixed + points * each)


def round_size(done: int, points: int, rounds: int) -> int:
    """Mixtures of the next round, after `done` of all `points`: half of them, then even parts of the rest."""
    first = math.ceil(points / 2)
    return first if done == 0 else min(points - done, math.ceil((points - first) / rounds))


def first_points(start: Array, size: int, bounded: Bounded, seed: int) -> list[Array]:
    """Start, uniform mixture (if it is another), and mixtures drawn around them in turn; within the bounds,
    rounded."""
    uniform = np.full(len(start), 1 / len(start))
    drawn = draw([start, uniform], size, len(start), bounded, np.random.default_rng(seed))
    first = {tuple(point): point for point in (rounded(bounded(start)), rounded(bounded(uniform)))}
    return [*first.values(), *drawn][:size]


def draw(
    centres: Sequence[Array], size: int, weight: float, bounded: Bounded, generator: np.random.Generator
) -> list[Array]:
    """Mixtures around the centres in turn, Dirichlet(weight x centre), within the bounds, rounded."""
    parameters = [np.maximum(weight * centre, LEAST_PARAMETER) for centre in centres]
    return [rounded(bounded(generator.dirichlet(parameters[i % len(centres)]))) for i in range(size)]


def rounded(shares: Array) -> Array:
    """Shares with few decimals that sum to 1, by largest remainders: bounds with as few still hold."""
    scaled = shares * 10**DECIMALS
    units = np.floor(scaled + 1e-6)
    missing = round(10**DECIMALS - units.sum())
    units[np.argsort(units - scaled, kind="stable")[:missing]] += 1
    return units / 10**DECIMALS
