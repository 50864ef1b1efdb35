"""One self-contained HTML page about one run or several: tables, pictures, alarms.

`write_report` reads run folders (`runs`), computes what the page says, draws (`plots`) and fills the template
`templates/report.html.j2`, which escapes every value. The page needs no network and no script. A report of
one run colours domains; a report of several runs puts the runs into the same pictures, one small picture a
domain, and colours runs.

What is not covered: reading files (`runs`), colours and layout (`templates/report.css`).
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from versatune_ds.domain.evaluation import perplexity
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import write_text_atomic
from versatune_ds.observability import plots
from versatune_ds.observability.measures import (
    MINUS,
    NOTHING,
    all_names,
    arrow,
    change,
    cumulative_shares,
    first_last,
    last_row,
    median,
    number,
    percent,
    share_gap,
    smoothed_loss,
    status,
    target_by_step,
    total,
    train_loss,
    trained_shares,
    window_of,
    x_range,
)
from versatune_ds.observability.plots import INK, MUTED, Chart, Series, ShareRow
from versatune_ds.observability.progress import duration, si
from versatune_ds.observability.runs import SHARE_UNITS, Alarm, RunData, read_runs, smooth

TEMPLATES = Path(__file__).parent / "templates"
GAMMA, PHI = "\u03b3", "\u03c6"
PANEL_WIDTH, PANEL_HEIGHT = 290, 180
WIDE_WIDTH, WIDE_HEIGHT, NARROW_WIDTH = 1120, 340, 350
MAX_ALARMS_SHOWN = 100
MAX_LINES = 8
"""Lines that cross often are drawn into one picture up to this number of domains."""
UNIT_NAMES = {"samples": "samples", "tokens": "tokens", "supervised_tokens": "supervised tokens"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    best: bool = False
    """The lowest of its row: printed bold."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: a head, and rows of a label and cells."""

    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    caption: str = ""
    text_columns: bool = False
    """Cells hold text (left-aligned) instead of numbers."""
    color_rows: bool = False
    """A row's label gets the colour of its number."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture and the words beside it."""

    title: str
    svg: Markup
    color: int | None = None
    """Number of the domain or run that the whole picture is about."""
    note: str = ""
    narrow: Markup | None = None
    """Another drawing of it for a narrow page."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. Empty parts say why in `lead`."""

    key: str
    title: str
    lead: str
    pictures: Sequence[Picture] = ()
    panels: Sequence[Picture] = ()
    """Small pictures, several in a row."""
    tables: Sequence[Table] = ()
    run_legend: bool = False


@dataclasses.dataclass(frozen=True)
class Card:
    """A number to see first."""

    label: str
    value: str
    note: str


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page and return its path.

    Args:
        folders: run folders, at least one.
        out: where to write; default: `report.html` in the run folder, or in the current folder when
            there are several runs.

    Raises:
        StateError: a folder holds no run, or the page cannot be written.
    """
    runs = read_runs(folders)
    default = Path(folders[0]) if len(folders) == 1 else Path()
    path = default / constants.REPORT_FILE if out is None else Path(out)
    if path.is_dir():
        path = path / constants.REPORT_FILE
    page = render(runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, page)
    except OSError as error:
        raise StateError(
            f"the report cannot be written to {path} ({error.strerror}); give another place with --out"
        ) from error
    return path


def render(runs: Sequence[RunData]) -> str:
    """The page as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(dash=plots.dash_index, colors=plots.NUM_COLORS, dashes=plots.DASHES)
    several = len(runs) > 1
    title = f"Comparison of {len(runs)} runs" if several else f"Run {runs[0].label}"
    return environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        several=several,
        made_at=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        cards=[] if several else cards(runs[0]),
        sections=sections(runs),
        alarms=alarm_rows(runs, lambda alarm: alarm.kind != "note"),
        reasons=alarm_rows(runs, lambda alarm: alarm.kind == "note"),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )


def sections(runs: Sequence[RunData]) -> list[Section]:
    """All parts of the page in order."""
    return [
        Section("summary", "Summary", "", tables=[summary_table(runs)]),
        domains_section(runs),
        weights_section(runs),
        loss_section(runs),
        signals_section(runs),
        shares_section(runs),
        speed_section(runs),
    ]


