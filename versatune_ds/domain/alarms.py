"""Alarms: signs that an update cannot mean what it should, as texts for the log and weights.jsonl.

Each text opens with a fixed key (`gamma_spread`, `reference_reached`, `reference_near_zero`,
`weight_at_floor`, `weight_at_cap`, `low_entropy`) so that tools can count them. Alarms change nothing.

What is not covered: non-finite losses (the engine skips such steps).
"""

from __future__ import annotations

import math

from versatune_ds.config.weights import Domains
from versatune_ds.domain.table import DomainTable
from versatune_ds.strategies.rules import Mask
from versatune_ds.strategies.simplex import Vector, entropy

MIN_GAMMA_SPREAD = 0.01
"""Largest minus smallest gamma below which the normalisation cancels the update."""

MIN_REFERENCE_NATS = 0.05
"""Held-out losses of text models lie far above this; training-set minima lie below."""

VANISHED_WEIGHT = 1e-3
"""Without a floor, a weight below this counts as at its floor."""

MIN_ENTROPY_RATIO = 0.5
"""Alarm when the effective number of domains, exp(entropy), is below this share of its initial value."""

BOUND_TOLERANCE = 1e-9
"""Relative distance at which a weight counts as at its floor or cap."""


def reference_alarms(
    table: DomainTable, losses: Vector, reference: Vector, gamma: Vector, measured: Mask
) -> list[str]:
    """Alarms of a strategy that compares with reference losses.

    Args:
        losses, reference: float64[k], nats per supervised token.
        gamma: float64[k].
        measured: bool[k]; other domains are left out.
    """
    alarms = []
    for j, name in enumerate(table.names):
        if reference[j] < MIN_REFERENCE_NATS:
            alarms.append(
                f"reference_near_zero: {name}: {reference[j]:.4g} nats looks like a training-set minimum; "
                "gamma is then near 1 for every domain; use a held-out loss"
            )
        if measured[j] and reference[j] >= losses[j]:
            alarms.append(
                f"reference_reached: {name}: loss {losses[j]:.4f} is at or below its reference "
                f"{reference[j]:.4f}; gamma is 0"
            )
    spread = float(gamma[measured].max() - gamma[measured].min()) if measured.sum() > 1 else math.inf
    if spread < MIN_GAMMA_SPREAD:
        alarms.append(
            f"gamma_spread: {spread:.4g} between the largest and the smallest gamma is too small to move "
            "weights; check the reference losses"
        )
    return alarms


def weight_alarms(table: DomainTable, weights: Vector, initial: Vector, domains: Domains) -> list[str]:
    """Alarms of weights (float64[k]) that a dynamic strategy moved away from `initial`."""
    if len(table) == 1:
        return []
    alarms = []
    floor = domains.min_weight * (1.0 + BOUND_TOLERANCE) if domains.min_weight else VANISHED_WEIGHT
    cap = domains.max_weight * (1.0 - BOUND_TOLERANCE)
    for name, weight in zip(table.names, weights.tolist(), strict=True):
        if weight <= floor:
            alarms.append(f"weight_at_floor: {name}: {weight:.4g} (min_weight {domains.min_weight:g})")
        if weight >= cap:
            alarms.append(f"weight_at_cap: {name}: {weight:.4g} (max_weight {domains.max_weight:g})")
    effective, at_start = math.exp(entropy(weights)), math.exp(entropy(initial))
    if effective < MIN_ENTROPY_RATIO * at_start:
        alarms.append(
            f"low_entropy: {effective:.2f} effective domains, {at_start:.2f} at the start: "
            "the mixture collapses; consider min_weight"
        )
    return alarms
