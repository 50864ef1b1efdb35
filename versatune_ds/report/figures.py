"""Every figure, in one palette and one style: matplotlib draws; SVG for pages, PNG for files beside results.

All is drawn in the colours of a light page. In SVG each colour becomes a CSS variable (`var(--c0)`), whose
values for light and dark pages `palette_css` gives, so one figure suits both; text stays text (selectable,
in the page's font, never parsed as mathematics) and ids are made unique over the page. A colour tells domains
apart in a report of one run, and runs apart in a report of several; from the seventh on the colours come
again with dashed lines or hatched areas.

What is not covered: what is drawn where and in which words (`report`, `knowledge`, `evaluation`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from versatune_ds.report.measures import MINUS, thin, thin_steps

Array = npt.NDArray[np.float64]

LIGHT = {
    "ink": "#1c2430", "muted": "#5b6675", "grid": "#e6e9ee",
    "c0": "#0072b2", "c1": "#d98200", "c2": "#009e73", "c3": "#d0490a", "c4": "#b5579a", "c5": "#38a3d8",
}  # fmt: skip
DARK = {
    "ink": "#e6eaf0", "muted": "#9ba7b6", "grid": "#2a323e",
    "c0": "#4a9fe0", "c1": "#f0ad3d", "c2": "#2fc79b", "c3": "#f5824a", "c4": "#dd93c6", "c5": "#8ed3f7",
}  # fmt: skip
INK, MUTED = "ink", "muted"
NUM_COLORS = 6
DASHES: tuple[tuple[float, ...] | None, ...] = (None, (4, 1.6), (1.2, 1.4), (5, 1.4, 1.2, 1.4))
HATCHES = ("", "///", "...", "xxx")
MARKERS = ("o", "s", "^", "D")
POINTS_PER_INCH = 72
PNG_DPI, SOFTWARE = 150, "versatune_ds"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": LIGHT[INK],
    "axes.edgecolor": LIGHT[MUTED],
    "axes.labelcolor": LIGHT[MUTED],
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "hatch.color": "white",
    "xtick.color": LIGHT[MUTED],
    "ytick.color": LIGHT[MUTED],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "path.simplify": True,
}
TRIANGLE: dict[str, Any] = {
    "linestyle": "none", "marker": "^", "markersize": 5, "clip_on": False, "zorder": 5,
    "markeredgecolor": LIGHT[MUTED], "markeredgewidth": 0.8,
}  # fmt: skip
LINK = {"arrowstyle": "-", "linewidth": 0.8, "alpha": 0.7, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
LINE_HEIGHT_PT = 12.0
TICK_STEPS = [1, 2, 2.5, 5, 10]
MAX_LABEL_LENGTH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    x: Array
    y: Array
    label: str = ""
    """Written at the line's right end where the picture labels its lines."""
    color: int | str = INK
    """Number of a domain or run (colour and dashes), or `ink` or `muted`."""
    kind: Literal["line", "step", "raw", "markers", "hollow"] = "line"
    """`step` holds each value until the next; `raw` is thin and pale; `markers` has marks on a thin line;
    `hollow` has hollow marks only."""
    dashes: int | None = None
    """Which of DASHES and MARKERS; default: by `color`."""

    @property
    def dash_number(self) -> int:
        """Index into DASHES and MARKERS."""
        by_color = dash_index(self.color) if isinstance(self.color, int) else 0
        return by_color if self.dashes is None else self.dashes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture: lines over optimizer steps or tokens."""

    title: str
    """Read out by screen readers; the visible title stands in the page."""
    series: Sequence[Series]
    x_range: tuple[float, float]
    """Same for all pictures of a report, so that they can be compared by eye."""
    width: float = 420
    """Pixels of the page at full size."""
    height: float = 240
    x_label: str = "optimizer step"
    percent: bool = False
    """y is a share, printed in %."""
    from_zero: bool = False
    y_range: tuple[float, float] | None = None
    """Lowest and highest y to show; default: from the lines."""
    label_ends: bool = False
    """Write each label at its line's end (in the right margin), instead of relying on a legend."""
    marks: tuple[Array, Array] = (np.empty(0), np.empty(0))
    """Steps with a small triangle on the x axis, filled (updates) and hollow (computed, not applied)."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Our style, without warnings about characters that matplotlib's font lacks: the browser draws text."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def palette_css() -> str:
    """The colours as CSS variables, for light pages and dark ones."""
    light, dark = (" ".join(f"--{k}: {v};" for k, v in colors.items()) for colors in (LIGHT, DARK))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def dash_index(number: int) -> int:
    """Which of DASHES line `number` has: solid for the first colours, dashed when they come again."""
    return number // NUM_COLORS % len(DASHES)


def color_of(color: int | str) -> str:
    """A colour on a light page, of a domain's or run's number, or by name."""
    return LIGHT[f"c{color % NUM_COLORS}" if isinstance(color, int) else color]


def line_chart(chart: Chart) -> Markup:
    with drawing():
        figure, axes = _new_figure(chart.width, chart.height)
        for series in chart.series:
            _draw(axes, series)
        axes.set_xlim(*chart.x_range)
        axes.set_xlabel(chart.x_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(compact))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
        _limit_y(axes, chart)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if chart.percent else compact))
        for steps, face in zip(chart.marks, (LIGHT[MUTED], "none"), strict=True):
            look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "markerfacecolor": face}
            if len(steps):  # an empty line would stretch what `_place` measures
                axes.plot(steps, np.zeros(len(steps)), **TRIANGLE, **look)
        longest = max((len(shorten(s.label, MAX_LABEL_LENGTH)) for s in chart.series), default=0)
        right = 18 + 6.1 * longest if chart.label_ends else 12.0
        _place(figure, axes, chart.width, chart.height, right)
        if chart.label_ends:
            _label_ends(axes, chart)
        return _to_svg(figure, chart.title)


def _new_figure(width: float, height: float) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(width / POINTS_PER_INCH, height / POINTS_PER_INCH), dpi=POINTS_PER_INCH)
    FigureCanvasSVG(figure)
    return figure, figure.add_axes((0.1, 0.15, 0.8, 0.8))


def _place(figure: Figure, axes: matplotlib.axes.Axes, width: float, height: float, right: float) -> None:
    """Fit the axes into the figure: left and bottom by what the tick labels need."""
    box, inner = axes.get_tightbbox(), axes.get_window_extent()
    assert box is not None
    left = (inner.x0 - box.x0) + 4
    bottom = (inner.y0 - box.y0) + 4
    axes.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + 10) / height))


def _draw(axes: matplotlib.axes.Axes, series: Series) -> None:
    look: dict[str, Any] = {"color": color_of(series.color), "linewidth": 1.7}
    number = series.dash_number
    x, y = thin_steps(series.x, series.y) if series.kind == "step" else (series.x, series.y)
    if series.kind == "step":
        look["drawstyle"] = "steps-post"
    elif series.kind == "hollow":
        look |= {"linestyle": "none", "marker": "o", "markersize": 4, "markerfacecolor": "none"}
    elif series.kind == "markers":
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        look |= {"linewidth": 1.0, "marker": MARKERS[number], "markersize": 4.2, "clip_on": False}
    else:
        x, y = thin(x, y)
    if series.kind == "raw":
        look |= {"linewidth": 0.8, "alpha": 0.45}
    (line,) = axes.plot(x, y, **look)
    dashes = DASHES[number]
    if dashes is not None and series.kind not in ("raw", "hollow"):
        line.set_dashes(dashes)


def _limit_y(axes: matplotlib.axes.Axes, chart: Chart) -> None:
    """Limits from all lines; of raw lines a few outliers may leave the picture."""
    bounds = [
        np.percentile(values, (1, 99) if series.kind == "raw" else (0, 100))
        for series in chart.series
        if len(values := series.y[np.isfinite(series.y)])
    ]
    low, high = (min(b[0] for b in bounds), max(b[1] for b in bounds)) if bounds else (0.0, 1.0)
    if chart.from_zero:
        low = min(0.0, low)
    if chart.y_range is not None:
        low, high = chart.y_range
    if high - low < 1e-9:
        high = low + max(abs(low) * 0.1, 1e-3)
    pad = 0.06 * (high - low)
    axes.set_ylim(low if chart.from_zero and low == 0 else low - pad, high + pad)


def shorten(text: str, length: int, *, keep_end: bool = False) -> str:
    """`text` in at most `length` characters, with an ellipsis where it was cut."""
    if len(text) <= length:
        return text
    return f"…{text[1 - length :]}" if keep_end else text[: length - 1].rstrip() + "…"


def _label_ends(axes: matplotlib.axes.Axes, chart: Chart) -> None:
    """Write labels beside the lines' last values, moved apart where they would overlap."""
    ends = []
    for series in chart.series:
        valid = np.flatnonzero(np.isfinite(series.y))
        if series.label and len(valid):
            ends.append((float(series.y[valid[-1]]), float(series.x[valid[-1]]), series))
    ends.sort(key=lambda end: end[0])
    low, high = axes.get_ylim()
    box = axes.get_position()
    height_pt = box.height * chart.height
    wanted = np.array([(value - low) / (high - low) * height_pt for value, _, _ in ends])
    for (value, step, series), position in zip(ends, spread(wanted, LINE_HEIGHT_PT, height_pt), strict=True):
        dashes = DASHES[dash_index(series.color)] if isinstance(series.color, int) else None
        color, style = color_of(series.color), "-" if dashes is None else (0, dashes)
        place = (1 + 14 / (box.width * chart.width), position / height_pt)
        link = {**LINK, "color": color, "linestyle": style}
        text = shorten(series.label, MAX_LABEL_LENGTH)
        axes.annotate(
            text, (step, value), place, "data", "axes fraction", link, False, va="center", ha="left"
        )


