"""What an update of the weights is: its measurement, its proposal, and its record with the reasons in words.

What is not covered: computing them (`controller.py`, `versatune_ds.strategies`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from versatune_ds.config.weights import Weights
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.strategies.rules import GateDecision, Mask
from versatune_ds.strategies.simplex import SUM_TOLERANCE, Vector

ByName = dict[str, float]
ByNameOrNone = dict[str, float | None]


@dataclass(frozen=True)
class WeightUpdate:
    """One line of weights.jsonl. Dicts are by domain name, in table order; None where not known."""

    step: int
    """Optimizer steps done; the weights hold for the batch planned next. 0: the initial weights."""
    strategy: str
    loss_source: str
    """`train` or `probe`."""
    losses: ByNameOrNone
    """Nats per supervised token; of an absent domain the last one measured."""
    stderr: ByNameOrNone
    """Standard errors of `losses`."""
    tokens: ByName
    """Supervised tokens that the losses were measured on."""
    samples: ByName
    """Samples that the losses were measured on."""
    gamma: ByNameOrNone
    """Learnable potential; None without reference losses."""
    phi: ByName
    """Forgetting degree since the domain's loss before this one."""
    gate_open: bool | None
    """expansion: whether the target grew; None for other strategies."""
    before: ByName
    """Weights in force until now."""
    proposed: ByName
    """What the rule gave, before floor, cap and step limit."""
    after: ByName
    """Weights in force from now on, if `applied`."""
    applied: bool
    """False in shadow mode: `before` stays in force."""
    entropy: float
    """Entropy of `after` in nats."""
    reasons: list[str]
    """Why the numbers are what they are, in words."""
    alarms: list[str]
    refused: bool
    """True where `update_z` found noise: `before` stays in force, and the window goes on."""
    guard: dict[str, Any] | None = None
    """By domain: `OverfitGuard.to_json`; None without a guard."""

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` writes as one line of weights.jsonl; floats read back bit for bit."""
        line = asdict(self)
        if self.guard is None:
            del line["guard"]
        return line


@dataclass(frozen=True)
class Measurement:
    """Losses of one window beside the ones that stood before."""

    losses: Vector
    stderr: Vector
    measured: Mask
    present: Mask
    gamma: Vector
    phi: Vector
    reasons: list[str]


@dataclass(frozen=True)
class Proposal:
    """New weights before and after the limits, and why."""

    rule: Vector
    after: Vector
    gate: GateDecision | None
    reasons: list[str]
    refused: bool = False
    """Whether the rule's weights were within their noise; `rule` then is what was in force."""


def measurement_reasons(
    names: Sequence[str], sums: DomainSums, present: Mask, measured: Mask, settings: Weights
) -> list[str]:
    """Sentences on the domains that were absent, and on those measured for the first time.

    Args:
        present: bool[k]: whether the loss of `sums` counts.
        measured: bool[k]: whether a loss counted before.
    """
    reasons = []
    z = {"noise_z": settings.noise_z, "update_z": settings.update_z}
    asked = ", ".join(f"{setting} {value:g}" for setting, value in z.items() if value > 0)
    for j, name in enumerate(names):
        if present[j]:
            continue
        why = f"{sums.samples[j]:.0f} sample(s) give no standard error, {asked}"
        if sums.tokens[j] < settings.min_tokens:
            why = f"{sums.tokens[j]:.0f} supervised tokens, min_tokens {settings.min_tokens}"
        stands = "never measured, so not re-weighted by its loss; phi is 0"
        if measured[j]:
            stands = "its last loss and gamma stand, phi is 0"
        reasons.append(f"{name}: absent ({why}); {stands}")
    first = [name for name, new in zip(names, present & ~measured, strict=True) if new]
    return [*reasons, f"first loss of {', '.join(first)}: phi is 0"] if first else reasons


def limit_reasons(names: Sequence[str], proposed: Vector, after: Vector) -> list[str]:
    """What floor, cap and step limit changed in a proposal; empty where nothing."""
    if np.array_equal(proposed, after):
        return []
    moved = ", ".join(
        f"{name} {old:.6g} -> {new:.6g}"
        for name, old, new in zip(names, proposed, after, strict=True)
        if old != new
    )
    return [f"limits (min_weight, max_weight, max_relative_change) changed the proposal: {moved}"]


def optional(values: Vector, known: Mask) -> list[float | None]:
    """Plain floats, None where not known."""
    return [float(v) if ok else None for v, ok in zip(values, known, strict=True)]


def loaded_weights(values: list[float], k: int) -> Vector:
    """float64[k] on the simplex, from a checkpoint; ValueError where they are not."""
    weights = np.array(values, dtype=np.float64)
    if weights.shape != (k,) or not (weights >= 0).all():
        raise ValueError(f"weights {values}")
    if abs(math.fsum(weights) - 1.0) > SUM_TOLERANCE:
        raise ValueError(f"weights sum to {math.fsum(weights)}")
    return weights


def loaded_optional(values: list[float | None], k: int) -> Vector:
    """Inverse of `optional`, NaN where not known; ValueError where there are not k."""
    vector = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    if vector.shape != (k,):
        raise ValueError(f"{len(values)} values")
    return vector
