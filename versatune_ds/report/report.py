"""One self-contained HTML page about one run or several: tables, figures, alarms.

`write_report` reads run folders (`runs`), and SECTIONS say what the page shows of them. A report of one run
colours domains; a report of several runs puts the runs into the same figures, one small figure a domain, and
colours runs.

What is not covered: reading files (`runs`), tables (`tables`), drawing (`figures`), HTML (`page`).
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.foundations import constants
from versatune_ds.report.answers import answer_tables, last_scores, score_table
from versatune_ds.report.figures import INK, MUTED, Chart, Row, Series, line_chart, row_chart
from versatune_ds.report.follow import state_of
from versatune_ds.report.measures import (
    MINUS,
    all_names,
    by_tokens,
    cumulative_shares,
    last_row,
    share_gap,
    smoothed_loss,
    target_by_step,
    trained_shares,
    window_of,
    x_range,
)
from versatune_ds.report.page import Fold, Page, PageSection, Picture, to_html, write_html
from versatune_ds.report.profile import profile_section
from versatune_ds.report.runs import SHARE_UNITS, RunData, read_runs, smooth
from versatune_ds.report.tables import (
    UNIT_NAMES,
    alarm_table,
    cards,
    comparison_table,
    domain_table,
    evaluation_tables,
    settings_folds,
    summary_table,
    time_table,
)

GAMMA, PHI = "\u03b3", "\u03c6"
PANEL: dict[str, Any] = {"width": 290, "height": 180}
WIDE: dict[str, Any] = {"width": 1120, "height": 340}
NARROW: dict[str, Any] = {"width": 350, "height": 240}
MAX_LINES = 8
"""Lines that cross often are drawn into one picture up to this number of domains."""
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
RATES = (
    ("slot_tokens_per_s", "slots", MUTED, 2),
    ("real_tokens_per_s", "real", INK, 0),
    ("supervised_tokens_per_s", "supervised", INK, 1),
)
SPEED_CHARTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Seconds per step", "step_s", {}),
    ("Model FLOPs utilisation, useful work", "mfu", {"percent": True}),
)

Lines = Callable[[RunData, int, int, int | None], list[Series]]
"""(run, colour, column of a domain, dashes) -> the lines of that domain."""


def write_report(folders: Sequence[Path], out: Path | None = None, by: str = "steps") -> Path:
    """Write the page and return its path.

    Args:
        out: where to write; default: `report.html` in the run folder, or in the current folder when
            there are several runs.
        by: what figures are drawn over: `steps` or `tokens`.

    Raises:
        StateError: a folder holds no run, or the page cannot be written.
    """
    return _write(read_runs(folders), folders, out, by=by)


def follow_report(
    folders: Sequence[Path], out: Path | None = None, by: str = "steps", every_s: int = 30
) -> Path:
    """`write_report` every few seconds until all runs are over; Ctrl-C ends it.

    The page says how the runs are, and loads itself anew in a browser until then.
    """
    try:
        while True:
            runs = read_runs(folders)
            states = [state_of(run) for run in runs]
            is_over = all(state.is_over for state in states)
            texts = [f"{run.label}: {state.text}" for run, state in zip(runs, states, strict=True)]
            refresh_s = None if is_over else every_s
            path = _write(runs, folders, out, by=by, states=texts, refresh_s=refresh_s)
            if is_over:
                return path
            time.sleep(every_s)
    except KeyboardInterrupt:
        return write_report(folders, out, by)


def _write(runs: Sequence[RunData], folders: Sequence[Path], out: Path | None, **shown: Any) -> Path:
    default = Path(folders[0]) if len(folders) == 1 else Path()
    path = default / constants.REPORT_FILE if out is None else Path(out)
    if path.is_dir():
        path = path / constants.REPORT_FILE
    write_html(path, render(runs, path.parent, **shown), "--out")
    return path


def render(
    runs: Sequence[RunData],
    folder: Path = Path(),
    *,
    by: str = "steps",
    states: Sequence[str] = (),
    refresh_s: int | None = None,
) -> str:
    """The page as HTML text."""
    several = len(runs) > 1
    drawn = [by_tokens(run) for run in runs] if by == "tokens" else runs
    made_at = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    noticed = "noticed while reading the run folder"
    page = Page(
        title=f"Comparison of {len(runs)} runs" if several else f"Run {runs[0].label}",
        lead=f"Report of {made_at}" + ("" if several else f" · {runs[0].folder}"),
        legend=[run.label for run in runs] if several else (),
        remarks=[(f"{run.label}: {noticed}" if several else noticed, run.notes) for run in runs if run.notes],
        cards=() if several or not len(runs[0].steps) else cards(runs[0]),
        sections=[
            found
            for section, is_drawn in SECTIONS
            if (found := section(drawn if is_drawn else runs)) is not None
        ],
        states=states,
        refresh_s=refresh_s,
    )
    return to_html(page, folder)


def _chart(runs: Sequence[RunData], title: str, series: Sequence[Series], **settings: Any) -> Chart:
    return Chart(title=title, series=series, x_range=x_range(runs), x_label=runs[0].x_label, **settings)


def _domain_panels(runs: Sequence[RunData], what: str, lines: Lines, **settings: Any) -> list[Picture]:
    """One small picture a domain with the `lines` of all runs; domains without any number are left out."""
    pictures, several = [], len(runs) > 1
    for index, name in enumerate(all_names(runs)):
        found: list[Series] = []
        for number, run in enumerate(runs):
            column = run.column(name)
            if column is not None:
                found += lines(run, number, column, None) if several else lines(run, column, column, 0)
        if any(np.isfinite(line.y).any() for line in found):
            svg = line_chart(_chart(runs, f"{what} of {name}", found, **PANEL, **settings))
            pictures.append(Picture(name, svg, None if several else index))
    return pictures


def domains_section(runs: Sequence[RunData]) -> PageSection:
    """A table per run, and for several runs a table of held-out losses over the runs."""
    several = len(runs) > 1
    tables = [comparison_table(runs)] if several and any(len(run.steps) for run in runs) else []
    tables += [domain_table(run, run.label if several else "") for run in runs]
    tables += [table for run in runs for table in evaluation_tables(run)]
    lead = (
        "Losses in nats per supervised token: first → last. Training losses are means over the first and "
        "the last steps (a twentieth of the run); shares are of everything trained on."
    )
    return PageSection("domains", "Domains", lead, tables=tables)


def weights_section(runs: Sequence[RunData]) -> PageSection:
    lead = "Share of each domain in the batches, as planned."
    if not any(np.isfinite(run.weights).any() for run in runs):
        return PageSection("weights", "Weights", "No weights are recorded yet.")
    if len(runs) > 1:
        panels = _domain_panels(runs, "weight", _weight_lines, percent=True)
        return PageSection("weights", "Weights", lead, panels=panels, has_legend=True)
    applied = runs[0].applied
    if len(applied) == 0:
        lead += " There were no weight updates: the weights are constant."
    elif applied.all():
        lead += " ▲ a weight update."
    else:
        lead += " ▲ a weight update; △ one that was not applied, circles show what it would have set."
    return PageSection("weights", "Weights", lead, [_weights_picture(runs[0])])


def _weight_lines(run: RunData, color: int, column: int, dashes: int | None) -> list[Series]:
    name = run.names[column]
    return [Series(x=run.weight_steps, y=run.weights[:, column], label=name, color=color, kind="step")]


def _weights_picture(run: RunData) -> Picture:
    """All weights of a run in one wide picture, with its updates."""
    series = [line for i in range(len(run.names)) for line in _weight_lines(run, i, i, None)]
    proposed, x = run.updates["after"][~run.applied], run.update_steps[~run.applied]
    if len(proposed):
        series += [Series(x=x, y=proposed[:, i], color=i, kind="hollow") for i in range(len(run.names))]
    marks = (run.update_steps[run.applied], x)
    chart = _chart([run], "Weights", series, percent=True, label_ends=True, marks=marks)
    wide, narrow = (line_chart(dataclasses.replace(chart, **size)) for size in (WIDE, NARROW))
    return Picture("", wide, narrow=narrow)


def loss_section(runs: Sequence[RunData]) -> PageSection:
    """Training losses (raw and smoothed) and held-out losses, per domain and over all."""
    if not any(len(run.steps) or len(run.eval_steps) for run in runs):
        return PageSection("losses", "Losses", "No step and no evaluation is recorded yet.")
    several = len(runs) > 1
    lead = "Nats per supervised token. "
    if several:
        lead += "Lines: training, smoothed over a twentieth of the run."
    else:
        lead += f"Thin line: every step. Thick line: all tokens of the last {window_of(runs[0])} steps."
    if any(len(run.eval_steps) for run in runs):
        lead += " Marks: held-out." if several else " Circles: held-out."
    else:
        lead += " No held-out losses: set data.eval and evaluation.every_n_steps."

    def lines(run: RunData, color: int | str, column: int | None, dashes: int | None) -> list[Series]:
        raw = run.series["loss"] if column is None else run.domain_series["domain_loss"][:, column]
        held_out = run.eval_loss if column is None else run.eval_domain_loss[:, column]
        smoothed = smoothed_loss(run, column)
        every = [] if several else [Series(x=run.steps, y=raw, color=color, kind="raw")]
        return [
            *every,
            Series(x=run.steps, y=smoothed, color=color, dashes=dashes),
            Series(x=run.eval_steps, y=held_out, color=color, kind="markers", dashes=dashes),
        ]

    overall = [
        line
        for i, run in enumerate(runs)
        for line in lines(run, i if several else INK, None, None if several else 0)
    ]
    chart = _chart(runs, "loss over all domains", overall, **PANEL)
    panels = [Picture("all domains", line_chart(chart)), *_domain_panels(runs, "loss", lines)]
    return PageSection("losses", "Losses", lead, panels=panels, has_legend=several)


def scores_section(runs: Sequence[RunData]) -> PageSection | None:
    """Scored answers over the evaluations, and of one run the texts; None where nothing was asked."""
    if not any(np.isfinite(run.eval_score).any() for run in runs):
        return None

    def lines(run: RunData, color: int, column: int, dashes: int | None) -> list[Series]:
        return [Series(x=run.eval_steps, y=run.eval_score[:, column], color=color, dashes=dashes)]

    panels = _domain_panels(runs, "score", lines, percent=True, y_range=(0.0, 1.0))
    lead = "Held-out samples that the model answered itself, greedily (evaluation.generate): mean scores."
    if len(runs) > 1:
        tables = [last_scores(runs)]
        return PageSection("answers", "Scored answers", lead, panels=panels, tables=tables, has_legend=True)
    lead += " ✓ score 1, ✗ score 0, ? no score, [cut] at max_new_tokens. Shown are the samples asked first."
    tables = [score_table(runs[0]), *answer_tables(runs[0])]
    return PageSection("answers", "Scored answers", lead, panels=panels, tables=tables)


def guard_section(runs: Sequence[RunData]) -> PageSection | None:
    """How far each held-out loss is above its lowest one at the guard's probes; None without a guard."""
    rises = np.concatenate([run.updates["rise"].ravel() for run in runs])
    if not np.isfinite(rises).any():
        return None

    def lines(run: RunData, color: int, column: int, dashes: int | None) -> list[Series]:
        rise, held = run.updates["rise"][:, column], run.updates["held_rise"][:, column]
        look: dict[str, Any] = {"x": run.update_steps, "color": color, "dashes": dashes}
        return [
            Series(y=rise, **look),
            Series(y=rise, kind="hollow", **look),
            Series(y=held, kind="markers", **look),
        ]

    y_range = (min(0.0, float(np.nanmin(rises))), max(0.0, float(np.nanmax(rises))))
    panels = _domain_panels(runs, "rise of the held-out loss", lines, y_range=y_range)
    lead = (
        "Held-out loss at each probe above the domain's lowest one before it, in nats; below 0 it is the "
        "lowest. Filled: the domain is held, its share goes to the others."
    )
    return PageSection("guard", "The guard", lead, panels=panels, has_legend=len(runs) > 1)


