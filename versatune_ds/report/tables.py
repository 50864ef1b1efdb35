"""Tables of a report: what each row says of a run, as text.

Facts stand in rows and runs in columns; a domain table has a row for each domain.

What is not covered: numbers (`measures`), sections and figures (`report`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from versatune_ds.observability.progress import duration, si
from versatune_ds.report.evaluation import benchmark_table, loss_table, score_table
from versatune_ds.report.measures import (
    NOTHING,
    all_names,
    arrow,
    change,
    first_last,
    mean,
    median,
    number,
    percent,
    status,
    total,
    train_loss,
    trained_shares,
)
from versatune_ds.report.page import Card, Cell, Fold, Table
from versatune_ds.report.runs import Alarm, Array, RunData

UNIT_NAMES = {"samples": "samples", "tokens": "tokens", "supervised_tokens": "supervised tokens"}
MAX_ALARMS_SHOWN = 100
TIME_PARTS = (
    ("data_wait_s", "waiting for the batch"),
    ("boundary_s", "statistics and agreement of ranks"),
    ("update_s", "weight updates"),
)

Fact = tuple[str, Callable[[RunData], str]]


def cards(run: RunData) -> list[Card]:
    """The numbers of one run to see first."""
    loss, label = first_last(run.eval_loss), "Held-out loss"
    if math.isnan(loss[0]):
        loss, label = train_loss(run), "Training loss"
    mfu = median(run.series["mfu"])
    utilisation = f"MFU {percent(mfu)} (6N: {percent(median(run.series['mfu_6n']))})"
    return [
        Card(label, arrow(*loss), f"nats per supervised token, {change(*loss)}"),
        Card("Trained on", f"{_sum(run, 'real_tokens')} tokens", f"packs {_packing(run)} full"),
        Card(
            "Throughput",
            f"{_si(median(run.series['real_tokens_per_s']))} tokens/s",
            utilisation if math.isfinite(mfu) else "median, real tokens",
        ),
        Card("Time in steps", _duration(run.series["step_s"]), status(run)),
    ]


FACTS: tuple[Fact, ...] = (
    ("Progress", status),
    ("Started", lambda run: _flat(run.info.get("started_at"))),
    ("Model", lambda run: _model(run)),
    ("Strategy of weights", lambda run: _strategy(run)),
    ("Tokens trained on", lambda run: f"{_sum(run, 'real_tokens')} real"),
    ("… of these supervised", lambda run: _sum(run, "supervised_tokens")),
    ("Packing efficiency", lambda run: _packing(run)),
    ("Training loss", lambda run: _loss(*train_loss(run))),
    ("Held-out loss", lambda run: _loss(*first_last(run.eval_loss))),
    ("Best checkpoint", lambda run: _best(run)),
    ("Throughput", lambda run: _throughput(run)),
    ("MFU, useful work", lambda run: percent(median(run.series["mfu"]))),
    ("MFU, 6N + 12 L H T", lambda run: percent(median(run.series["mfu_6n"]))),
    ("Time in steps", lambda run: _duration(run.series["step_s"])),
    ("Standing still for checkpoints", lambda run: _duration(run.series["save_stall_s"])),
    ("Time in evaluations", lambda run: _duration(run.eval_s)),
    ("Waiting for data", lambda run: percent(_part(run, run.series["data_wait_s"]), 2)),
    ("Peak memory", lambda run: _memory(run)),
    ("Weight updates", lambda run: _updates(run)),
    ("Skipped steps", lambda run: f"{int(run.skipped.sum()):,}"),
    ("Hardware", lambda run: _flat(run.info.get("hardware"))),
    ("Ranks", lambda run: _flat(run.info.get("world_size"))),
    ("Versions", lambda run: _flat(run.info.get("versions"))),
    ("Commit", lambda run: _flat(run.info.get("commit"))),
    ("Folder", lambda run: str(run.folder)),
)


def summary_table(runs: Sequence[RunData]) -> Table:
    """FACTS, without those that no run has."""
    rows = [(label, [text(run) for run in runs]) for label, text in FACTS]
    rows = [row for row in rows if any(cell != NOTHING for cell in row[1])]
    return Table(["", *(run.label for run in runs)] if len(runs) > 1 else [], rows, kind="texts")


def _si(value: float) -> str:
    return NOTHING if not math.isfinite(value) else si(value)


def _sum(run: RunData, key: str) -> str:
    return _si(total(run.series[key]))


def _duration(seconds: Any) -> str:
    whole = total(seconds)
    return NOTHING if not math.isfinite(whole) else duration(whole)


def _loss(first: float, last: float) -> str:
    return NOTHING if math.isnan(first) else f"{arrow(first, last)} ({change(first, last)})"


def _best(run: RunData) -> str:
    """Which step was taken, and why."""
    step, loss, select = (run.best.get(key) for key in ("step", "loss", "select"))
    if not isinstance(step, int) or not isinstance(loss, int | float):
        return NOTHING
    later = run.eval_steps[run.eval_steps > 0]
    lowest = (
        f"after step {step:,}: held-out loss {number(loss)} ({_flat(select)}), the lowest of {len(later)}"
    )
    return f"{lowest} evaluations up to step {int(later.max(initial=step)):,}"


def _model(run: RunData) -> str:
    text, size = _flat(run.info.get("model")), run.info.get("num_parameters")
    if not isinstance(size, int | float) or size <= 0:
        return text
    return f"{si(size).replace('G', 'B')} parameters" + ("" if text == NOTHING else f"; {text}")


def _strategy(run: RunData) -> str:
    section = run.config.get("weights")
    if not isinstance(section, dict) or "strategy" not in section:
        return NOTHING
    shadow = ", shadow" if section.get("shadow") else ""
    return f"{section['strategy']}{shadow}; a weight is a share of {UNIT_NAMES[run.weight_unit]}"


def _packing(run: RunData) -> str:
    return percent(total(run.series["real_tokens"]) / total(run.series["slot_tokens"]), 2)


def _throughput(run: RunData) -> str:
    rate, ranks = median(run.series["real_tokens_per_s"]), run.info.get("world_size")
    each = f" ({si(rate / ranks)} per rank)" if isinstance(ranks, int) and ranks > 1 else ""
    return NOTHING if math.isnan(rate) else f"{si(rate)} real tokens/s{each}, median"


def _memory(run: RunData) -> str:
    values = run.series["memory_gib"]
    return f"{np.nanmax(values):.1f} GiB on rank 0" if np.isfinite(values).any() else NOTHING


def _updates(run: RunData) -> str:
    count, shadow = len(run.update_steps), int((~run.applied).sum())
    return f"{count:,}" + (f" ({shadow:,} not applied)" if shadow else "")


def _part(run: RunData, values: Array) -> float:
    """Share of the steps' time that a part takes."""
    whole = total(run.series["step_s"])
    return total(values) / whole if whole > 0 else math.nan


