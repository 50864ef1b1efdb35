"""What there is to draw from: lengths of all samples by domain, what a step is, and how long the data lasts.

What is not covered: reading tokens (cache, collate), and what is drawn (`planner.py`).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from versatune_ds.config.weights import WeightUnit
from versatune_ds.foundations.errors import ConfigError, DataError, unknown_name

WEIGHT_UNITS: tuple[WeightUnit, ...] = get_args(WeightUnit)

Float64 = npt.NDArray[np.float64]


class SampleSource(Protocol):
    """What the planner reads of a token cache."""

    lengths: npt.NDArray[np.int32]
    """int32[n], tokens of each sample."""
    supervised: npt.NDArray[np.int32]
    """int32[n], supervised tokens of each sample, counted on shifted labels."""
    fingerprint: str
    """Hash of the content."""
    weight_sums: npt.NDArray[np.float64] | None
    """float64[n], sum of the weights of these; None: all weights are 1."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Lengths of all samples by domain; k domains in the order of the domain table.

    Attributes:
        lengths: per domain int32[n], tokens of each sample.
        supervised: per domain int32[n], supervised tokens of each sample, counted on shifted labels.
        weight_sums: per domain float64[n], sum of the weights of each sample's supervised tokens, or None
            where all are 1; () for none.
        names: k domain names, for messages.
        fingerprints: k content hashes; computed from the lengths where none are given.
    """

    lengths: Sequence[npt.NDArray[np.int32]]
    supervised: Sequence[npt.NDArray[np.int32]]
    names: tuple[str, ...] = ()
    fingerprints: tuple[str, ...] = ()
    weight_sums: Sequence[npt.NDArray[np.float64] | None] = ()
    _checked: set[tuple[int, WeightUnit]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        k = len(self.lengths)
        if not self.names:
            object.__setattr__(self, "names", tuple(f"domain {i}" for i in range(k)))
        if not self.fingerprints:
            hashes = map(_fingerprint, self.lengths, self.supervised)
            object.__setattr__(self, "fingerprints", tuple(hashes))
        assert k == len(self.supervised) == len(self.names) == len(self.fingerprints)
        assert list(map(len, self.lengths)) == list(map(len, self.supervised))

    @classmethod
    def from_caches(cls, caches: Sequence[SampleSource | None], names: Sequence[str]) -> Corpus:
        """Corpus over token caches in table order; None for a domain without data."""
        none = np.zeros(0, np.int32)
        return cls(
            lengths=[none if cache is None else cache.lengths for cache in caches],
            supervised=[none if cache is None else cache.supervised for cache in caches],
            names=tuple(names),
            fingerprints=tuple("" if cache is None else cache.fingerprint for cache in caches),
            weight_sums=[None if cache is None else cache.weight_sums for cache in caches],
        )

    @property
    def has_weights(self) -> bool:
        """Whether some token counts more or less than others in the loss."""
        return any(sums is not None for sums in self.weight_sums)

    def loss_weight(self, domain: int, sample: int) -> float:
        """Sum of the weights of a sample's supervised tokens; their number where all weights are 1."""
        sums = self.weight_sums[domain] if self.weight_sums else None
        return float(self.supervised[domain][sample] if sums is None else sums[sample])

    @functools.cached_property
    def num_samples(self) -> tuple[int, ...]:
        return tuple(len(lengths) for lengths in self.lengths)

    @functools.cached_property
    def num_tokens(self) -> tuple[int, ...]:
        return tuple(int(lengths.sum(dtype=np.int64)) for lengths in self.lengths)

    @functools.cached_property
    def num_supervised(self) -> tuple[int, ...]:
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


def token_supply(
    corpus: Corpus, settings: PlannerSettings, weights: Sequence[float] | Float64
) -> tuple[float, ...]:
    """Tokens of each domain until `max_epochs` uses it up, by its mean length; infinite without a limit, 0 of
    a domain of weight 0."""
    of_domain = zip(settings.draw_limits(corpus), corpus.num_tokens, corpus.num_samples, weights, strict=True)
    return tuple(
        limit * tokens / size if size and weight > 0 else 0.0 for limit, tokens, size, weight in of_domain
    )


def too_short(lasts: int, asked: int) -> ConfigError:
    """The error of data that last for fewer steps than are asked for."""
    return ConfigError(
        f"the data lasts for {lasts} steps under domains.max_epochs, and {asked} are asked for; raise "
        "max_epochs, add data, or train for fewer steps"
    )
