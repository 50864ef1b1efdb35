"""PNG pictures for pages that are read outside of a report: in a repository, a mail, a terminal's viewer.

Colours are those of the report on a light page. From the seventh domain on they come again, dashed.

What is not covered: pictures of the report (`plots`), which are SVG and follow the page's style.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLORS = ("#0072b2", "#d98200", "#009e73", "#d0490a", "#b5579a", "#38a3d8")
DASHES = ("-", "--", ":", "-.")
GRID, MUTED, INK = "#e6e9ee", "#5b6675", "#1c2430"
DPI = 110
PANEL_INCHES = (3.1, 2.3)
COLUMNS = (4, 3)
"""Panels in a row: of these the number that leaves fewer places empty."""


@dataclass(frozen=True)
class Panel:
    """One small picture: weights by domain over optimizer steps."""

    title: str
    steps: Sequence[int]
    """Steps from which on the weights hold."""
    paths: Mapping[str, Sequence[float]]
    """Weights by domain, one a step."""


@dataclass(frozen=True)
class Bar:
    """One row of a bar picture."""

    label: str
    value: float
    half_width: float | None
    group: int = 0
    """Colour."""


def weight_panels(panels: Sequence[Panel]) -> bytes:
    """Panels side by side with one scale and one legend, as PNG."""
    columns = min(len(panels), min(COLUMNS, key=lambda count: -len(panels) % count))
    rows = math.ceil(len(panels) / columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(columns * width, rows * height + 0.45), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        panel = panels[index]
        _style(axes)
        axes.set_title(panel.title, fontsize=9, color=INK, loc="left")
        for number, (name, weights) in enumerate(panel.paths.items()):
            (handles[name],) = axes.plot(
                *_held(panel.steps, weights),
                color=COLORS[number % len(COLORS)],
                linestyle=DASHES[number // len(COLORS) % len(DASHES)],
                linewidth=1.5,
                drawstyle="steps-post",
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    largest = max(weight for panel in panels for path in panel.paths.values() for weight in path)
    grid[0, 0].set_ylim(0, 1.05 * largest)
    figure.supxlabel("optimizer steps done", fontsize=8, color=MUTED)
    legend = figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=8, frameon=False, fontsize=8
    )
    for text in legend.get_texts():
        text.set_color(INK)
    return _png(figure)


def bar_rows(bars: Sequence[Bar], label: str) -> bytes:
    """Horizontal bars of relative numbers with their intervals, the first one on top, as PNG."""
    figure = Figure(figsize=(7.0, 0.6 + 0.27 * len(bars)), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _style(axes)
    axes.grid(axis="y", visible=False)
    for row, bar in enumerate(reversed(bars)):
        axes.barh(row, bar.value, height=0.62, color=COLORS[bar.group % len(COLORS)], alpha=0.85)
        if bar.half_width is not None:
            axes.errorbar(bar.value, row, xerr=bar.half_width, color=INK, capsize=2.5, linewidth=1)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(bars)), [bar.label for bar in reversed(bars)], fontsize=8)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel(label, fontsize=8, color=MUTED)
    return _png(figure)


def _held(steps: Sequence[int], weights: Sequence[float]) -> tuple[list[int], list[float]]:
    """Points of a line that goes on for one more interval, so that the last weight is seen."""
    after = 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1
    return [*steps, after], [*weights, weights[-1]]


def _style(axes: Any) -> None:
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7.5, colors=MUTED, length=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