def _flat(value: Any) -> str:
    """A JSON value as `key value, key value`."""
    if isinstance(value, Mapping):
        value = [f"{key} {_flat(inner)}" for key, inner in value.items() if inner is not None]
    if isinstance(value, list | tuple):
        return ", ".join(_flat(inner) for inner in value) or NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return NOTHING if value is None or value == "" else str(value)


DOMAIN_COLUMNS: tuple[tuple[str, Callable[[RunData, int], str]], ...] = (
    ("Weight", lambda run, i: arrow(*first_last(run.weights[:, i]), percent)),
    ("Samples", lambda run, i: percent(trained_shares(run, "samples")[i])),
    ("Superv. tokens", lambda run, i: percent(trained_shares(run, "supervised_tokens")[i])),
    ("Passes", lambda run, i: number(first_last(run.domain_series["epochs"][:, i])[1], 2)),
    ("Training loss", lambda run, i: arrow(*train_loss(run, i))),
    ("Held-out loss", lambda run, i: arrow(*first_last(run.eval_domain_loss[:, i]))),
    ("Change", lambda run, i: change(*first_last(run.eval_domain_loss[:, i]))),
    ("KL to base", lambda run, i: arrow(*first_last(run.domain_series["domain_base_kl"][:, i]))),
)
"""The last one with `model.kl_to_base` only."""


