"""Pictures of a report as inline SVG: matplotlib draws, the page's style sheet colours.

Every colour is drawn as a placeholder and replaced by a CSS variable (`var(--c0)`), so one picture suits a
light and a dark page. Text stays text (selectable, in the page's font, never parsed as mathematics). Ids are
made unique over the page. A colour tells domains apart in a report of one run, and runs apart in a report
of several; from the seventh on the colours come again with dashed lines.

What is not covered: what is drawn where and in which words (`report`), colours themselves (report.css).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Array = npt.NDArray[np.float64]

NUM_COLORS = 6
"""Colour variables --c0 .. --c5 of the style sheet."""
DASHES: tuple[tuple[float, ...] | None, ...] = (None, (4, 1.6), (1.2, 1.4), (5, 1.4, 1.2, 1.4))
MARKERS = ("o", "s", "^", "D")
MAX_POINTS = 400
"""A line is averaged down to this many points: a picture has fewer pixels than a run may have steps."""
POINTS_PER_INCH = 72
INK, MUTED, GRID = "ink", "muted", "grid"
PLACEHOLDERS = {name: f"#0f{index:02x}0d" for index, name in enumerate((INK, MUTED, GRID), start=200)}
PLACEHOLDERS |= {f"c{index}": f"#0f{index:02x}0d" for index in range(NUM_COLORS)}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": PLACEHOLDERS[INK],
    "axes.edgecolor": PLACEHOLDERS[MUTED],
    "axes.labelcolor": PLACEHOLDERS[MUTED],
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "grid.color": PLACEHOLDERS[GRID],
    "grid.linewidth": 0.7,
    "xtick.color": PLACEHOLDERS[MUTED],
    "ytick.color": PLACEHOLDERS[MUTED],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}
LINE_HEIGHT_PT = 12.0
TICK_STEPS = [1, 2, 2.5, 5, 10]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a picture."""

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
    """Which of DASHES; default: by `color`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture: lines over optimizer steps."""

    title: str
    """Read out by screen readers; the visible title stands in the page."""
    series: Sequence[Series]
    x_range: tuple[float, float]
    """Same for all pictures of a report, so that they can be compared by eye."""
    width: float = 420
    """Pixels of the page at full size."""
    height: float = 240
    percent: bool = False
    """y is a share, printed in %."""
    from_zero: bool = False
    y_range: tuple[float, float] | None = None
    """Lowest and highest y to show; default: from the lines."""
    label_ends: bool = False
    """Write each label at its line's end (in the right margin), instead of relying on a legend."""
    marks_x: Array | None = None
    """Steps of weight updates: small triangles on the x axis."""
    marks_filled: npt.NDArray[np.bool_] | None = None
    """False draws a hollow triangle (computed, not applied)."""


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Our style, without warnings about characters that matplotlib's font lacks: the browser draws text."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def dash_index(number: int) -> int:
    """Which of DASHES line `number` has: solid for the first colours, dashed when they come again."""
    return number // NUM_COLORS % len(DASHES)


def css_color(color: int | str) -> str:
    """Name of the CSS variable of a colour."""
    return f"c{color % NUM_COLORS}" if isinstance(color, int) else color


