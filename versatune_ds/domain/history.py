"""The losses of a finished run, fed to any strategy without a model.

Read is the weights.jsonl of a run: of each line `step`, `losses` (nats per supervised token, by domain) and,
where known, `stderr`, `tokens` and `samples`; null or nothing is a domain that was absent. The line of step 0
has no losses and is passed over. Losses of a line that was `refused` are in those of the next line, too, and
those of a probe (`loss_source`) have the next probe in their place: a replay that refuses adds neither up.

`replay_history` gives the recorded losses to a `WeightController`, update by update, as sums that have
exactly these means and standard errors: the rules are those of a run, not a second implementation.

What is not covered: how the losses would have reacted to other weights. A history stays as it was recorded;
a domain that would have got more data would have learnt faster than the replay shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.statistics import NUM_ROWS, DomainSums, SumRow
from versatune_ds.domain.table import DomainTable
from versatune_ds.domain.weight_update import WeightUpdate
from versatune_ds.foundations.errors import ConfigError, DataError, unknown_name
from versatune_ds.foundations.json_input import numbers, read_steps

UNKNOWN_TOKENS = 2.0**20
"""Supervised tokens of a domain whose count was not recorded: a power of two, so l N / N is exactly l."""
UNKNOWN_SAMPLES = 1024.0
"""Samples behind a standard error whose count was not recorded; it cancels."""
COLUMNS = ("losses", "stderr", "tokens", "samples")


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
    replaced: bool = False
    """Whether the next losses include these, or were measured anew."""


def read_history(path: Path) -> list[Losses]:
    """The updates of a weights.jsonl that have losses, in order of their steps.

    Raises:
        DataError: with the line, where the file cannot be read as described above or steps do not rise.
    """
    history: list[Losses] = []
    for line, record in read_steps(path, "give the weights.jsonl of a run"):
        if not isinstance(record.get("losses"), dict):
            raise DataError("a line needs `losses`, numbers by domain", path=path, line=line)
        columns = {key: _known(record.get(key) or {}, key, path, line) for key in COLUMNS}
        if columns["losses"] and record["step"] < 1:
            raise DataError("step 0: an update has step 1 or more", path=path, line=line)
        if columns["losses"]:
            replaced = record.get("refused") is True or record.get("loss_source") == "probe"
            history.append(Losses(record["step"], **columns, replaced=replaced))
    if not history:
        raise DataError("holds no losses", path=path)
    return history


def replay_history(
    history: Sequence[Losses], controller: WeightController, table: DomainTable
) -> list[WeightUpdate]:
    """What a controller makes of the recorded losses: its initial record, then one a recorded update.

    Args:
        history: from `read_history`; its steps are taken, `weights.every_n_steps` is not looked at.
        controller: fresh, with `loss_source: train` and no guard.

    Raises:
        ConfigError: the history has a domain that the table lacks.
    """
    for name in (name for update in history for name in update.losses):
        if name not in table.names:
            raise ConfigError(f"the history has losses of an {unknown_name('domain', name, table.names)}")
    records = [controller.initial_update()]
    for update in history:
        controller.observe(sums_of(update, table))
        records.append(controller.update(update.step))
        if update.replaced:
            controller.drop_window()
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


def _known(values: Any, key: str, path: Path, line: int) -> dict[str, float]:
    """Numbers by domain without those that are null; each must be finite and >= 0."""
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if value is not None}
    return numbers(values, key, path, line=line, least=0.0)