def domain_table(run: RunData, caption: str) -> Table:
    """One row a domain: weight, shares, passes, losses, KL."""
    is_compared = np.isfinite(run.domain_series["domain_base_kl"]).any()
    columns = DOMAIN_COLUMNS if is_compared else DOMAIN_COLUMNS[:-1]
    rows = [(name, [text(run, i) for _, text in columns]) for i, name in enumerate(run.names)]
    head = ["Domain", *(title for title, _ in columns)]
    return Table(head, rows, caption=caption, color_rows=not caption)


def evaluation_tables(run: RunData) -> list[Table]:
    """Held-out losses and benchmark scores of the finished model, if `versatune-ds evaluate` was run."""
    if run.evaluation is None:
        return []
    found = run.evaluation
    tables = [loss_table(found, f"Evaluation of {found.model}")]
    if found.answers:
        tables.append(score_table(found, f"Scored answers of {found.model}"))
    if found.benchmarks:
        tables.append(benchmark_table(found, None, f"Benchmarks of {found.model}"))
    return tables


def comparison_table(runs: Sequence[RunData]) -> Table:
    """Last held-out loss (or training loss) by domain and run; the lowest is bold."""
    held_out = any(np.isfinite(run.eval_domain_loss).any() for run in runs)

    def last(run: RunData, name: str | None) -> float:
        column = None if name is None else run.column(name)
        if name is not None and column is None:
            return math.nan
        if not held_out:
            return train_loss(run, column)[1]
        return first_last(run.eval_loss if column is None else run.eval_domain_loss[:, column])[1]

    rows = []
    for name in [*all_names(runs), None]:
        values = [last(run, name) for run in runs]
        lowest = min((value for value in values if math.isfinite(value)), default=math.nan)
        cells = [Cell(number(value), best=value == lowest) for value in values]
        rows.append(("all domains" if name is None else name, cells))
    kind = "Held-out loss at the last evaluation" if held_out else "Training loss at the end"
    return Table(["Domain", *(run.label for run in runs)], rows, caption=f"{kind}; lowest in bold")


def time_table(runs: Sequence[RunData]) -> Table:
    """Mean seconds of a step and the share of its parts."""

    def text(run: RunData, values: Array, *, is_part: bool = True) -> str:
        seconds = f"{number(mean(values), 4)} s"
        if not is_part:
            return seconds
        return NOTHING if math.isnan(mean(values)) else f"{seconds} ({percent(_part(run, values), 2)})"

    def rest(run: RunData) -> Array:
        parts = [np.nan_to_num(run.series[key]) for key, _ in TIME_PARTS]
        return run.series["step_s"] - np.sum(parts, axis=0)

    rows = [("forward, backward, optimizer", [text(run, rest(run)) for run in runs])]
    for key, label in (*TIME_PARTS, ("probe_s", "of weight updates: held-out probe")):
        rows.append((label, [text(run, run.series[key]) for run in runs]))
    for key, label in (("step_s", "a step"), ("plan_s", "beside the step: planning")):
        rows.append((label, [text(run, run.series[key], is_part=False) for run in runs]))
    head = ["Mean time", *(run.label if len(runs) > 1 else "seconds (share)" for run in runs)]
    return Table(head, rows, caption="Where the time of a step goes")


def alarm_table(runs: Sequence[RunData], chosen: Callable[[Alarm], bool]) -> tuple[Table, int]:
    """The first of the chosen alarms of all runs by step, and how many there are."""
    found = [(run.label, alarm) for run in runs for alarm in run.alarms if chosen(alarm)]
    found.sort(key=lambda item: item[1].step)
    cells = [[f"{a.step:,}", label, a.kind, a.text] for label, a in found[:MAX_ALARMS_SHOWN]]
    head = ["Step", "Run", "Kind", "What"]
    if len(runs) == 1:
        head, cells = ["Step", "Kind", "What"], [[row[0], *row[2:]] for row in cells]
    shown = "" if len(found) == len(cells) else f"The first {len(cells)} of {len(found):,}"
    return Table(head, [(row[0], row[1:]) for row in cells], shown, kind="texts log"), len(found)


def settings_folds(runs: Sequence[RunData]) -> list[Fold]:
    """resolved.yaml of every run."""
    return [Fold(f"{run.label}: resolved.yaml", text=run.config_text or "none") for run in runs]