# ---------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------


def cards(run: RunData) -> list[Card]:
    """The numbers of one run to see first."""
    held_out = first_last(run.eval_loss)
    train = train_loss(run)
    tokens = total(run.series["real_tokens"])
    efficiency = tokens / total(run.series["slot_tokens"])
    rate = median(run.series["real_tokens_per_s"])
    mfu = median(run.series["mfu"])
    steps_s = total(run.series["step_s"])
    loss, loss_label = (train, "Training loss") if math.isnan(held_out[0]) else (held_out, "Held-out loss")
    return [
        Card(loss_label, arrow(*loss), f"nats per supervised token, {change(*loss)}"),
        Card("Trained on", f"{_si(tokens)} tokens", f"packs {percent(efficiency, 2)} full"),
        Card(
            "Throughput",
            f"{_si(rate)} tokens/s",
            f"MFU {percent(mfu)} (6N: {percent(median(run.series['mfu_6n']))})"
            if math.isfinite(mfu)
            else "median, real tokens",
        ),
        Card("Time in steps", duration(None if math.isnan(steps_s) else steps_s), status(run)),
    ]


def summary_table(runs: Sequence[RunData]) -> Table:
    """Facts in rows, runs in columns."""
    facts: list[tuple[str, Callable[[RunData], str]]] = [
        ("Progress", status),
        ("Started", lambda run: str(run.info.get("started_at") or NOTHING)),
        ("Model", model_text),
        ("Strategy of weights", strategy_text),
        ("Tokens trained on", lambda run: f"{_si(total(run.series['real_tokens']))} real"),
        ("… of these supervised", lambda run: _si(total(run.series["supervised_tokens"]))),
        ("Packing efficiency", packing_text),
        ("Training loss", lambda run: _loss_text(*train_loss(run))),
        ("Held-out loss", lambda run: _loss_text(*first_last(run.eval_loss))),
        ("Throughput", throughput_text),
        ("MFU, useful work", lambda run: percent(median(run.series["mfu"]))),
        ("MFU, 6N + 12 L H T", lambda run: percent(median(run.series["mfu_6n"]))),
        ("Time in steps", lambda run: _duration(total(run.series["step_s"]))),
        ("Standing still for checkpoints", lambda run: _duration(total(run.series["save_stall_s"]))),
        ("Time in evaluations", lambda run: _duration(total(run.eval_s))),
        ("Waiting for data", lambda run: percent(part_share(run, "data_wait_s"), 2)),
        ("Peak memory", memory_text),
        ("Weight updates", updates_text),
        ("Skipped steps", lambda run: f"{int(run.skipped.sum()):,}"),
        ("Hardware", lambda run: flat_text(run.info.get("hardware"))),
        ("Ranks", lambda run: str(run.info.get("world_size") or NOTHING)),
        ("Versions", lambda run: flat_text(run.info.get("versions"))),
        ("Commit", lambda run: str(run.info.get("commit") or NOTHING)),
        ("Folder", lambda run: str(run.folder)),
    ]
    rows = [(label, [Cell(text(run)) for run in runs]) for label, text in facts]
    rows = [row for row in rows if any(cell.text != NOTHING for cell in row[1])]
    head = ["", *(run.label for run in runs)] if len(runs) > 1 else []
    return Table(head, rows, text_columns=True)


def _si(value: float) -> str:
    return NOTHING if not math.isfinite(value) else si(value)


def _duration(seconds: float) -> str:
    return NOTHING if not math.isfinite(seconds) else duration(seconds)


def _loss_text(first: float, last: float) -> str:
    return NOTHING if math.isnan(first) else f"{arrow(first, last)} ({change(first, last)})"


def model_text(run: RunData) -> str:
    """Name and size of the model."""
    model = run.info.get("model")
    text = flat_text(model)
    size = run.info.get("num_parameters")
    if isinstance(size, int | float) and size > 0:
        text = f"{si(size).replace('G', 'B')} parameters" + ("" if text == NOTHING else f"; {text}")
    return text


