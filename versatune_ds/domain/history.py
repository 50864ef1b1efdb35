"""Loss histories: the losses of a finished run, fed to any strategy without a model.

Two forms of file are read:

    JSONL   {"step": 100, "losses": {"law": 2.1, "code": 1.4}}; `stderr`, `tokens` and `samples` by domain may
            follow. The weights.jsonl of a run has this form; its line of step 0, without a loss, is passed
            over.
    CSV     step,law,code          one column a domain, nats per supervised token; an empty cell or null is
            100,2.1,1.4            a domain that was absent. A column `law.stderr` holds standard errors.

`replay_history` gives the recorded losses to a `WeightController`, update by update, as sums that have
exactly these means and standard errors: the rules are those of a run, not a second implementation.

What is not covered: how the losses would have reacted to other weights. A history stays as it was recorded;
a domain that would have got more data would have learnt faster than the replay shows.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.domain.controller import WeightController, WeightUpdate
from versatune_ds.domain.json_input import read_lines
from versatune_ds.domain.statistics import NUM_ROWS, DomainSums, SumRow
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError, unknown_name
from versatune_ds.strategies.simplex import Vector

STDERR_SUFFIX = ".stderr"
UNKNOWN_TOKENS = 2.0**20
"""Supervised tokens of a domain whose count was not recorded: a power of two, so l N / N is exactly l."""
UNKNOWN_SAMPLES = 1024.0
"""Samples behind a standard error whose count was not recorded; it cancels."""


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of one update, by domain; a domain that was absent is left out."""

    step: int
    losses: Mapping[str, float]
    """Nats per supervised token."""
    stderr: Mapping[str, float]
    """Standard errors of `losses`, of the domains where they are known."""
    tokens: Mapping[str, float]
    """Supervised tokens that were measured, where known."""
    samples: Mapping[str, float]
    """Samples that were measured, where known."""


