"""The planner: which samples make up each optimizer step, for all ranks at once. Pure, small state.

`plan_step(corpus, settings, state, weights) -> StepPlan` draws samples by domain weight until they fill
`packs_per_step` packs of `pack_len` tokens, packs them, and carries what did not fit over to the next step,
where it is placed first. Same arguments, same plan, on every machine: the arithmetic is plain IEEE floats
and integers. The plan does not depend on the number of ranks.

Guarantees (tests/data/test_planner.py, numbers in docs/planning.md):

- a domain's samples are drawn in pseudo-random passes, each sample once per pass, none dropped;
- unit `samples`: after every draw each domain is within one sample of its target while weights hold
  (`share_rules.ChairmanRule`); deviations never add up over weight changes; a weight of 0 is never drawn;
- drawn samples wait in the carry-over, oldest placed first;
- the state is a cursor per domain, a share error per domain, totals, and the carry-over.

What is not covered: reading tokens (cache, collate), assigning packs to ranks (balance), threads (loader),
and choosing weights (domain floor).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from versatune_ds.data.plan import order
from versatune_ds.data.plan.balance import by_cost
from versatune_ds.data.plan.corpus import WEIGHT_UNITS, Corpus, Float64, PlannerSettings
from versatune_ds.data.plan.packing import Pack, fill_packs
from versatune_ds.data.plan.share_rules import ChairmanRule, DeficitRule, spread_over_remaining
from versatune_ds.data.plan.state import Carried, PlannerState, Totals, made_for
from versatune_ds.foundations.errors import ConfigError, DataError, StateError
from versatune_ds.strategies.simplex import SUM_TOLERANCE

MAX_OVERFILL = 0.005
"""Unit `samples`: drawing may go on past full packs by this share of them, while some domain is further
from its target than `SETTLED_SAMPLES`. Costs some carry-over, keeps steps with changing weights exact."""
SETTLED_SAMPLES = 0.75
FIRST_LOOKUP_SAMPLES = 32
"""Samples whose lengths are looked up first; each further look-up of a step takes twice as many."""


@dataclass(frozen=True, eq=False)
class StepPlan:
    """One optimizer step for all ranks.

    Attributes:
        step: index of the step, from 0.
        weights: float64[k], the weights it was drawn from, exactly as given.
        target_shares: float64[k], shares asked of this step's draws in the weight unit: the weights with
            exhausted domains taken out (averaged over the draws, if one ran out in the middle).
        packs: `packs_per_step` packs by falling cost; some are part empty only when the data runs out.
        drawn: samples drawn in this step, per domain.
        trained: samples in the packs, per domain (drawn + carried in - carried out).
        max_wait_steps: largest number of steps that a sample in the packs has waited since it was drawn.
        exhausted: ids of domains that have reached `max_epochs`.
        pack_len: slots in a pack.
        loss_weight: sum of the weights of all labels in the packs, the loss's normaliser; without weights,
            their number.
        state_after: state to plan the next step from.
    """

    step: int
    weights: Float64
    target_shares: Float64
    packs: tuple[Pack, ...]
    drawn: Totals
    trained: Totals
    max_wait_steps: int
    exhausted: tuple[int, ...]
    pack_len: int
    loss_weight: float
    state_after: PlannerState

    @property
    def num_packs(self) -> int:
        """Packs of the step over all ranks; always `packs_per_step`."""
        return len(self.packs)

    @property
    def num_samples(self) -> int:
        return sum(self.trained.samples)

    @property
    def tokens(self) -> int:
        """Real tokens in the packs."""
        return sum(self.trained.tokens)

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens in the packs, counted on shifted labels."""
        return sum(self.trained.supervised_tokens)

    @property
    def sum_squared_lengths(self) -> int:
        """Sum over samples of their tokens squared: what causal attention within samples costs by."""
        return sum(int((pack.lengths.astype(np.int64) ** 2).sum()) for pack in self.packs)

    @property
    def efficiency(self) -> float:
        """Real tokens over slots."""
        return self.tokens / (self.num_packs * self.pack_len)


_Drawn = tuple[int, int, int, int, int]
"""Domain, sample, tokens, supervised tokens, and the step it was drawn in; a tuple: there are many."""