def strategy_text(run: RunData) -> str:
    """Strategy, interval and unit of the weights, from resolved.yaml."""
    section = run.config.get("weights")
    if not isinstance(section, dict) or "strategy" not in section:
        return NOTHING
    unit = UNIT_NAMES[run.weight_unit]
    shadow = ", shadow" if section.get("shadow") else ""
    return f"{section['strategy']}{shadow}; a weight is a share of {unit}"


def packing_text(run: RunData) -> str:
    """Real tokens over slots of the whole run."""
    return percent(total(run.series["real_tokens"]) / total(run.series["slot_tokens"]), 2)


def throughput_text(run: RunData) -> str:
    """Median real tokens per second, and per rank."""
    rate = median(run.series["real_tokens_per_s"])
    if math.isnan(rate):
        return NOTHING
    ranks = run.info.get("world_size")
    each = f" ({si(rate / ranks)} per rank)" if isinstance(ranks, int) and ranks > 1 else ""
    return f"{si(rate)} real tokens/s{each}, median"


def memory_text(run: RunData) -> str:
    """Highest recorded memory."""
    values = run.series["memory_gib"]
    return f"{np.nanmax(values):.1f} GiB on rank 0" if np.isfinite(values).any() else NOTHING


def updates_text(run: RunData) -> str:
    """Number of updates, and how many were not applied."""
    count, shadow = len(run.update_steps), int((~run.applied).sum())
    return f"{count:,}" + (f" ({shadow:,} not applied)" if shadow else "")


def part_share(run: RunData, key: str) -> float:
    """Share of the steps' time that a part takes."""
    whole = total(run.series["step_s"])
    return total(run.series[key]) / whole if whole > 0 else math.nan


def flat_text(value: Any) -> str:
    """A JSON value as `key value, key value`."""
    if isinstance(value, Mapping):
        parts = [f"{key} {flat_text(inner)}" for key, inner in value.items() if inner is not None]
        return ", ".join(parts) or NOTHING
    if isinstance(value, list | tuple):
        return ", ".join(flat_text(inner) for inner in value) or NOTHING
    if isinstance(value, float):
        return f"{value:.4g}"
    return NOTHING if value is None or value == "" else str(value)


# ---------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------


def domains_section(runs: Sequence[RunData]) -> Section:
    """A table per run, and for several runs a table of held-out losses over the runs."""
    tables = []
    if len(runs) > 1:
        tables += [comparison_table(runs)]
    tables += [domain_table(run, run.label if len(runs) > 1 else "") for run in runs]
    for run in runs:
        tables += evaluation_tables(run)
    lead = (
        "Losses in nats per supervised token: first → last. Training losses are means over the first and "
        "the last steps (a twentieth of the run); shares are of everything trained on."
    )
    return Section("domains", "Domains", lead, tables=tables)


def domain_table(run: RunData, caption: str) -> Table:
    """One row a domain: weight, shares, passes, losses."""
    samples, supervised = trained_shares(run, "samples"), trained_shares(run, "supervised_tokens")
    rows = []
    for column, name in enumerate(run.names):
        train = train_loss(run, column)
        held_out = first_last(run.eval_domain_loss[:, column])
        weight = first_last(run.domain_series["weights"][:, column])
        epochs = first_last(run.domain_series["epochs"][:, column])
        texts = (
            arrow(*weight, percent),
            percent(samples[column]),
            percent(supervised[column]),
            number(epochs[1], 2),
            arrow(*train),
            arrow(*held_out),
            change(*held_out),
        )
        rows.append((name, [Cell(text) for text in texts]))
    head = [
        "Domain",
        "Weight",
        "Samples",
        "Superv. tokens",
        "Passes",
        "Training loss",
        "Held-out loss",
        "Change",
    ]
    return Table(head, rows, caption=caption, color_rows=not caption)