def spread(wanted: Array, gap: float, length: float) -> Array:
    """Positions near the sorted `wanted`, at least `gap` apart, inside [0, length] if that is possible."""
    placed = wanted.copy()
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    overflow = placed[-1] - length if len(placed) else 0.0
    if overflow > 0:
        placed[-1] -= overflow
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = min(placed[index], placed[index + 1] - gap)
    return placed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a row chart; NaN is not drawn."""

    name: str
    color: int | str
    marks: Sequence[float]
    """x of a mark each, in the order of MARKERS."""
    span: tuple[float, float]
    """A thin line from x to x."""
    target: float = math.nan
    """x of a short upright line in ink."""


def row_chart(
    title: str, rows: Sequence[Row], x_range: tuple[float, float], label: str, width: float = 420
) -> Markup:
    """Marks, spans and targets, one row each from top to bottom, over one x axis of shares."""
    height = 50 + 22.0 * len(rows)
    with drawing():
        figure, axes = _new_figure(width, height)
        axes.grid(axis="y", visible=False)
        if x_range[0] < 0:
            axes.axvline(0, color=LIGHT[INK], linewidth=0.8)
        for y, row in enumerate(reversed(rows)):
            color = color_of(row.color)
            axes.plot(row.span, [y, y], color=color, linewidth=1, alpha=0.5)
            axes.plot([row.target] * 2, [y - 0.36, y + 0.36], color=LIGHT[INK], linewidth=2.2, zorder=2)
            for marker, value in zip(MARKERS, row.marks, strict=False):
                axes.plot(value, y, marker=marker, color=color, markersize=6, alpha=0.9, zorder=3)
        axes.set_yticks(range(len(rows)), [shorten(row.name, 22) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(*x_range)
        axes.tick_params(axis="y", labelcolor=LIGHT[INK])
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set_xlabel(label)
        _place(figure, axes, width, height, 16)
        return _to_svg(figure, title)


class Stack(NamedTuple):
    """One bar of stacked segments."""

    label: str
    shares: Mapping[str, float]
    """Domain -> share; they sum to 1."""
    note: str = ""
    """Small print under the label."""


MIN_LABELLED_SHARE = 0.045
"""Narrower segments have no room for their number."""
LEGEND_COLUMNS = 6


def stacked_bars(stacks: Sequence[Stack], label: str) -> Figure:
    """One horizontal bar each from top to bottom; domains keep colour and order over all bars."""
    names = list(dict.fromkeys(name for stack in stacks for name in stack.shares))
    rows = -(-len(names) // LEGEND_COLUMNS)
    with drawing():
        figure = Figure(figsize=(8.0, 0.5 * len(stacks) + 0.75 + 0.25 * rows), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=False)
        looks: list[dict[str, Any]] = [
            {"facecolor": color_of(i), "hatch": HATCHES[dash_index(i)], "edgecolor": "white"}
            for i in range(len(names))
        ]
        for row, stack in enumerate(stacks):
            left = 0.0
            for name, look in zip(names, looks, strict=True):
                share = stack.shares.get(name, 0.0)
                axes.barh(row, share, left=left, height=0.62, linewidth=0.8, **look)
                if share >= MIN_LABELLED_SHARE:
                    text = axes.text(left + share / 2, row, f"{100 * share:.1f}", ha="center", va="center")
                    back = {"facecolor": look["facecolor"], "edgecolor": "none", "pad": 1}
                    text.set(color="white", fontweight="bold", bbox=back)
                left += share
        labels = [shorten(stack.label, 34, keep_end=True) for stack in stacks]  # of paths the end tells most
        notes = [f"\n{stack.note}" if stack.note else "" for stack in stacks]
        axes.set_yticks(range(len(stacks)), [label + note for label, note in zip(labels, notes, strict=True)])
        axes.tick_params(axis="y", labelcolor=LIGHT[INK])
        axes.set_ylim(len(stacks) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set_xlabel(label)
        texts = [shorten(name, 34) for name in names]
        place: dict[str, Any] = {"loc": "outside upper center", "ncols": min(len(names), LEGEND_COLUMNS)}
        figure.legend([Patch(**look) for look in looks], texts, frameon=False, **place)
    return figure


class Radar(NamedTuple):
    """One radar chart: an axis a name, a closed line a model."""

    title: str
    names: Sequence[str]
    lines: Sequence[Sequence[float]]
    top: float


def radar_charts(panels: Sequence[Radar], labels: Sequence[str]) -> Figure:
    """Radar charts side by side, one legend with the models' labels under them."""
    with drawing():
        figure = Figure(figsize=(6.4 * len(panels), 6.0))
        for index, panel in enumerate(panels):
            axes: Any = figure.add_subplot(1, len(panels), index + 1, projection="polar")
            angles = np.linspace(0, 2 * np.pi, len(panel.names), endpoint=False)
            for number, values in enumerate(panel.lines):
                around = np.append(values, values[:1])
                look = {"color": color_of(3 * number), "linewidth": 1.8, "marker": "o", "markersize": 3.5}
                axes.plot(np.append(angles, 0.0), around, **look)
                axes.fill(np.append(angles, 0.0), around, color=look["color"], alpha=0.10)
            axes.set_theta_offset(np.pi / 2)
            axes.set_theta_direction(-1)
            axes.set_xticks(angles, panel.names)
            axes.tick_params(axis="x", pad=10, labelcolor=LIGHT[INK])
            axes.set_ylim(0, panel.top)
            axes.set_rlabel_position(180 / len(panel.names))
            axes.set_title(panel.title, fontsize=11, pad=22)
        handles = figure.axes[0].lines[: len(labels)]
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    with drawing():
        figure.savefig(buffer, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": SOFTWARE})
    return buffer.getvalue()


def compact(value: float, _: object = None) -> str:
    """A tick label: few digits, from 10,000 on thousands as k, millions as M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.4g}".replace("-", MINUS)


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g} %"


def _to_svg(figure: Figure, title: str) -> Markup:
    """The figure as an `<svg>` element for inlining: variables for colours, unique ids, a label."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style .*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for name, color in LIGHT.items():
        text = text.replace(color, f"var(--{name})")
    prefix = f"p{hashlib.sha256((title + text).encode()).hexdigest()[:10]}-"
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", text)
    for size in ("width", "height"):
        text = re.sub(rf'(<svg [^>]*?){size}="[^"]*"', r"\1", text, count=1)
    label = f'<svg role="img" aria-label="{escape(title)}" '
    text = text.replace("<svg ", label, 1)
    return Markup(re.sub(r"\n\s*", "\n", text).strip())