def thin(x: Array, y: Array, max_points: int = MAX_POINTS) -> tuple[Array, Array]:
    """Average neighbours so that at most `max_points` are left; NaN entries are left out of a mean."""
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points + 1).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(x)))
    valid = np.isfinite(y)
    count = np.add.reduceat(valid.astype(float), edges)
    total = np.add.reduceat(np.where(valid, y, 0.0), edges)
    mean = np.full(len(edges), np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return np.add.reduceat(x, edges) / sizes, mean


def thin_steps(x: Array, y: Array) -> tuple[Array, Array]:
    """Leave out points that a step line does not need: those between two equal neighbours."""
    if len(x) < 3:
        return x, y
    same = np.nan_to_num(y, nan=-1.0)
    keep = np.ones(len(x), dtype=bool)
    keep[1:-1] = (same[1:-1] != same[:-2]) | (same[1:-1] != same[2:])
    return x[keep], y[keep]


def line_chart(chart: Chart) -> Markup:
    """Draw a chart as an `<svg>` element."""
    with drawing():
        figure, axes = _new_figure(chart.width, chart.height)
        for series in chart.series:
            _draw(axes, series)
        axes.set_xlim(*chart.x_range)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: thousands(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
        _limit_y(axes, chart)
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if chart.percent else compact))
        if chart.marks_x is not None and len(chart.marks_x):
            _draw_marks(axes, chart)
        right = _label_margin(chart) if chart.label_ends else 12.0
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
    color = PLACEHOLDERS[css_color(series.color)]
    number = series.color if isinstance(series.color, int) else 0
    dashes = DASHES[dash_index(number) if series.dashes is None else series.dashes]
    x, y = series.x, series.y
    if series.kind == "step":
        x, y = thin_steps(x, y)
        (line,) = axes.plot(x, y, color=color, linewidth=1.7, drawstyle="steps-post")
    elif series.kind == "raw":
        x, y = thin(x, y)
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.45)
        return
    elif series.kind == "hollow":
        axes.plot(x, y, color=color, linestyle="none", marker="o", markersize=4, markerfacecolor="none")
        return
    elif series.kind == "markers":
        valid = np.isfinite(y)
        (line,) = axes.plot(
            x[valid],
            y[valid],
            color=color,
            linewidth=1.0,
            marker=MARKERS[dash_index(number) if series.dashes is None else series.dashes],
            markersize=4.2,
            clip_on=False,
        )
    else:
        x, y = thin(x, y)
        (line,) = axes.plot(x, y, color=color, linewidth=1.7)
    if dashes is not None:
        line.set_dashes(dashes)


def _limit_y(axes: matplotlib.axes.Axes, chart: Chart) -> None:
    """Limits from all lines; of raw lines a few outliers may leave the picture."""
    low, high = np.inf, -np.inf
    for series in chart.series:
        values = series.y[np.isfinite(series.y)]
        if len(values) == 0:
            continue
        cut = (1, 99) if series.kind == "raw" else (0, 100)
        bounds = np.percentile(values, cut)
        low, high = min(low, float(bounds[0])), max(high, float(bounds[1]))
    if not np.isfinite(low):
        low, high = 0.0, 1.0
    if chart.from_zero:
        low = min(0.0, low)
    if chart.y_range is not None:
        low, high = chart.y_range
    if high - low < 1e-9:
        high = low + max(abs(low) * 0.1, 1e-3)
    pad = 0.06 * (high - low)
    axes.set_ylim(low if chart.from_zero and low == 0 else low - pad, high + pad)


def _draw_marks(axes: matplotlib.axes.Axes, chart: Chart) -> None:
    assert chart.marks_x is not None
    filled = chart.marks_filled if chart.marks_filled is not None else np.ones(len(chart.marks_x), bool)
    ink = PLACEHOLDERS[MUTED]
    for chosen, face in ((filled, ink), (~filled, "none")):
        if not chosen.any():
            continue
        axes.plot(
            chart.marks_x[chosen],
            np.zeros(int(chosen.sum())),
            linestyle="none",
            marker="^",
            markersize=5,
            markerfacecolor=face,
            markeredgecolor=ink,
            markeredgewidth=0.8,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            zorder=5,
        )