def signals_section(runs: Sequence[RunData]) -> PageSection:
    """gamma and phi at every weight update."""
    key, title = "signals", f"{GAMMA} and {PHI} at the weight updates"
    if not any(len(run.update_steps) for run in runs):
        lead = "No weight update is recorded: the strategy is static, or the first update is not due yet."
        return PageSection(key, title, lead)
    pictures: list[Picture] = []
    panels: list[Picture] = []
    lead = ""
    for signal, name, formula in SIGNALS:

        def lines(
            run: RunData, color: int, column: int, dashes: int | None, signal: str = signal
        ) -> list[Series]:
            look: dict[str, Any] = {"label": run.names[column], "color": color, "dashes": dashes}
            return [Series(x=run.update_steps, y=run.updates[signal][:, column], kind="markers", **look)]

        if not any(np.isfinite(run.updates[signal]).any() for run in runs):
            lead += f"{name} was not computed ({GAMMA} needs reference losses). "
        elif len(runs) > 1 or len(runs[0].names) > MAX_LINES:
            lead += f"{name} = {formula}. "
            highest = max(float(np.max(np.nan_to_num(run.updates[signal]), initial=0.0)) for run in runs)
            found = _domain_panels(runs, name, lines, from_zero=True, y_range=(0.0, highest))
            symbol = name.split()[-1]
            panels += [dataclasses.replace(picture, title=f"{symbol} {picture.title}") for picture in found]
        else:
            series = [line for i in range(len(runs[0].names)) for line in lines(runs[0], i, i, None)]
            chart = _chart(runs, name, series, label_ends=True, from_zero=True)
            pictures.append(Picture(name, line_chart(chart), note=formula))
    return PageSection(key, title, lead, pictures, panels, has_legend=len(runs) > 1)


