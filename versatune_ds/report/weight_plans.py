"""Replays of a loss history side by side: a table, a picture and JSON.

What is not covered: the replay itself (`domain/history.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from versatune_ds.config.variants import Variant
from versatune_ds.domain.history import window_weights
from versatune_ds.domain.weight_update import WeightUpdate
from versatune_ds.report.pictures import Panel, weight_panels

NOTE = (
    "The losses are those of the recorded run. They do not react to these weights: a domain that would get "
    "more data would learn faster than shown, and its gamma would fall sooner."
)


@dataclass(frozen=True)
class WeightPlan:
    """A variant and the updates it gives."""

    variant: Variant
    updates: Sequence[WeightUpdate]

    @property
    def names(self) -> list[str]:
        """The domains."""
        return list(self.updates[0].after)

    def to_json(self) -> dict[str, Any]:
        """Settings and all updates as plain values."""
        return {
            "label": self.variant.label,
            "domains": self.variant.domains.model_dump(mode="json"),
            "weights": self.variant.weights.model_dump(mode="json"),
            "updates": [update.to_json() for update in self.updates],
        }


def table(plans: Sequence[WeightPlan]) -> str:
    """Weights before and after in %, and what happened between, one line a variant.

    `moved` is half the sum of absolute differences between the first and the last weights: the share of the
    batch that changed hands. `domains` is the effective number of domains at the end, exp(entropy).
    """
    names = plans[0].names
    head = ["variant", *names, "moved", "domains", "gate open", "alarms"]
    rows = []
    for plan in plans:
        first, *_, last = window_weights(plan.updates, names)
        gates = [update.gate_open for update in plan.updates if update.gate_open is not None]
        alarms = Counter(text.split(":")[0] for update in plan.updates for text in update.alarms)
        rows.append(
            [
                plan.variant.label,
                *(f"{100 * old:.1f}->{100 * new:.1f}" for old, new in zip(first, last, strict=True)),
                f"{50 * np.abs(last - first).sum():.1f} %",
                f"{math.exp(plan.updates[-1].entropy):.2f}",
                f"{sum(gates)}/{len(gates)}" if gates else "-",
                ", ".join(f"{key} x{count}" for key, count in alarms.items()) or "-",
            ]
        )
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join(lines)


def picture(plans: Sequence[WeightPlan]) -> bytes:
    """The weights of every variant over steps, as PNG."""
    panels = []
    for plan in plans:
        paths = np.array(window_weights(plan.updates, plan.names))
        lines = {name: paths[:, j].tolist() for j, name in enumerate(plan.names)}
        panels.append(Panel(plan.variant.label, [update.step for update in plan.updates], lines))
    return weight_panels(panels)