class _Stream:
    """A domain's samples in drawing order, over pass ends, with lengths looked up in blocks."""

    def __init__(
        self, corpus: Corpus, settings: PlannerSettings, state: PlannerState, domain: int, limit: float
    ) -> None:
        self._domain = domain
        self.pass_index = state.passes[domain]
        self.position = state.positions[domain]
        self.remaining = limit - state.drawn.samples[domain]
        self._size = corpus.num_samples[domain]
        self._seed = settings.seed
        self._lengths = corpus.lengths[domain]
        self._supervised = corpus.supervised[domain]
        self._lookup_samples = FIRST_LOOKUP_SAMPLES
        self._step = state.step
        self._block: list[_Drawn] = []

    def next(self) -> _Drawn:
        if not self._block:
            which = {"seed": self._seed, "domain": self._domain, "pass_index": self.pass_index}
            samples = order.lookup(self._size, self.position, **which)[: self._lookup_samples]
            self._lookup_samples *= 2
            rows = [row.tolist() for row in (samples, self._lengths[samples], self._supervised[samples])]
            self._block = list(zip(repeat(self._domain), *rows, repeat(self._step)))
            self._block.reverse()
        self.remaining -= 1
        self.position += 1
        if self.position == self._size:
            self.position = 0
            self.pass_index += 1
        return self._block.pop()


def _totals(drawn: Sequence[_Drawn], num_domains: int) -> Totals:
    samples, tokens, supervised = counts = [[0] * num_domains for _ in WEIGHT_UNITS]
    for domain, _, length, labelled, _ in drawn:
        samples[domain] += 1
        tokens[domain] += length
        supervised[domain] += labelled
    return Totals(*map(tuple, counts))


def _carried(corpus: Corpus, carry: Sequence[Carried]) -> list[_Drawn]:
    """The carry-over in the order in which it is placed: oldest first, then longest first."""
    rows = sorted(
        (step, -int(corpus.lengths[domain][sample]), domain, sample) for domain, sample, step in carry
    )
    return [
        (domain, sample, -length, int(corpus.supervised[domain][sample]), step)
        for step, length, domain, sample in rows
    ]


def _draw(
    settings: PlannerSettings,
    weights: Sequence[float],
    credit: Sequence[float],
    streams: Sequence[_Stream],
    pool: list[_Drawn],
) -> tuple[list[float], list[float]]:
    """Draw into `pool` until it fills the step's packs, or until every domain is exhausted.

    Returns:
        (credit, target): k floats each; target is what was asked of these draws, in the weight unit.
    """
    of_samples = settings.weight_unit == "samples"
    rule_type = ChairmanRule if of_samples else DeficitRule
    by_supervised = settings.weight_unit == "supervised_tokens"
    full = settings.tokens_per_step
    overfull = full * (1 + MAX_OVERFILL)
    tokens = sum(length for _, _, length, _, _ in pool)
    before = list(credit)
    drawn_units = [0] * len(streams)
    while tokens < full and any(shared := spread_over_remaining(weights, [s.remaining for s in streams])):
        rule = rule_type(shared, credit)
        while True:
            domain = rule.pick()
            drawn = streams[domain].next()
            _, _, length, supervised, _ = drawn
            size = 1 if of_samples else supervised if by_supervised else length
            rule.add(domain, size)
            drawn_units[domain] += size
            tokens += length
            pool.append(drawn)
            if streams[domain].remaining <= 0:
                break
            if tokens < full:
                continue
            if not of_samples or tokens >= overfull or max(map(abs, rule.credit())) <= SETTLED_SAMPLES:
                break
        credit = rule.credit()
    target = [c - b + d for c, b, d in zip(credit, before, drawn_units, strict=True)]
    return list(credit), target


