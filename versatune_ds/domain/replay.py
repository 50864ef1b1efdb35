"""Manual schedules: from the settings, or from the weights.jsonl of a run that is to be replayed.

weights.jsonl holds one `WeightUpdate.to_json()` a line. Of each line a replay needs the step and the weights
in force from then on: `after` where the update was applied, `before` where it was only computed (shadow).
Python writes floats so that they read back bit for bit; a replay trains with exactly the weights of the run.

What is not covered: computing another strategy's weights from the losses of a finished run (`history`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from versatune_ds.config.weights import Domains, ScheduledWeights
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError
from versatune_ds.foundations.json_input import read_steps
from versatune_ds.strategies.simplex import SUM_TOLERANCE, Vector, normalise


def schedule_from_weights_jsonl(path: Path) -> list[ScheduledWeights]:
    """The weights of a run by step, as a schedule for `strategy: manual`.

    Raises:
        DataError: with the line, where the file has no lines or one that is not a weight update, or where
            steps do not rise.
    """
    lines = read_steps(path, "weights.schedule names it")
    schedule = [_scheduled(record, path, number) for number, record in lines]
    if not schedule:
        raise DataError("holds no weight updates", path=path)
    return schedule


def resolve_schedule(
    schedule: Sequence[ScheduledWeights] | Path | None, table: DomainTable
) -> dict[int, Vector]:
    """Weights by step, float64[k] on the simplex, from `weights.schedule`; empty for None.

    Raises:
        ConfigError: an entry does not name the domains of the table.
        DataError: as `schedule_from_weights_jsonl`.
    """
    if schedule is None:
        return {}
    if isinstance(schedule, Path):
        what, entries = str(schedule), schedule_from_weights_jsonl(schedule)
    else:
        what, entries = "weights.schedule", list(schedule)
    return {e.step: normalise(table.vector(e.weights, f"{what}: step {e.step}")) for e in entries}


def _scheduled(record: Mapping[str, Any], path: Path, line: int) -> ScheduledWeights:
    if not {"before", "after"} <= set(record) or not isinstance(record.get("applied"), bool):
        needed = "it needs before, after, applied (true or false)"
        raise DataError(f"not a weight update: {needed}", path=path, line=line)
    weights = record["after"] if record["applied"] else record["before"]
    try:
        return ScheduledWeights(step=record["step"], weights=weights)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"not a weight update: {reason}", path=path, line=line) from None


def require_limits(schedule: Mapping[int, Vector], table: DomainTable, domains: Domains) -> None:
    """Raise ConfigError where a scheduled weight breaks floor or cap."""
    low, high = domains.min_weight - SUM_TOLERANCE, domains.max_weight + SUM_TOLERANCE
    for step, weights in schedule.items():
        for name, weight in zip(table.names, weights, strict=True):
            if not low <= weight <= high:
                raise ConfigError(
                    f"weights.schedule at step {step}: {name} has weight {weight:.6g}, outside min_weight "
                    f"{domains.min_weight:g} .. max_weight {domains.max_weight:g}; change the schedule or "
                    "the limits"
                )