def evaluation_tables(run: RunData) -> list[Table]:
    """Held-out losses and benchmark scores of the finished model, if `versatune-ds evaluate` was run."""
    if run.evaluation is None:
        return []
    evaluation, sums = run.evaluation, run.evaluation.sums
    measured = zip(evaluation.names, sums.mean_loss(), sums.stderr(), sums.samples, strict=True)
    rows = [
        (
            name,
            [Cell(number(loss)), Cell(number(error)), Cell(number(perplexity(loss), 2)), Cell(f"{n:,.0f}")],
        )
        for name, loss, error, n in measured
    ]
    head = ["Domain", "Held-out loss", "Standard error", "Perplexity", "Samples"]
    tables = [Table(head, rows, caption=f"Evaluation of {evaluation.model}")]
    scores = [
        (s.name, [Cell(s.domain), Cell(s.metric), Cell(number(s.value)), Cell(number(s.stderr))])
        for s in evaluation.benchmarks
    ]
    if scores:
        head = ["Benchmark", "Domain", "Metric", "Score", "Standard error"]
        tables.append(Table(head, scores, caption=f"Benchmarks of {evaluation.model}"))
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
        values = run.eval_loss if column is None else run.eval_domain_loss[:, column]
        return first_last(values)[1]

    rows = []
    for name in [*all_names(runs), None]:
        values = [last(run, name) for run in runs]
        lowest = min((value for value in values if math.isfinite(value)), default=math.nan)
        cells = [Cell(number(value), best=value == lowest) for value in values]
        rows.append(("all domains" if name is None else name, cells))
    kind = "Held-out loss at the last evaluation" if held_out else "Training loss at the end"
    return Table(["Domain", *(run.label for run in runs)], rows, caption=f"{kind}; lowest in bold")


def weights_section(runs: Sequence[RunData]) -> Section:
    """Weights over time."""
    lead = "Share of each domain in the batches, as planned."
    if not any(np.isfinite(run.domain_series["weights"]).any() for run in runs):
        return Section("weights", "Weights", "No weights are recorded yet.")
    if len(runs) == 1:
        applied = runs[0].applied
        if len(applied) == 0:
            lead += " There were no weight updates: the weights are constant."
        elif applied.all():
            lead += " ▲ a weight update."
        else:
            lead += " ▲ a weight update; △ one that was not applied, circles show what it would have set."
        return Section("weights", "Weights", lead, [weights_picture(runs[0])])

    def series_of(run: RunData, index: int, column: int) -> list[Series]:
        values = run.domain_series["weights"][:, column]
        return [Series(x=run.steps, y=values, color=index, kind="step")]

    panels = domain_panels(runs, "weight", series_of, percent=True)
    return Section("weights", "Weights", lead, panels=panels, run_legend=True)


def weights_picture(run: RunData) -> Picture:
    """All weights of a run in one wide picture, with its updates."""
    weights, proposed = run.domain_series["weights"], run.updates["after"][~run.applied]
    series = [
        Series(x=run.steps, y=weights[:, i], label=name, color=i, kind="step")
        for i, name in enumerate(run.names)
    ]
    if len(proposed):
        x = run.update_steps[~run.applied]
        series += [Series(x=x, y=proposed[:, i], color=i, kind="hollow") for i in range(len(run.names))]
    chart = _chart(
        [run],
        "Weights",
        series,
        percent=True,
        label_ends=True,
        marks_x=run.update_steps,
        marks_filled=run.applied,
    )
    wide = dataclasses.replace(chart, width=WIDE_WIDTH, height=WIDE_HEIGHT)
    narrow = dataclasses.replace(chart, width=NARROW_WIDTH)
    return Picture("", plots.line_chart(wide), narrow=plots.line_chart(narrow))


def domain_panels(
    runs: Sequence[RunData],
    what: str,
    series_of: Callable[[RunData, int, int], list[Series]],
    **settings: Any,
) -> list[Picture]:
    """One small picture a domain with all runs in it; domains without any number are left out.

    Args:
        series_of: (run, its number, column of the domain in it) -> lines.
        settings: further fields of `Chart`.
    """
    pictures = []
    for index, name in enumerate(all_names(runs)):
        lines: list[Series] = []
        for number_of_run, run in enumerate(runs):
            column = run.column(name)
            if column is not None:
                lines += series_of(run, number_of_run, column)
        if any(np.isfinite(line.y).any() for line in lines):
            chart = _chart(runs, f"{what} of {name}", lines, **{**_PANEL, **settings})
            pictures.append(Picture(name, plots.line_chart(chart), index if len(runs) == 1 else None))
    return pictures