def shorten(text: str, length: int) -> str:
    """`text` in at most `length` characters, with an ellipsis where it was cut."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


MAX_LABEL_LENGTH = 16


def _label_margin(chart: Chart) -> float:
    longest = max((len(shorten(s.label, MAX_LABEL_LENGTH)) for s in chart.series), default=0)
    return 18 + 6.1 * longest


def _label_ends(axes: matplotlib.axes.Axes, chart: Chart) -> None:
    """Write labels beside the lines' last values, moved apart where they would overlap."""
    ends = []
    for series in chart.series:
        valid = np.flatnonzero(np.isfinite(series.y))
        if series.label and len(valid):
            ends.append((float(series.y[valid[-1]]), float(series.x[valid[-1]]), series))
    if not ends:
        return
    ends.sort(key=lambda end: end[0])
    low, high = axes.get_ylim()
    box = axes.get_position()
    height_pt = box.height * chart.height
    wanted = np.array([(value - low) / (high - low) * height_pt for value, _, _ in ends])
    for (value, step, series), position in zip(ends, spread(wanted, LINE_HEIGHT_PT, height_pt), strict=True):
        color = PLACEHOLDERS[css_color(series.color)]
        axes.annotate(
            shorten(series.label, MAX_LABEL_LENGTH),
            xy=(step, value),
            xytext=(1 + 14 / (box.width * chart.width), position / height_pt),
            textcoords="axes fraction",
            va="center",
            ha="left",
            fontsize=9.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.8,
                "alpha": 0.7,
                "shrinkA": 0,
                "shrinkB": 2,
                "relpos": (0, 0.5),
                "linestyle": "-" if series.color in (INK, MUTED) else _dash_style(series.color),
            },
        )


def _dash_style(color: int | str) -> object:
    dashes = DASHES[dash_index(color) if isinstance(color, int) else 0]
    return "-" if dashes is None else (0, dashes)


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
class ShareRow:
    """One domain of a shares picture; shares 0..1, NaN where not recorded."""

    name: str
    color: int | str
    target: float
    achieved: Sequence[float]
    """By unit: samples, tokens, supervised tokens."""


SHARE_MARKERS = (("o", "samples"), ("s", "tokens"), ("^", "supervised tokens"))


def share_chart(title: str, rows: Sequence[ShareRow], x_max: float, width: float = 420) -> Markup:
    """Target share (bar) and achieved shares (marks), one row a domain; x goes from 0 to `x_max`."""
    height = 50 + 22.0 * len(rows)
    with drawing():
        figure, axes = _new_figure(width, height)
        axes.grid(axis="y", visible=False)
        for index, row in enumerate(rows):
            y = len(rows) - 1 - index
            color = PLACEHOLDERS[css_color(row.color)]
            values = np.array([row.target, *row.achieved])
            values = values[np.isfinite(values)]
            if len(values):
                axes.plot([values.min(), values.max()], [y, y], color=color, linewidth=1, alpha=0.5)
            axes.plot(
                [row.target] * 2, [y - 0.36, y + 0.36], color=PLACEHOLDERS[INK], linewidth=2.2, zorder=2
            )
            for (marker, _), value in zip(SHARE_MARKERS, row.achieved, strict=True):
                axes.plot(value, y, marker=marker, color=color, markersize=6, alpha=0.9, zorder=3)
        axes.set_yticks(range(len(rows)), [shorten(row.name, 22) for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlim(0, x_max)
        axes.tick_params(axis="y", labelcolor=PLACEHOLDERS[INK])
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set_xlabel("share of what was trained on")
        _place(figure, axes, width, height, 16)
        return _to_svg(figure, title)


def thousands(value: float) -> str:
    """A step number: 950, 1.5k, 12k, 2M."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.0f}"


def compact(value: float, _: object = None) -> str:
    """A tick label: few digits, thousands as k, millions as M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.4g}".replace("-", "\u2212")


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
    for name, placeholder in PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    prefix = f"p{hashlib.sha256((title + text).encode()).hexdigest()[:10]}-"
    text = re.sub(r'(\bid=")', rf"\g<1>{prefix}", text)
    text = re.sub(r"(url\(#)", rf"\g<1>{prefix}", text)
    text = re.sub(r'(xlink:href="#)', rf"\g<1>{prefix}", text)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", text, count=1)
    label = f'<svg role="img" aria-label="{escape(title)}" '
    text = text.replace("<svg ", label, 1)
    return Markup(re.sub(r"\n\s*", "\n", text).strip())