def _check_weights(corpus: Corpus, weights: Sequence[float] | Float64) -> Float64:
    """`weights` as a float64[k] of its own, if they are shares of domains that have data."""
    checked = np.array(weights, dtype=np.float64)
    k = len(corpus.lengths)
    if checked.shape != (k,):
        raise ConfigError(f"weights have shape {checked.shape}; one is needed for each of {k} domains")
    if not np.isfinite(checked).all() or (checked < 0).any():
        raise ConfigError(f"weights must be finite and >= 0: {dict(zip(corpus.names, checked, strict=True))}")
    if abs(math.fsum(checked) - 1) > SUM_TOLERANCE:
        raise ConfigError(f"weights sum to {math.fsum(checked)!r}; they must sum to 1")
    for name, size, weight in zip(corpus.names, corpus.num_samples, checked, strict=True):
        if weight > 0 and not size:
            raise DataError(f"domain {name} has weight {weight:.6g} and no samples; give it data or weight 0")
    checked.flags.writeable = False
    return checked


def plan_step(
    corpus: Corpus, settings: PlannerSettings, state: PlannerState, weights: Sequence[float] | Float64
) -> StepPlan:
    """Plan one optimizer step for all ranks. Pure: equal arguments give equal plans.

    Args:
        weights: float64[k], shares of the domains in `settings.weight_unit`; >= 0, sum 1.

    Raises:
        ConfigError: weights are not shares.
        DataError: a sample is longer than a pack, or a domain has weight and no samples.
        StateError: the state belongs to another corpus or other settings, or all data is used up.
    """
    corpus.check(settings)
    state.check(corpus, settings)
    exact_weights = _check_weights(corpus, weights)
    k = len(corpus.lengths)
    limits = settings.draw_limits(corpus)
    streams = [_Stream(corpus, settings, state, domain, limits[domain]) for domain in range(k)]

    pool = _carried(corpus, state.carry)
    num_carried = len(pool)
    credit, target = _draw(settings, exact_weights.tolist(), state.credit, streams, pool)
    if not pool:
        raise StateError(_used_up(corpus, settings, state, exact_weights))
    lengths = [length for _, _, length, _, _ in pool]
    bins, rest = fill_packs(lengths, num_carried, settings.packs_per_step, settings.pack_len)
    packs = [[pool[i] for i in indices] for indices in bins]

    drawn = _totals(pool[num_carried:], k)
    packed = [sample for pack in packs for sample in pack]
    trained = _totals(packed, k)
    state_after = PlannerState(
        step=state.step + 1,
        passes=tuple(stream.pass_index for stream in streams),
        positions=tuple(stream.position for stream in streams),
        credit=tuple(credit),
        carry=tuple(Carried(domain, sample, step) for domain, sample, _, _, step in (pool[i] for i in rest)),
        drawn=state.drawn.plus(drawn),
        trained=state.trained.plus(trained),
        made_for=state.made_for or made_for(corpus, settings),
    )
    if not sum(drawn.samples):
        target = spread_over_remaining(exact_weights.tolist(), [stream.remaining for stream in streams])
    asked = np.array(target)
    return StepPlan(
        step=state.step,
        weights=exact_weights,
        target_shares=asked / max(asked.sum(), 1e-300),
        packs=by_cost([_pack(pack) for pack in packs], settings.pack_len),
        drawn=drawn,
        trained=trained,
        max_wait_steps=max(state.step - step for _, _, _, _, step in packed),
        exhausted=tuple(i for i in range(k) if streams[i].remaining <= 0 and corpus.num_samples[i]),
        pack_len=settings.pack_len,
        loss_weight=math.fsum(corpus.loss_weight(domain, sample) for domain, sample, *_ in packed)
        if corpus.has_weights
        else sum(trained.supervised_tokens),
        state_after=state_after,
    )


def _pack(drawn: Sequence[_Drawn]) -> Pack:
    domains, indices, lengths, _, _ = zip(*drawn, strict=True) if drawn else ((),) * 5
    return Pack(
        domains=np.array(domains, dtype=np.int32),
        samples=np.array(indices, dtype=np.int64),
        lengths=np.array(lengths, dtype=np.int32),
    )


def _used_up(corpus: Corpus, settings: PlannerSettings, state: PlannerState, weights: Float64) -> str:
    limits = zip(corpus.names, settings.max_epochs, weights, strict=True)
    used = ", ".join(f"{name} ({epochs:g})" for name, epochs, w in limits if w > 0 and epochs is not None)
    return (
        f"step {state.step} cannot be planned: every domain with weight > 0 has been drawn "
        f"domains.max_epochs times: {used}. Train for at most {state.step} steps, or raise max_epochs "
        "and resume"
    )