_PANEL: dict[str, Any] = {"width": PANEL_WIDTH, "height": PANEL_HEIGHT}


def _chart(runs: Sequence[RunData], title: str, series: Sequence[Series], **settings: Any) -> Chart:
    return Chart(title=title, series=series, x_range=x_range(runs), **settings)


def loss_section(runs: Sequence[RunData]) -> Section:
    """Training losses (raw and smoothed) and held-out losses, per domain and over all."""
    if not any(len(run.steps) or len(run.eval_steps) for run in runs):
        return Section("losses", "Losses", "No step and no evaluation is recorded yet.")
    evals = any(len(run.eval_steps) for run in runs)
    no_eval = "" if evals else " No held-out losses: set data.eval and evaluation.every_n_steps."
    unit = "Nats per supervised token. "
    if len(runs) == 1:
        window = window_of(runs[0])
        lead = f"{unit}Thin line: every step. Thick line: all tokens of the last {window} steps." + (
            " Circles: held-out." if evals else no_eval
        )
        overall = _loss_series(runs[0], INK, None, 0)
        panels = [Picture("all domains", _loss_picture(runs, "loss over all domains", overall))]
        panels += domain_panels(runs, "loss", lambda run, _, column: _loss_series(run, column, column, 0))
        return Section("losses", "Losses", lead, panels=panels)
    lead = f"{unit}Lines: training, smoothed over a twentieth of the run." + (
        " Marks: held-out." if evals else no_eval
    )

    def both(run: RunData, index: int, column: int | None) -> list[Series]:
        return [line for line in _loss_series(run, index, column) if line.kind != "raw"]

    overall = [line for index, run in enumerate(runs) for line in both(run, index, None)]
    panels = [Picture("all domains", _loss_picture(runs, "loss over all domains", overall))]
    panels += domain_panels(runs, "loss", both)
    return Section("losses", "Losses", lead, panels=panels, run_legend=True)


def _loss_picture(runs: Sequence[RunData], title: str, series: Sequence[Series]) -> Markup:
    return plots.line_chart(_chart(runs, title, series, **_PANEL))


def _loss_series(
    run: RunData, color: int | str, column: int | None, dashes: int | None = None
) -> list[Series]:
    """Raw, smoothed and held-out loss of a domain, or (None) of all."""
    raw = run.series["loss"] if column is None else run.domain_series["domain_loss"][:, column]
    held_out = run.eval_loss if column is None else run.eval_domain_loss[:, column]
    return [
        Series(x=run.steps, y=raw, color=color, kind="raw"),
        Series(x=run.steps, y=smoothed_loss(run, column), color=color, dashes=dashes),
        Series(x=run.eval_steps, y=held_out, color=color, kind="markers", dashes=dashes),
    ]


SIGNALS = (
    (
        "gamma",
        f"Learnable potential {GAMMA}",
        f"max((l {MINUS} l_ref) / l, 0): how far the loss is above its reference",
    ),
    (
        "phi",
        f"Forgetting degree {PHI}",
        f"max((l {MINUS} l_before) / l_before, 0): how much the loss rose since the last update",
    ),
)


def signals_section(runs: Sequence[RunData]) -> Section:
    """gamma and phi at every weight update."""
    title = f"{GAMMA} and {PHI} at the weight updates"
    if not any(len(run.update_steps) for run in runs):
        lead = "No weight update is recorded: the strategy is static, or the first update is not due yet."
        return Section("signals", title, lead)
    pictures: list[Picture] = []
    panels: list[Picture] = []
    lead = ""
    in_panels = len(runs) > 1 or len(runs[0].names) > MAX_LINES
    for key, name, formula in SIGNALS:
        if not any(np.isfinite(run.updates[key]).any() for run in runs):
            lead += f"{name} was not computed ({GAMMA} needs reference losses). "
            continue
        if in_panels:
            lead += f"{name} = {formula}. "
        if in_panels:
            panels += _signal_panels(runs, key, name)
            continue
        run = runs[0]
        series = [
            Series(x=run.update_steps, y=run.updates[key][:, i], label=domain, color=i, kind="markers")
            for i, domain in enumerate(run.names)
        ]
        chart = _chart(runs, name, series, label_ends=True, from_zero=True)
        pictures.append(Picture(name, plots.line_chart(chart), note=formula))
    return Section("signals", title, lead, pictures, panels, run_legend=len(runs) > 1)