def shares_section(runs: Sequence[RunData]) -> PageSection:
    """Target and achieved shares of the whole run in all units, and (one run) the gap between over time."""
    key, title, several = "shares", "Target and achieved shares", len(runs) > 1
    rows_of_runs = [_share_rows(run, index if several else None) for index, run in enumerate(runs)]
    largest = max((row.span[1] for rows in rows_of_runs for row in rows), default=math.nan)
    pictures, gaps = [], []
    for number, (run, rows) in enumerate(zip(runs, rows_of_runs, strict=True)):
        if not any(math.isfinite(row.target) for row in rows):
            continue
        axis = ((0.0, 1.05 * largest), "share of what was trained on")
        name = run.label if several else "Whole run"
        svg = row_chart(f"shares of {run.label}", rows, *axis)
        pictures.append(Picture(name, svg, number if several else None))
        gap = np.abs(last_row(share_gap(run)))
        if np.isfinite(gap).any():
            gaps.append(f"{np.nanmax(gap) * 100:.2f}")
    if not pictures:
        return PageSection(key, title, "No shares are recorded yet.")
    units = " or ".join(sorted({UNIT_NAMES[run.weight_unit] for run in runs}))
    lead = f"Bar: target (share of {units}). ● samples, ■ tokens, ▲ supervised tokens."
    if gaps:
        lead += f" Largest gap to the target in its own unit: {', '.join(gaps)} percentage points."
    if not several and gaps:
        pictures.append(_gap_picture(runs[0]))
    return PageSection(key, title, lead, pictures)


