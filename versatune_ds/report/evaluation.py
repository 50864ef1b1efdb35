"""What `versatune-ds evaluate` shows: tables for the console, and a radar chart as PNG.

The chart has an axis per domain and, if benchmarks were run, a second one per task. Losses: further in is
better, all axes with one scale. Scores: further out is better, 0 to 1.

What is not covered: the numbers (`versatune_ds.domain.evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from versatune_ds.domain.evaluation import Change, ModelEvaluation

MIN_AXES = 3
"""A radar chart with fewer axes is a line."""
COLORS = ("#1f6fb2", "#d1652a")
"""After, before."""
NOTHING = "-"


def show(
    after: ModelEvaluation, before: ModelEvaluation | None, changes: Sequence[Change], picture: Path
) -> str:
    """All tables as text; draws the chart.

    Args:
        after: the model.
        before: the one it is compared with.
        changes: from `compare`, empty without `before`.
        picture: PNG file to write.
    """
    parts = [f"{after.model}\n{loss_table(after)}"]
    if before is not None:
        worse = [change for change in changes if change.relative > 0]
        forgotten = ", ".join(f"{c.domain} {100 * c.forgetting:.2f} %" for c in worse) or "nothing"
        parts.append(f"against {before.model}\n{change_table(changes)}\nforgotten: {forgotten}")
    if after.benchmarks:
        parts.append(benchmark_table(after, before))
    not_run = after.provenance.get("benchmarks_not_run") or {}
    if not_run:
        parts.append("\n".join(f"not run: {name}: {why}" for name, why in not_run.items()))
    drawn = radar_chart(picture, after, before)
    parts.append(str(picture) if drawn else f"no radar chart: it needs {MIN_AXES} domains or tasks")
    return "\n\n".join(parts)


def loss_table(evaluation: ModelEvaluation) -> str:
    """Held-out loss, standard error and perplexity of each domain, as text."""
    rows = [("domain", "loss", "std. error", "perplexity", "samples", "tokens")]
    for name, row in evaluation.to_json()["domains"].items():
        rows.append(
            (
                name,
                f"{row['loss']:.4f}",
                NOTHING if row["stderr"] is None else f"{row['stderr']:.4f}",
                NOTHING if row["perplexity"] is None else f"{row['perplexity']:.2f}",
                f"{row['samples']:,}",
                f"{row['supervised_tokens']:,}",
            )
        )
    return _table(rows)


def change_table(changes: Sequence[Change]) -> str:
    """Loss before and after, relative change with its 95 % interval, and forgetting, as text."""
    rows = [("domain", "before", "after", "change", "95 % interval", "forgetting")]
    for change in changes:
        interval = change.interval
        rows.append(
            (
                change.domain,
                f"{change.before:.4f}",
                f"{change.after:.4f}",
                f"{100 * change.relative:+.2f} %",
                NOTHING if interval is None else f"{100 * interval[0]:+.2f} .. {100 * interval[1]:+.2f} %",
                f"{100 * change.forgetting:.2f} %",
            )
        )
    return _table(rows)


def benchmark_table(after: ModelEvaluation, before: ModelEvaluation | None) -> str:
    """Scores by domain, beside those of another model if it has them, as text."""
    others = {score.task: score for score in before.benchmarks} if before is not None else {}
    rows = [("domain", "benchmark", "metric", "score", "std. error", "samples", "before")]
    for score in after.benchmarks:
        other = others.get(score.task)
        rows.append(
            (
                score.domain,
                score.name,
                score.metric,
                f"{score.value:.4f}",
                NOTHING if score.stderr is None else f"{score.stderr:.4f}",
                f"{score.samples:,}",
                NOTHING if other is None else f"{other.value:.4f}",
            )
        )
    return _table(rows)


def radar_chart(path: Path, after: ModelEvaluation, before: ModelEvaluation | None) -> bool:
    """Draw the radar chart; False (and no file) when there are fewer than three domains and tasks.

    Args:
        path: PNG file to write.
        after: the model.
        before: another one, drawn beside it.
    """
    models = [after] if before is None else [after, before]
    panels: list[tuple[str, list[str], list[list[float]], float]] = []
    if len(after.names) >= MIN_AXES:
        losses = [[float(value) for value in model.sums.mean_loss()] for model in models]
        top = 1.1 * max(map(max, losses))
        panels.append(("held-out loss, nats per token (inner is better)", after.names, losses, top))
    if len(after.benchmarks) >= MIN_AXES:
        scores = [{score.task: score.value for score in model.benchmarks} for model in models]
        values = [[found.get(score.task, math.nan) for score in after.benchmarks] for found in scores]
        panels.append(("benchmark score (outer is better)", [s.name for s in after.benchmarks], values, 1.0))
    if not panels:
        return False
    figure = Figure(figsize=(6.4 * len(panels), 6.0), dpi=120)
    FigureCanvasAgg(figure)
    for i, (title, names, lines, top) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1, projection="polar")
        _draw_panel(axes, title, names, lines, top)
    labels = [_short(model.model) for model in models]
    figure.legend(
        handles=figure.axes[0].lines[: len(models)],
        labels=labels,
        loc="lower center",
        ncol=len(models),
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path)
    return True


def _draw_panel(
    axes: Any, title: str, names: Sequence[str], lines: Sequence[Sequence[float]], top: float
) -> None:
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    closed = np.append(angles, angles[:1])
    for values, color in zip(lines, COLORS, strict=False):
        around = np.append(values, values[:1])
        axes.plot(closed, around, color=color, linewidth=1.8, marker="o", markersize=3.5)
        axes.fill(closed, around, color=color, alpha=0.10)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, names)
    axes.tick_params(axis="x", pad=10)
    axes.set_ylim(0, top)
    axes.set_rlabel_position(180 / len(names))
    axes.tick_params(axis="y", labelsize=8, labelcolor="#666666")
    axes.grid(color="#cccccc", linewidth=0.7)
    axes.spines["polar"].set_color("#999999")
    axes.set_title(title, fontsize=11, pad=22)


def _short(model: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(model).parts[-2:])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