def _signal_panels(runs: Sequence[RunData], key: str, name: str) -> list[Picture]:
    def series_of(run: RunData, index: int, column: int) -> list[Series]:
        color, dashes = (index, None) if len(runs) > 1 else (column, 0)
        values = run.updates[key][:, column]
        return [Series(x=run.update_steps, y=values, color=color, kind="markers", dashes=dashes)]

    highest = max(float(np.max(np.nan_to_num(run.updates[key]), initial=0.0)) for run in runs)
    pictures = domain_panels(runs, name, series_of, from_zero=True, y_range=(0.0, highest))
    symbol = name.split()[-1]
    return [dataclasses.replace(picture, title=f"{symbol} {picture.title}") for picture in pictures]


def shares_section(runs: Sequence[RunData]) -> Section:
    """Target and achieved shares of the whole run in all units, and (one run) the gap between over time."""
    title = "Target and achieved shares"
    several = len(runs) > 1
    pictures, gaps = [], []
    rows_of_runs = [share_rows(run, index if several else None) for index, run in enumerate(runs)]
    found = [value for rows in rows_of_runs for row in rows for value in (row.target, *row.achieved)]
    x_max = 1.05 * max((value for value in found if math.isfinite(value)), default=1.0)
    for number_of_run, (run, rows) in enumerate(zip(runs, rows_of_runs, strict=True)):
        if not any(math.isfinite(row.target) for row in rows):
            continue
        svg = plots.share_chart(f"shares of {run.label}", rows, x_max)
        name = run.label if several else "Whole run"
        pictures.append(Picture(name, svg, number_of_run if several else None))
        gap = np.abs(last_row(share_gap(run)))
        if np.isfinite(gap).any():
            gaps.append(f"{np.nanmax(gap) * 100:.2f}")
    if not pictures:
        return Section("shares", title, "No shares are recorded yet.")
    units = " or ".join(sorted({UNIT_NAMES[run.weight_unit] for run in runs}))
    lead = f"Bar: target (share of {units}). ● samples, ■ tokens, ▲ supervised tokens."
    if gaps:
        lead += f" Largest gap to the target in its own unit: {', '.join(gaps)} percentage points."
    if not several and gaps:
        pictures.append(gap_picture(runs[0]))
    return Section("shares", title, lead, pictures)


def share_rows(run: RunData, color: int | None) -> list[ShareRow]:
    """Rows of the shares picture; `color` None gives each domain its own."""
    target = last_row(cumulative_shares(run, target_by_step(run), run.weight_unit))
    achieved = [trained_shares(run, unit) for unit in SHARE_UNITS]
    return [
        ShareRow(
            name=name,
            color=i if color is None else color,
            target=float(target[i]),
            achieved=[float(shares[i]) for shares in achieved],
        )
        for i, name in enumerate(run.names)
    ]