def _share_rows(run: RunData, color: int | None) -> list[Row]:
    """Rows of the shares picture; `color` None gives each domain its own."""
    targets = last_row(cumulative_shares(run, target_by_step(run), run.weight_unit))
    achieved = np.array([trained_shares(run, unit) for unit in SHARE_UNITS])  # [units, k]
    rows = []
    for i, name in enumerate(run.names):
        values = np.array([targets[i], *achieved[:, i]])
        known = values[np.isfinite(values)]
        span = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
        look: dict[str, Any] = {"name": name, "color": i if color is None else color}
        rows.append(Row(marks=achieved[:, i].tolist(), span=span, target=float(targets[i]), **look))
    return rows


def _gap_picture(run: RunData) -> Picture:
    """Achieved minus target share over the steps."""
    gap = 100 * share_gap(run)
    series = [Series(x=run.steps, y=gap[:, i], label=name, color=i) for i, name in enumerate(run.names)]
    late = gap[len(gap) // 10 :]  # the first steps have few samples: their large gaps would hide the rest
    y_range = (min(0.0, float(np.nanmin(late))), max(0.0, float(np.nanmax(late))))
    chart = _chart([run], "gap to the target shares", series, label_ends=True, y_range=y_range)
    note = f"achieved {MINUS} target since the first step, percentage points of {UNIT_NAMES[run.weight_unit]}"
    return Picture("Gap to the target", line_chart(chart), note=note)


def speed_section(runs: Sequence[RunData]) -> PageSection:
    key, title, several = "speed", "Throughput and time", len(runs) > 1
    if not any(np.isfinite(run.series["step_s"]).any() for run in runs):
        return PageSection(key, title, "No step is recorded yet.")

    def lines(name: str) -> list[Series]:
        if not several:
            return [Series(x=runs[0].steps, y=runs[0].series[name], color=INK)]
        smoothed = [smooth(run.series[name], window_of(run)) for run in runs]  # several stay readable in one
        return [
            Series(x=run.steps, y=y, color=i) for i, (run, y) in enumerate(zip(runs, smoothed, strict=True))
        ]

    def picture(name: str, series: Sequence[Series], **more: Any) -> Picture:
        chart = _chart(runs, name.lower(), series, from_zero=True, height=220, **more)
        return Picture(name, line_chart(chart))

    if several:
        pictures = [picture("Real tokens per second", lines("real_tokens_per_s"))]
    else:
        rates = [
            Series(x=runs[0].steps, y=runs[0].series[name], label=label, color=color, dashes=dashes)
            for name, label, color, dashes in RATES
        ]
        pictures = [picture("Tokens per second", rates, label_ends=True)]
    for name, column, more in SPEED_CHARTS:
        if any(np.isfinite(run.series[column]).any() for run in runs):
            pictures.append(picture(name, lines(column), **more))
    lead = "All ranks together; evaluations and checkpoints are not part of a step."
    if several:
        lead += " Lines are means over a twentieth of a run."
    return PageSection(key, title, lead, pictures, tables=[time_table(runs)], has_legend=several)


def alarms_section(runs: Sequence[RunData]) -> PageSection:
    """Alarms and skipped steps, and what the weight updates remarked."""
    alarms, count = alarm_table(runs, lambda alarm: alarm.kind != "note")
    remarks, total = alarm_table(runs, lambda alarm: alarm.kind == "note")
    folds = [Fold(f"Remarks of the weight updates ({total:,})", remarks)] if total else []
    lead = "Alarms of the weight updates, and skipped steps." if count else "None, and no skipped steps."
    return PageSection("alarms", "Alarms", lead, tables=[alarms] if count else (), folds=folds)


SECTIONS: tuple[tuple[Callable[[Sequence[RunData]], PageSection | None], bool], ...] = (
    (lambda runs: PageSection("summary", "Summary", tables=[summary_table(runs)]), False),
    (domains_section, False),
    (weights_section, True),
    (loss_section, True),
    (scores_section, True),
    (guard_section, True),
    (signals_section, True),
    (shares_section, True),
    (speed_section, True),
    (profile_section, False),
    (alarms_section, False),
    (lambda runs: PageSection("settings", "Settings", folds=settings_folds(runs)), False),
)
"""Each with whether it draws over steps or tokens."""
