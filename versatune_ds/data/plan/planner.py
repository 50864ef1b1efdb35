"""The planner: which samples make up each optimizer step, for all ranks at once. Pure, small state.

`plan_step(corpus, settings, state, weights) -> StepPlan` draws samples by domain weight until they fill
`packs_per_step` packs of `pack_len` tokens, packs them, and carries what did not fit over to the next step,
where it is placed first. Same arguments, same plan, on every machine: the arithmetic is plain IEEE floats
and integers. The plan does not depend on the number of ranks.

Guarantees (tests/data/test_planner.py, numbers in docs/planning.md):

- a domain's samples are drawn in pseudo-random passes, each sample once per pass, none dropped;
- unit `samples`: after every draw each domain is within one sample of its target while weights hold
  (`_ChairmanRule`); deviations never add up over weight changes; a weight of 0 is never drawn;
- drawn samples wait in the carry-over, oldest placed first;
- the state is a cursor per domain, a share error per domain, totals, and the carry-over.

What is not covered: reading tokens (cache, collate), assigning packs to ranks (balance), threads (loader),
and choosing weights (domain floor).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from versatune_ds.data.plan import order
from versatune_ds.data.plan.balance import by_cost
from versatune_ds.data.plan.packing import Pack, fill_packs
from versatune_ds.foundations.errors import ConfigError, DataError, StateError, unknown_name

WeightUnit = Literal["samples", "tokens", "supervised_tokens"]
WEIGHT_UNITS: tuple[WeightUnit, ...] = ("samples", "tokens", "supervised_tokens")

STATE_VERSION = 1
WEIGHT_SUM_TOLERANCE = 1e-6
MAX_OVERFILL = 0.005
"""Unit `samples`: drawing may go on past full packs by this share of them, while some domain is further
from its target than `SETTLED_SAMPLES`. Costs some carry-over, keeps steps with changing weights exact."""
SETTLED_SAMPLES = 0.75
FIRST_LOOKUP_SAMPLES = 32
"""Samples whose lengths are looked up first; each further look-up of a step takes twice as many."""

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


class SampleSource(Protocol):
    """What the planner reads of a token cache."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32[n], tokens of each sample."""

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        """int32[n], supervised tokens of each sample, counted on shifted labels."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Lengths of all samples by domain; k domains in the order of the domain table.

    Attributes:
        lengths: per domain int32[n], tokens of each sample.
        supervised: per domain int32[n], supervised tokens of each sample, counted on shifted labels.
        names: k domain names, for messages.
        fingerprints: k content hashes; computed from the lengths where none are given.
    """

    lengths: Sequence[npt.NDArray[np.int32]]
    supervised: Sequence[npt.NDArray[np.int32]]
    names: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    _checked: set[tuple[int, WeightUnit]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        k = len(self.lengths)
        if not self.names:
            object.__setattr__(self, "names", tuple(f"domain {i}" for i in range(k)))
        if not k == len(self.supervised) == len(self.names):
            raise ValueError(
                f"{k} domains of lengths, {len(self.supervised)} of supervised, {len(self.names)} names"
            )
        for name, lengths, supervised in zip(self.names, self.lengths, self.supervised, strict=True):
            if len(lengths) != len(supervised):
                raise ValueError(f"{name}: {len(lengths)} lengths, {len(supervised)} supervised counts")
        if not self.fingerprints:
            hashes = map(_fingerprint, self.lengths, self.supervised)
            object.__setattr__(self, "fingerprints", tuple(hashes))
        if len(self.fingerprints) != k:
            raise ValueError(f"{k} domains, {len(self.fingerprints)} fingerprints")

    @classmethod
    def from_caches(cls, caches: Sequence[SampleSource | None], names: Sequence[str]) -> Corpus:
        """Corpus over token caches in table order; None for a domain without data."""
        none = np.zeros(0, np.int32)
        return cls(
            lengths=[none if cache is None else cache.lengths for cache in caches],
            supervised=[none if cache is None else cache.supervised for cache in caches],
            names=tuple(names),
            fingerprints=tuple("" if cache is None else cache.fingerprint for cache in caches),
        )

    @functools.cached_property
    def num_samples(self) -> tuple[int, ...]:
        """Samples of each domain."""
        return tuple(len(lengths) for lengths in self.lengths)

    @functools.cached_property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each domain."""
        return tuple(int(lengths.sum(dtype=np.int64)) for lengths in self.lengths)

    @functools.cached_property
    def num_supervised(self) -> tuple[int, ...]:
        """Supervised tokens of each domain."""
        return tuple(int(counts.sum(dtype=np.int64)) for counts in self.supervised)

    def check(self, settings: PlannerSettings) -> None:
        """Raise DataError for a sample that cannot be packed. Looks at all lengths once per setting."""
        key = (settings.pack_len, settings.weight_unit)
        if key in self._checked:
            return
        for name, lengths, supervised in zip(self.names, self.lengths, self.supervised, strict=True):
            if not len(lengths):
                continue
            if lengths.max() > settings.pack_len:
                longest = int(np.argmax(lengths))
                raise DataError(
                    f"domain {name}: sample {longest} has {lengths[longest]} tokens, a pack holds "
                    f"batch.pack_len = {settings.pack_len}; set data.overlong to drop, truncate or split "
                    "and prepare again, or raise batch.pack_len"
                )
            if lengths.min() < 1:
                shortest = int(np.argmin(lengths))
                raise DataError(f"domain {name}: sample {shortest} has no tokens; prepare the data again")
            if settings.weight_unit == "supervised_tokens" and not supervised.any():
                raise DataError(
                    f"domain {name} has no supervised token, so domains.weight_unit: supervised_tokens "
                    "cannot give it a share; use samples or tokens, or check its answers"
                )
        self._checked.add(key)


def _fingerprint(lengths: npt.NDArray[np.int32], supervised: npt.NDArray[np.int32]) -> str:
    digest = hashlib.sha256()
    for counts in (lengths, supervised):
        digest.update(np.ascontiguousarray(counts, dtype="<i4").data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class PlannerSettings:
    """What a step is. Everything here but `max_epochs` is fixed for the life of a planner state.

    Attributes:
        pack_len: tokens in a pack.
        packs_per_step: packs in an optimizer step over all ranks.
        weight_unit: what a weight is a share of: samples, tokens, or supervised_tokens.
        seed: seed of the sample order.
        max_epochs: per domain the largest number of passes (None: no limit); () limits none. A domain that
            reached it has weight 0 from there on, and its share is spread over the others in proportion.
    """

    pack_len: int
    packs_per_step: int
    weight_unit: WeightUnit = "samples"
    seed: int = 0
    max_epochs: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if self.pack_len < 1 or self.packs_per_step < 1:
            raise ConfigError(
                f"batch.pack_len {self.pack_len} and batch.packs_per_step {self.packs_per_step} must be >= 1"
            )
        if self.weight_unit not in WEIGHT_UNITS:
            raise ConfigError(unknown_name("domains.weight_unit", self.weight_unit, WEIGHT_UNITS))
        for limit in self.max_epochs:
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise ConfigError(f"domains.max_epochs {limit} must be a number > 0, or null for no limit")

    @property
    def tokens_per_step(self) -> int:
        """Slots of a step over all ranks."""
        return self.pack_len * self.packs_per_step

    def draw_limits(self, corpus: Corpus) -> tuple[float, ...]:
        """Most draws per domain, `max_epochs` times its samples rounded down, or infinity."""
        k = len(corpus.lengths)
        if self.max_epochs and len(self.max_epochs) != k:
            raise ConfigError(f"domains.max_epochs has {len(self.max_epochs)} entries for {k} domains")
        limits = []
        for domain, epochs in enumerate(self.max_epochs or (None,) * k):
            # The small term undoes float products such as 0.29 * 100 = 28.999999999999996.
            size = corpus.num_samples[domain]
            limit = math.inf if epochs is None else math.floor(epochs * size + 1e-6)
            if limit < 1 and size:
                raise ConfigError(
                    f"domains.max_epochs {epochs} of {corpus.names[domain]} is less than one of its {size} "
                    "samples; raise it, or give the domain weight 0"
                )
            limits.append(limit)
        return tuple(limits)


class Shares(NamedTuple):
    """Shares of the domains in the three units: float64[k] each, sum 1 (0 where nothing was counted)."""

    samples: Float64
    tokens: Float64
    supervised_tokens: Float64


@dataclass(frozen=True)
class Totals:
    """Counts per domain, k integers each."""

    samples: tuple[int, ...]
    tokens: tuple[int, ...]
    supervised_tokens: tuple[int, ...]

    @classmethod
    def zero(cls, num_domains: int) -> Totals:
        """Nothing counted."""
        zeros = (0,) * num_domains
        return cls(zeros, zeros, zeros)

    def plus(self, other: Totals) -> Totals:
        """Sum by domain."""
        return Totals(
            *(
                tuple(a + b for a, b in zip(getattr(self, unit), getattr(other, unit), strict=True))
                for unit in WEIGHT_UNITS
            )
        )

    def shares(self) -> Shares:
        """Every count over the sum of its unit."""
        counts = (np.array(getattr(self, unit), dtype=np.float64) for unit in WEIGHT_UNITS)
        return Shares(*(count / max(1.0, count.sum()) for count in counts))


class Carried(NamedTuple):
    """A sample that was drawn in `step` and not yet trained on."""

    domain: int
    sample: int
    step: int


@dataclass(frozen=True)
class PlannerState:
    """Where the planner stands; k domains. All that a resumed run needs beside corpus and settings.

    Attributes:
        step: steps planned so far, which is the index of the next one.
        passes: finished passes per domain.
        positions: samples drawn of the running pass, per domain.
        credit: target minus drawn in the weight unit, per domain.
        carry: drawn samples that are still to be trained on, oldest first.
        drawn: totals of all draws.
        trained: totals of all packed samples; drawn minus trained is the carry-over.
        made_for: corpus and settings the state belongs to; None before the first step.
    """

    step: int
    passes: tuple[int, ...]
    positions: tuple[int, ...]
    credit: tuple[float, ...]
    carry: tuple[Carried, ...]
    drawn: Totals
    trained: Totals
    made_for: dict[str, Any] | None = None

    @classmethod
    def initial(cls, num_domains: int) -> PlannerState:
        """State before the first step."""
        zeros = (0,) * num_domains
        none = Totals.zero(num_domains)
        return cls(0, zeros, zeros, (0.0,) * num_domains, (), none, none)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON. Floats are written by `repr`, so that reading gives back the same bits."""
        return {"version": STATE_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PlannerState:
        """Inverse of `to_json`.

        Raises:
            StateError: another version, or not a planner state.
        """
        if not isinstance(value, dict) or value.get("version") != STATE_VERSION:
            found = value.get("version") if isinstance(value, dict) else type(value).__name__
            raise StateError(
                f"planner state has version {found!r}, this program reads version {STATE_VERSION}; resume "
                "with the version of versatune_ds that wrote it"
            )
        try:
            state = cls(
                step=int(value["step"]),
                passes=tuple(int(n) for n in value["passes"]),
                positions=tuple(int(n) for n in value["positions"]),
                credit=tuple(float(x) for x in value["credit"]),
                carry=tuple(Carried(*map(int, entry)) for entry in value["carry"]),
                drawn=_totals_from_json(value["drawn"]),
                trained=_totals_from_json(value["trained"]),
                made_for=value["made_for"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"planner state is damaged ({error!r}); use an older checkpoint") from error
        k = len(state.passes)
        totals = (getattr(t, unit) for t in (state.drawn, state.trained) for unit in WEIGHT_UNITS)
        if any(len(part) != k for part in (state.positions, state.credit, *totals)):
            raise StateError("planner state is damaged (lists of unequal length); use an older checkpoint")
        return state

    def check(self, corpus: Corpus, settings: PlannerSettings) -> None:
        """Raise StateError, naming what differs, unless the state belongs to this corpus and settings."""
        k = len(corpus.lengths)
        if len(self.passes) != k:
            raise StateError(f"planner state has {len(self.passes)} domains, the corpus {k}")
        if self.made_for is not None:
            now = _made_for(corpus, settings)
            differing = [
                f"{key} was {self.made_for.get(key)!r} and is {now[key]!r}"
                for key in now
                if self.made_for.get(key) != now[key]
            ]
            if differing:
                raise StateError(
                    f"planner state of step {self.step} belongs to another run: {'; '.join(differing)}. "
                    "Restore these settings and data, or start a new run"
                )
        counted = zip(self.passes, self.positions, corpus.num_samples, self.drawn.samples, strict=True)
        for name, (passes, position, size, drawn) in zip(corpus.names, counted, strict=True):
            if passes * size + position != drawn or (position > 0 and position >= size):
                raise StateError(
                    f"planner state is damaged: {name} has {drawn} draws at pass {passes}, position "
                    f"{position} of {size} samples; use an older checkpoint"
                )


def _totals_from_json(value: dict[str, Any]) -> Totals:
    return Totals(*(tuple(int(n) for n in value[unit]) for unit in WEIGHT_UNITS))


def _made_for(corpus: Corpus, settings: PlannerSettings) -> dict[str, Any]:
    """What a state depends on. Not in it: world size and weights, which may change at any step, and
    `max_epochs`, which only decides when a weight becomes 0 (a user out of data must be able to raise it).
    """
    return {
        "domains": list(corpus.names),
        "corpus fingerprints": list(corpus.fingerprints),
        "batch.pack_len": settings.pack_len,
        "batch.packs_per_step": settings.packs_per_step,
        "domains.weight_unit": settings.weight_unit,
        "run.seed": settings.seed,
    }


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
    state_after: PlannerState

    @property
    def num_packs(self) -> int:
        """Packs of the step over all ranks; always `packs_per_step`."""
        return len(self.packs)

    @property
    def num_samples(self) -> int:
        """Samples in the packs."""
        return sum(self.trained.samples)

    @property
    def tokens(self) -> int:
        """Real tokens in the packs."""
        return sum(self.trained.tokens)

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens in the packs, counted on shifted labels: the loss's normaliser."""
        return sum(self.trained.supervised_tokens)

    @property
    def efficiency(self) -> float:
        """Real tokens over slots."""
        return self.tokens / (self.num_packs * self.pack_len)

    @property
    def shares(self) -> Shares:
        """Achieved shares of this step; those of the run are `state_after.trained.shares()`."""
        return self.trained.shares()


class _Stream:
    """A domain's samples in drawing order, over pass ends, with lengths looked up in blocks."""

    def __init__(
        self, corpus: Corpus, settings: PlannerSettings, state: PlannerState, domain: int, limit: float
    ) -> None:
        self.domain = domain
        self.pass_index = state.passes[domain]
        self.position = state.positions[domain]
        self.remaining = limit - state.drawn.samples[domain]
        self._size = corpus.num_samples[domain]
        self._seed = settings.seed
        self._lengths = corpus.lengths[domain]
        self._supervised = corpus.supervised[domain]
        self._lookup_samples = FIRST_LOOKUP_SAMPLES
        self._block: list[tuple[int, int, int]] = []

    def next(self) -> tuple[int, int, int]:
        """(sample, length, supervised tokens) of the next draw."""
        if not self._block:
            samples = order.lookup(
                self._size,
                self.position,
                seed=self._seed,
                domain=self.domain,
                pass_index=self.pass_index,
            )[: self._lookup_samples]
            self._lookup_samples *= 2
            rows = (samples, self._lengths[samples], self._supervised[samples])
            self._block = list(zip(*(row.tolist() for row in rows), strict=True))
            self._block.reverse()
        self.remaining -= 1
        self.position += 1
        if self.position == self._size:
            self.position = 0
            self.pass_index += 1
        return self._block.pop()


class _ShareRule(Protocol):
    """Chooses the domain of the next draw so that achieved shares follow the weights."""

    def pick(self) -> int:
        """Domain of the next draw."""

    def add(self, domain: int, size: int) -> None:
        """Count a draw of `size` units."""

    def credit(self) -> list[float]:
        """Target minus drawn per domain, in units."""


class _ChairmanRule:
    """Tijdeman's chairman assignment: shares of draws within one sample after every draw.

    With m domains of weight > 0 and slack = 1 / (2m - 2), a domain may be drawn once its credit, next
    weight included, is at least slack; among those the one is drawn whose credit would first exceed
    1 - slack. Then |credit| <= 1 - slack after every draw (R. Tijdeman, The chairman assignment problem,
    Discrete Mathematics 32, 1980). Drawing the largest credit instead reaches 1.12 samples (20 domains).

    The bound holds from credits of 0 and for constant weights. At a change no rule that does not know the
    future can keep it: weights that move at every draw to the domains behind force 1/2 + ... + 1/m.
    The credits are kept, so nothing is lost, and `_draw` ends steps at settled credits.

    After n draws, d of them of a domain, its credit is credit0 + n * weight - d: computed anew each time,
    so that rounding errors do not add up.
    """

    def __init__(self, weights: Sequence[float], credit: Sequence[float]) -> None:
        self._weights = weights
        self._start = credit
        self._active = [i for i, weight in enumerate(weights) if weight > 0]
        m = len(self._active)
        self._slack = 1 / (2 * m - 2) if m > 1 else 0.0
        self._num_draws = 0
        self._draws = [0] * len(weights)
        self._release = [0.0] * len(weights)
        self._deadline = [0.0] * len(weights)
        for domain in self._active:
            self._schedule(domain)

    def _schedule(self, domain: int) -> None:
        """Number of draws from which the domain may be, and before which it must be, drawn again."""
        missing = self._draws[domain] - self._start[domain]
        self._release[domain] = (missing + self._slack) / self._weights[domain]
        self._deadline[domain] = (missing + 1 - self._slack) / self._weights[domain]

    def pick(self) -> int:
        now = self._num_draws + 1
        deadline, release = self._deadline, self._release
        best, best_deadline = -1, math.inf
        for domain in self._active:
            if deadline[domain] < best_deadline and release[domain] <= now:
                best, best_deadline = domain, deadline[domain]
        if best < 0:  # only after a weight change: the credits of the active domains sum to less than 0
            best = min(self._active, key=deadline.__getitem__)
        return best

    def add(self, domain: int, size: int) -> None:
        self._num_draws += size
        self._draws[domain] += size
        self._schedule(domain)

    def credit(self) -> list[float]:
        return [
            start + weight * self._num_draws - draws
            for start, weight, draws in zip(self._start, self._weights, self._draws, strict=True)
        ]


class _DeficitRule:
    """Draws the domain that is furthest behind its target, for units in which samples differ in size.

    Credits stay within a few times the longest sample, so shares of tokens converge as 1 / tokens.
    """

    def __init__(self, weights: Sequence[float], credit: Sequence[float]) -> None:
        self._weights = weights
        self._start = credit
        self._active = [i for i, weight in enumerate(weights) if weight > 0]
        self._units = 0
        self._drawn = [0] * len(weights)

    def pick(self) -> int:
        start, weights, drawn, units = self._start, self._weights, self._drawn, self._units
        return max(self._active, key=lambda i: start[i] + weights[i] * units - drawn[i])

    def add(self, domain: int, size: int) -> None:
        self._units += size
        self._drawn[domain] += size

    def credit(self) -> list[float]:
        return [
            start + weight * self._units - drawn
            for start, weight, drawn in zip(self._start, self._weights, self._drawn, strict=True)
        ]


@dataclass
class _Pool:
    """Samples of a step before packing, as parallel lists; carried-over ones first, oldest first."""

    domains: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def totals(self, num_domains: int, start: int = 0) -> Totals:
        """Counts per domain of the samples from `start` on."""
        counts = [[0] * num_domains for _ in WEIGHT_UNITS]
        samples, tokens, supervised = counts
        for i in range(start, len(self.domains)):
            domain = self.domains[i]
            samples[domain] += 1
            tokens[domain] += self.lengths[i]
            supervised[domain] += self.supervised[i]
        return Totals(*map(tuple, counts))

    def subset(self, indices: Sequence[int]) -> _Pool:
        """The samples at `indices`."""
        return _Pool(
            *(
                [values[i] for i in indices]
                for values in (self.domains, self.samples, self.lengths, self.supervised, self.steps)
            )
        )


def _carried_pool(corpus: Corpus, carry: Sequence[Carried]) -> _Pool:
    """The carry-over in the order in which it is placed: oldest first, then longest first."""
    rows = [(step, -int(corpus.lengths[domain][sample]), domain, sample) for domain, sample, step in carry]
    rows.sort()
    return _Pool(
        domains=[domain for _, _, domain, _ in rows],
        samples=[sample for _, _, _, sample in rows],
        lengths=[-length for _, length, _, _ in rows],
        supervised=[int(corpus.supervised[domain][sample]) for _, _, domain, sample in rows],
        steps=[step for step, _, _, _ in rows],
    )


def _shared(weights: Sequence[float], streams: Sequence[_Stream]) -> list[float]:
    """Weights without exhausted domains, scaled to sum to 1; all 0 when none is left."""
    left = [w if stream.remaining > 0 else 0.0 for w, stream in zip(weights, streams, strict=True)]
    total = math.fsum(left)
    return [w / total for w in left] if total > 0 else left


def _draw(
    settings: PlannerSettings,
    step: int,
    weights: Sequence[float],
    credit: Sequence[float],
    streams: Sequence[_Stream],
    pool: _Pool,
) -> tuple[list[float], list[float]]:
    """Draw into `pool` until it fills the step's packs, or until every domain is exhausted.

    Returns:
        (credit, target): k floats each; target is what was asked of these draws, in the weight unit.
    """
    of_samples = settings.weight_unit == "samples"
    rule_type: type[_ChairmanRule] | type[_DeficitRule] = _ChairmanRule if of_samples else _DeficitRule
    by_supervised = settings.weight_unit == "supervised_tokens"
    full = settings.tokens_per_step
    overfull = full * (1 + MAX_OVERFILL)
    tokens = sum(pool.lengths)
    before = list(credit)
    drawn_units = [0] * len(streams)
    shared = _shared(weights, streams)
    while any(shared) and tokens < full:
        rule: _ShareRule = rule_type(shared, credit)
        while True:
            stream = streams[rule.pick()]
            domain = stream.domain
            sample, length, supervised = stream.next()
            size = 1 if of_samples else supervised if by_supervised else length
            rule.add(domain, size)
            drawn_units[domain] += size
            tokens += length
            pool.domains.append(domain)
            pool.samples.append(sample)
            pool.lengths.append(length)
            pool.supervised.append(supervised)
            pool.steps.append(step)
            if stream.remaining <= 0:
                break
            if tokens >= full and (not of_samples or tokens >= overfull or _settled(rule.credit())):
                break
        credit = rule.credit()
        shared = _shared(weights, streams)
    target = [c - b + d for c, b, d in zip(credit, before, drawn_units, strict=True)]
    return list(credit), target


def _settled(credit: Sequence[float]) -> bool:
    return max(map(abs, credit)) <= SETTLED_SAMPLES


def _check_weights(corpus: Corpus, weights: Sequence[float] | Float64) -> Float64:
    """`weights` as a float64[k] of its own, if they are shares of domains that have data."""
    checked = np.array(weights, dtype=np.float64)
    k = len(corpus.lengths)
    if checked.shape != (k,):
        raise ConfigError(f"weights have shape {checked.shape}; one is needed for each of {k} domains")
    if not np.isfinite(checked).all() or (checked < 0).any():
        raise ConfigError(f"weights must be finite and >= 0: {dict(zip(corpus.names, checked, strict=True))}")
    if abs(math.fsum(checked) - 1) > WEIGHT_SUM_TOLERANCE:
        raise ConfigError(f"weights sum to {math.fsum(checked)!r}; they must sum to 1")
    for name, size, weight in zip(corpus.names, corpus.num_samples, checked, strict=True):
        if weight > 0 and not size:
            raise DataError(f"domain {name} has weight {weight:.6g} and no samples; give it data or weight 0")
    checked.flags.writeable = False
    return checked


def plan_step(
    corpus: Corpus,
    settings: PlannerSettings,
    state: PlannerState,
    weights: Sequence[float] | Float64,
) -> StepPlan:
    """Plan one optimizer step for all ranks. Pure: equal arguments give equal plans.

    Args:
        corpus: lengths of all samples.
        settings: what a step is.
        state: where the planner stands; not changed.
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

    pool = _carried_pool(corpus, state.carry)
    num_carried = len(pool.domains)
    credit, target = _draw(settings, state.step, exact_weights.tolist(), state.credit, streams, pool)
    if not pool.domains:
        raise StateError(_used_up(corpus, settings, state, exact_weights))
    bins, rest = fill_packs(pool.lengths, num_carried, settings.packs_per_step, settings.pack_len)

    drawn = pool.totals(k, start=num_carried)
    packed = [i for pack in bins for i in pack]
    trained = pool.subset(packed).totals(k)
    state_after = PlannerState(
        step=state.step + 1,
        passes=tuple(stream.pass_index for stream in streams),
        positions=tuple(stream.position for stream in streams),
        credit=tuple(credit),
        carry=tuple(Carried(pool.domains[i], pool.samples[i], pool.steps[i]) for i in rest),
        drawn=state.drawn.plus(drawn),
        trained=state.trained.plus(trained),
        made_for=state.made_for or _made_for(corpus, settings),
    )
    asked = np.array(target) if sum(drawn.samples) else np.array(_shared(exact_weights.tolist(), streams))
    return StepPlan(
        step=state.step,
        weights=exact_weights,
        target_shares=asked / max(asked.sum(), 1e-300),
        packs=by_cost([_pack(pool, pack) for pack in bins], settings.pack_len),
        drawn=drawn,
        trained=trained,
        max_wait_steps=max(state.step - pool.steps[i] for i in packed),
        exhausted=tuple(s.domain for s in streams if s.remaining <= 0 and corpus.num_samples[s.domain]),
        pack_len=settings.pack_len,
        state_after=state_after,
    )


def _pack(pool: _Pool, indices: Sequence[int]) -> Pack:
    part = pool.subset(indices)
    return Pack(
        domains=np.array(part.domains, dtype=np.int32),
        samples=np.array(part.samples, dtype=np.int64),
        lengths=np.array(part.lengths, dtype=np.int32),
    )


def _used_up(corpus: Corpus, settings: PlannerSettings, state: PlannerState, weights: Float64) -> str:
    limits = zip(corpus.names, settings.max_epochs, weights, strict=True)
    used = ", ".join(f"{name} ({epochs:g})" for name, epochs, w in limits if w > 0 and epochs is not None)
    return (
        f"step {state.step} cannot be planned: every domain with weight > 0 has been drawn "
        f"domains.max_epochs times: {used}. Train for at most {state.step} steps, or raise max_epochs "
        "and resume"
    )


class StepsPerEpoch(NamedTuple):
    """Optimizer steps in which every sample of every domain is seen once."""

    packed: int
    """With packing, as this planner does."""
    unpacked: int
    """With one sample in each pack's place: the schedule that recipes without packing are tuned for."""


def steps_per_epoch(corpus: Corpus, settings: PlannerSettings) -> StepsPerEpoch:
    """Steps of one pass over all data, with and without packing, for the same `packs_per_step`.

    Packing cuts optimizer steps by the number of samples per pack; a learning rate or number of epochs that
    was tuned without packing may then train too little.
    """
    return StepsPerEpoch(
        packed=-(-sum(corpus.num_tokens) // settings.tokens_per_step),
        unpacked=-(-sum(corpus.num_samples) // settings.packs_per_step),
    )


@dataclass(frozen=True)
class Supply:
    """How much can be trained on before `max_epochs` uses everything up.

    Attributes:
        samples: most draws per domain; infinite without a limit.
        tokens: the same in tokens, by the domain's mean length; infinite without a limit.
        steps: full optimizer steps they fill together; infinite when one domain has no limit.
    """

    samples: tuple[float, ...]
    tokens: tuple[float, ...]
    steps: float


def supply(
    corpus: Corpus, settings: PlannerSettings, weights: Sequence[float] | Float64 | None = None
) -> Supply:
    """What the corpus can feed, to be compared with the planned steps before training.

    Args:
        corpus: lengths of all samples.
        settings: what a step is.
        weights: float64[k]; domains of weight 0 count as nothing. None: all domains count.
    """
    limits = settings.draw_limits(corpus)
    chosen = [True] * len(limits) if weights is None else [w > 0 for w in weights]
    samples = tuple(
        float(limit) if use and size else 0.0
        for limit, size, use in zip(limits, corpus.num_samples, chosen, strict=True)
    )
    tokens = tuple(
        count * total / size if size else 0.0
        for count, total, size in zip(samples, corpus.num_tokens, corpus.num_samples, strict=True)
    )
    steps = sum(tokens) / settings.tokens_per_step
    return Supply(samples, tokens, steps if math.isinf(steps) else float(math.floor(steps)))
