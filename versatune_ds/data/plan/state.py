"""Where the planner stands: all that a resumed run needs beside corpus and settings, as exact JSON.

What is not covered: where it is kept (checkpoints).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from versatune_ds.data.plan.corpus import WEIGHT_UNITS, Corpus, Float64, PlannerSettings
from versatune_ds.foundations.errors import StateError

STATE_VERSION = 1
PRINTS = "corpus fingerprints"


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
        zeros = (0,) * num_domains
        return cls(zeros, zeros, zeros)

    def plus(self, other: Totals) -> Totals:
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
        zeros = (0,) * num_domains
        none = Totals.zero(num_domains)
        return cls(0, zeros, zeros, (0.0,) * num_domains, (), none, none)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON. Floats are written by `repr`, so that reading gives back the same bits."""
        return {"version": STATE_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PlannerState:
        """Inverse of `to_json`; StateError: another version, or not a planner state."""
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
        now = made_for(corpus, settings)
        differing = list(_differences(self.made_for or now, now))
        if differing:
            raise StateError(f"{'; '.join(differing)} since step {self.step}; set that back")
        if len(self.passes) != len(corpus.lengths):
            raise StateError(
                f"planner state has {len(self.passes)} domains, the corpus {len(corpus.lengths)}"
            )
        counted = zip(self.passes, self.positions, corpus.num_samples, self.drawn.samples, strict=True)
        for name, (passes, position, size, drawn) in zip(corpus.names, counted, strict=True):
            if passes * size + position != drawn or (position > 0 and position >= size):
                raise StateError(
                    f"planner state is damaged: {name} has {drawn} draws at pass {passes}, position "
                    f"{position} of {size} samples; use an older checkpoint"
                )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is not as it was, in words."""
    names, old_names = now["domains"], was.get("domains", [])
    if names == old_names:
        pairs = zip(names, was.get(PRINTS, []), now[PRINTS], strict=True)
        if changed := [name for name, old, new in pairs if old != new]:
            yield (
                f"the prepared training data of {', '.join(changed)} changed (files, tokenizer, template, or "
                "a setting that decides what is read)"
            )
    else:
        added, gone = ([n for n in a if n not in b] for a, b in ((names, old_names), (old_names, names)))
        parts = [f"{what} {', '.join(found)}" for what, found in (("added", added), ("gone", gone)) if found]
        yield f"domains.names changed ({'; '.join(parts) or 'their order'})"
    for key in now:
        if key not in ("domains", PRINTS) and was.get(key) != now[key]:
            yield f"{key} was {was.get(key)!r} and is {now[key]!r}"


def _totals_from_json(value: dict[str, Any]) -> Totals:
    return Totals(*(tuple(int(n) for n in value[unit]) for unit in WEIGHT_UNITS))


def made_for(corpus: Corpus, settings: PlannerSettings) -> dict[str, Any]:
    """What a state depends on. Not in it: world size and weights, which may change at any step, and
    `max_epochs`, which only decides when a weight becomes 0 (a user out of data must be able to raise it).
    """
    return {
        "domains": list(corpus.names),
        PRINTS: list(corpus.fingerprints),
        "batch.pack_len": settings.pack_len,
        "batch.packs_per_step": settings.packs_per_step,
        "domains.weight_unit": settings.weight_unit,
        "run.seed": settings.seed,
    }