def gap_picture(run: RunData) -> Picture:
    """Achieved minus target share over the steps."""
    gap = 100 * share_gap(run)
    series = [Series(x=run.steps, y=gap[:, i], label=name, color=i) for i, name in enumerate(run.names)]
    late = gap[len(gap) // 10 :]  # the first steps have few samples: their large gaps would hide the rest
    y_range = (min(0.0, float(np.nanmin(late))), max(0.0, float(np.nanmax(late))))
    chart = _chart([run], "gap to the target shares", series, label_ends=True, y_range=y_range)
    note = f"achieved {MINUS} target since the first step, percentage points of {UNIT_NAMES[run.weight_unit]}"
    return Picture("Gap to the target", plots.line_chart(chart), note=note)


TIME_PARTS = (
    ("data_wait_s", "waiting for the batch"),
    ("boundary_s", "statistics and agreement of ranks"),
    ("update_s", "weight updates"),
)
RATES = (
    ("slot_tokens_per_s", "slots", MUTED, 2),
    ("real_tokens_per_s", "real", INK, 0),
    ("supervised_tokens_per_s", "supervised", INK, 1),
)


def speed_section(runs: Sequence[RunData]) -> Section:
    """Tokens per second, seconds per step, and where a step's time goes."""
    title = "Throughput and time"
    if not any(np.isfinite(run.series["step_s"]).any() for run in runs):
        return Section("speed", title, "No step is recorded yet.")
    several = len(runs) > 1
    if several:
        rates = _run_series(runs, "real_tokens_per_s")
        steps = _run_series(runs, "step_s")
    else:
        rates = [
            Series(x=runs[0].steps, y=runs[0].series[key], label=label, color=color, dashes=dashes)
            for key, label, color, dashes in RATES
        ]
        steps = [Series(x=runs[0].steps, y=runs[0].series["step_s"], color=INK)]
    settings = {"from_zero": True, "height": 220}
    rate_chart = _chart(runs, "tokens per second", rates, label_ends=not several, **settings)
    step_chart = _chart(runs, "seconds per step", steps, **settings)
    pictures = [
        Picture("Real tokens per second" if several else "Tokens per second", plots.line_chart(rate_chart)),
        Picture("Seconds per step", plots.line_chart(step_chart)),
    ]
    if any(np.isfinite(run.series["mfu"]).any() for run in runs):
        mfu = (
            _run_series(runs, "mfu")
            if several
            else [Series(x=runs[0].steps, y=runs[0].series["mfu"], color=INK)]
        )
        chart = _chart(runs, "MFU, useful work", mfu, percent=True, **settings)
        pictures.append(Picture("Model FLOPs utilisation", plots.line_chart(chart)))
    lead = "All ranks together; evaluations and checkpoints are not part of a step."
    if several:
        lead += " Lines are means over a twentieth of a run."
    return Section("speed", title, lead, pictures, tables=[time_table(runs)], run_legend=several)


def _run_series(runs: Sequence[RunData], key: str) -> list[Series]:
    """A quantity of every run, smoothed so that several lines stay readable in one picture."""
    return [
        Series(x=run.steps, y=smooth(run.series[key], window_of(run)), color=i) for i, run in enumerate(runs)
    ]


def time_table(runs: Sequence[RunData]) -> Table:
    """Mean seconds of a step and the share of its parts."""

    def mean(run: RunData, key: str) -> float:
        values = run.series[key]
        return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan

    def part(run: RunData, key: str) -> str:
        seconds = mean(run, key)
        return NOTHING if math.isnan(seconds) else f"{seconds:.4f} s ({percent(part_share(run, key), 2)})"

    def rest(run: RunData) -> str:
        used = sum(value for key, _ in TIME_PARTS if math.isfinite(value := mean(run, key)))
        whole = mean(run, "step_s")
        return NOTHING if math.isnan(whole) else f"{whole - used:.4f} s ({percent(1 - used / whole, 2)})"

    rows = [("forward, backward, optimizer", [Cell(rest(run)) for run in runs])]
    rows += [(label, [Cell(part(run, key)) for run in runs]) for key, label in TIME_PARTS]
    rows.append(("of weight updates: held-out probe", [Cell(part(run, "probe_s")) for run in runs]))
    rows.append(("a step", [Cell(f"{number(mean(run, 'step_s'), 4)} s") for run in runs]))
    rows.append(("beside the step: planning", [Cell(f"{number(mean(run, 'plan_s'), 4)} s") for run in runs]))
    head = ["Mean time", *(run.label if len(runs) > 1 else "seconds (share)" for run in runs)]
    return Table(head, rows, caption="Where the time of a step goes")


@dataclasses.dataclass(frozen=True)
class AlarmRows:
    """Alarms of all runs, the first ones of them as rows (run label, alarm)."""

    rows: Sequence[tuple[str, Alarm]]
    total: int


def alarm_rows(runs: Sequence[RunData], chosen: Callable[[Alarm], bool]) -> AlarmRows:
    """The chosen alarms of all runs by step."""
    found = [(run.label, alarm) for run in runs for alarm in run.alarms if chosen(alarm)]
    found.sort(key=lambda item: item[1].step)
    return AlarmRows(found[:MAX_ALARMS_SHOWN], len(found))