def read_history(path: Path) -> list[Losses]:
    """The updates of a history, in order of their steps.

    Raises:
        DataError: with the line, where the file cannot be read as described above or steps do not rise.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file; give a weights.jsonl, or losses as JSONL or CSV", path=path)
    read = _read_csv if path.suffix.lower() == ".csv" else _read_jsonl
    history: list[Losses] = []
    for line, update in read(path):
        if history and update.step <= history[-1].step:
            raise DataError(
                f"step {update.step} follows step {history[-1].step}; steps must rise", path=path, line=line
            )
        if update.step < 1:
            raise DataError(f"step {update.step}: an update has step 1 or more", path=path, line=line)
        history.append(update)
    if not history:
        raise DataError("holds no losses", path=path)
    return history


def domains_of(history: Sequence[Losses]) -> list[str]:
    """All domains that have a loss, in order of appearance."""
    return list(dict.fromkeys(name for update in history for name in update.losses))


def replay_history(
    history: Sequence[Losses], controller: WeightController, table: DomainTable
) -> list[WeightUpdate]:
    """What a controller makes of the recorded losses: its initial record, then one a recorded update.

    Args:
        history: from `read_history`; its steps are taken, `weights.every_n_steps` is not looked at.
        controller: fresh, with `loss_source: train`.
        table: the controller's domains.

    Raises:
        ConfigError: the history has a domain that the table lacks.
    """
    for name in domains_of(history):
        if name not in table.names:
            raise ConfigError(f"the history has losses of an {unknown_name('domain', name, table.names)}")
    records = [controller.initial_update()]
    for update in history:
        controller.observe(sums_of(update, table))
        records.append(controller.update(update.step))
    return records


def sums_of(update: Losses, table: DomainTable) -> DomainSums:
    """Sums with the recorded means, standard errors and counts, as if of n samples of N / n tokens each.

    Solves the ratio estimator of `DomainSums.stderr` for the sum of squared losses. Without a standard error
    there is one sample, of which none can be computed; without a loss there are no tokens.
    """
    values = np.zeros((NUM_ROWS, len(table)))
    for j, name in enumerate(table.names):
        if name not in update.losses:
            continue
        loss, stderr = update.losses[name], update.stderr.get(name)
        tokens = update.tokens.get(name, UNKNOWN_TOKENS)
        if tokens <= 0:
            continue
        samples = 1.0 if stderr is None else max(2.0, update.samples.get(name, UNKNOWN_SAMPLES))
        per_sample = tokens * tokens / samples
        residual = 0.0 if stderr is None else (stderr * tokens) ** 2 * (samples - 1.0) / samples
        values[SumRow.LOSS_SUM, j] = loss * tokens
        values[SumRow.TOKENS, j] = tokens
        values[SumRow.SAMPLES, j] = samples
        values[SumRow.LOSS_SQ, j] = residual + loss * loss * per_sample
        values[SumRow.LOSS_TOKENS, j] = loss * per_sample
        values[SumRow.TOKENS_SQ, j] = per_sample
    return DomainSums(values)


def window_weights(records: Sequence[WeightUpdate], names: Sequence[str]) -> list[Vector]:
    """float64[k] per record: the weights in force after it (`before` of a shadow update)."""
    chosen = [record.after if record.applied else record.before for record in records]
    return [np.array([weights[name] for name in names]) for weights in chosen]


def _read_jsonl(path: Path) -> Iterator[tuple[int, Losses]]:
    for number, record in read_lines(path):
        needed = isinstance(record, dict) and isinstance(record.get("losses"), dict)
        if not needed or not isinstance(record.get("step"), int) or isinstance(record["step"], bool):
            raise DataError(
                "no losses: a line needs `step` (a whole number) and `losses` (numbers by domain)",
                path=path,
                line=number,
            )
        columns = {
            key: _numbers(record.get(key) or {}, key, path, number)
            for key in ("losses", "stderr", "tokens", "samples")
        }
        if columns["losses"]:  # step 0 of weights.jsonl has none
            yield number, Losses(step=record["step"], **columns)


def _read_csv(path: Path) -> Iterator[tuple[int, Losses]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", path=path) from None
    head = [name.strip() for name in rows[0]] if rows else []
    names = [name for name in head if name != "step" and not name.endswith(STDERR_SUFFIX)]
    if "step" not in head or not names or len(set(head)) < len(head):
        raise DataError(
            f"its first line is {head}; expected `step` and one column a domain, each once", path=path, line=1
        )
    for name in head:
        if name.endswith(STDERR_SUFFIX) and name.removesuffix(STDERR_SUFFIX) not in names:
            raise DataError(f"column {name!r} has no column of its domain", path=path, line=1)
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(head):
            raise DataError(f"{len(row)} cells under {len(head)} columns", path=path, line=number)
        cells = dict(zip(head, (cell.strip() for cell in row), strict=True))
        try:
            step = int(cells.pop("step"))
            values = {name: float(cell) for name, cell in cells.items() if cell}
        except ValueError as error:
            raise DataError(f"not a number: {error}", path=path, line=number) from None
        stderr = {
            name.removesuffix(STDERR_SUFFIX): value
            for name, value in values.items()
            if name.endswith(STDERR_SUFFIX)
        }
        losses = {name: value for name, value in values.items() if name in names}
        yield (
            number,
            Losses(
                step=step,
                losses=_numbers(losses, "losses", path, number),
                stderr=_numbers(stderr, "stderr", path, number),
                tokens={},
                samples={},
            ),
        )


def _numbers(values: Any, key: str, path: Path, line: int) -> dict[str, float]:
    """Numbers by domain without those that are null; each must be finite and >= 0."""
    if not isinstance(values, dict):
        raise DataError(f"{key} must hold numbers by domain", path=path, line=line)
    known = {name: value for name, value in values.items() if value is not None}
    for name, value in known.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise DataError(f"{key} of {name} is {value!r}; expected a number >= 0", path=path, line=line)
    return {name: float(value) for name, value in known.items()}
