"""The picture of knowledge distributions: a stacked horizontal bar per model, as PNG.

One bar a model, one segment a domain, its share written into every segment that has room for it. Domains keep
their colour and order over all bars; a domain that a file does not know has no segment there.

What is not covered: measuring (`versatune_ds.apps.detect`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.patches
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from versatune_ds.domain.knowledge import read_knowledge
from versatune_ds.foundations.files import write_bytes_atomic

DPI = 150
WIDTH_IN = 8.0
BAR_IN = 0.5
MIN_LABELLED_SHARE = 0.045
"""Narrower segments have no room for their number."""
MAX_LABEL_LENGTH = 34
LEGEND_COLUMNS = 6


class Bar(NamedTuple):
    """One model."""

    label: str
    shares: Mapping[str, float]
    """Domain -> share; they sum to 1."""
    note: str = ""
    """Small print under the label."""


def draw_knowledge(paths: Sequence[Path], picture: Path) -> None:
    """One bar for each knowledge.json, in one PNG.

    Raises:
        DataError: a file cannot be read.
    """
    bars = []
    for path in paths:
        content = read_knowledge(path, "the command line")
        model, judge, texts = (content.get(key, {}) for key in ("model", "judge", "texts"))
        facts = [
            f"{texts['judged']} texts" if "judged" in texts else "",
            str(judge.get("kind", "")),
            "random weights" if model.get("weights") == "random" else "",
        ]
        label = str(model.get("source", path.parent.name))
        bars.append(Bar(label, content["domains"], ", ".join(filter(None, facts))))
    write_chart(bars, picture)


def write_chart(bars: Sequence[Bar], path: Path) -> None:
    """Draw `bars` from top to bottom into a PNG file.

    Args:
        bars: at least one.
        path: replaced atomically.
    """
    names = list(dict.fromkeys(name for bar in bars for name in bar.shares))
    colormap = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colors = [colormap(i % colormap.N) for i in range(len(names))]
    rows = -(-len(names) // LEGEND_COLUMNS)
    height = BAR_IN * len(bars) + 0.75 + 0.25 * rows
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
        figure = Figure(figsize=(WIDTH_IN, height), layout="constrained")
        axes = figure.add_subplot()
        for row, bar in enumerate(bars):
            left = 0.0
            for name, color in zip(names, colors, strict=True):
                share = bar.shares.get(name, 0.0)
                axes.barh(row, share, left=left, height=0.62, color=color, edgecolor="white", linewidth=0.8)
                if share >= MIN_LABELLED_SHARE:
                    ink = "white" if _is_dark(color) else "black"
                    axes.text(
                        left + share / 2, row, f"{100 * share:.1f}", ha="center", va="center", color=ink
                    )
                left += share
        labels = [_ending(bar.label) + (f"\n{bar.note}" if bar.note else "") for bar in bars]
        axes.set_yticks(range(len(bars)), labels)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of generated texts")
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        handles = [matplotlib.patches.Patch(color=color) for color in colors]
        figure.legend(
            handles,
            [_ending(name) for name in names],
            loc="outside upper center",
            ncols=min(len(names), LEGEND_COLUMNS),
            frameon=False,
        )
        write_bytes_atomic(path, _png(figure))


def _ending(label: str) -> str:
    """A label that is not too long; of paths the end tells most."""
    return label if len(label) <= MAX_LABEL_LENGTH else f"…{label[1 - MAX_LABEL_LENGTH :]}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _is_dark(color: tuple[float, float, float, float]) -> bool:
    red, green, blue, _ = color
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
