"""The page of a search: the mixture, what it is predicted to do and did, and how good the surface is.

What is not covered: searching (`run`), drawing (`report/figures.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from versatune_ds.apps.search.choice import Goal, predict
from versatune_ds.apps.search.surface import Array, Surface
from versatune_ds.report.figures import MUTED, Chart, Row, Series, line_chart, row_chart
from versatune_ds.report.measures import MINUS, change, number, percent
from versatune_ds.report.page import Card, Cell, Fold, Page, PageSection, Picture, Table

Json = Mapping[str, Any]
SLICE_POINTS = 41


def slices(surfaces: Sequence[Surface], goal: Goal, shares: Array) -> tuple[Array, Array]:
    """How the predicted objective hangs on each domain's share, the others in proportion to each other.

    Returns:
        Shares float64[m], objective float64[k, m]; NaN where no mixture was tried with so large a share.
    """
    k, steps = len(shares), np.linspace(0.0, 1.0, SLICE_POINTS)
    rows = []
    for j in range(k):
        others = np.where(np.arange(k) == j, 0.0, shares)
        others = others / others.sum() if others.sum() > 0 else (np.arange(k) != j) / (k - 1)
        line = np.outer(1 - steps, others)
        line[:, j] = steps
        tried = max(surfaces[j].points[:, j].max(), shares[j])
        rows.append(
            np.where(steps <= tried + 1 / SLICE_POINTS, predict(surfaces, goal, line).objective, np.nan)
        )
    return steps, np.stack(rows)


def search_page(content: Json, sliced: tuple[Array, Array]) -> Page:
    """The page of a mixture.json's `content`, and of what `slices` gave."""
    found = content["search"]
    names, objective, cost = list(content["domains"]), found["objective"], found["cost"]
    before, after = objective["start"]["measured"], objective["found"]["measured"]
    cards = [
        Card("objective, measured", number(after, 4), f"{change(before, after)} against the start mixture"),
        Card("objective, predicted", number(objective["found"]["predicted"], 4),
             f"± {number(objective['found']['half_width'], 4)} (95 %)"),
        Card("runs", str(cost["runs"]), f"and {cost['merged']} evaluations of merged adapters"),
        Card("tokens", f"{cost['tokens']:,}", f"and {cost['held_out_tokens']:,} evaluated"),
        Card("time", f"{cost['seconds'] / 60:.1f} min", "of all runs, added up"),
    ]  # fmt: skip
    remarks = [("Doubts", lines)] if (lines := doubts(found)) else []
    sections = [
        _mixture(content, names),
        _losses(found, names),
        _surface(found, names, sliced),
        _tried(found, names),
    ]
    lead = f"By {found['settings']['way']}, {found['settings']['steps']} steps a run; {provenance(content)}."
    return Page("Search for a mixture", sections, lead, legend=names, remarks=remarks, cards=cards)


def doubts(found: Json) -> list[str]:
    """Why the mixture may not be what was wanted, a sentence each."""
    lines = []
    if not found["limits_kept"]:
        lines.append("No mixture was found that keeps all of search.limits; this one oversteps them least.")
    if found["objective"]["found"]["measured"] >= found["objective"]["start"]["measured"]:
        lines.append(
            "The run that checks the mixture did no better than that of the start mixture: keep the start, "
            "or search with more steps or a larger budget."
        )
    return lines


def provenance(content: Json) -> str:
    """When, on what and with which versions."""
    found = content["search"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    hardware = found["hardware"]
    device = f"{hardware['cpu_count']} CPU cores" if hardware["device"] == "CPU" else hardware["device"]
    return f"{content['created_at'][:10]}, {device}, {versions}, commit {found['commit']}"


def _mixture(content: Json, names: Sequence[str]) -> PageSection:
    found, shares = content["search"], content["domains"]
    start = found["start"]
    most = max(*shares.values(), *start.values())
    rows = [
        Row(name=name, color=i, marks=[shares[name]], span=(start[name], shares[name]), target=start[name])
        for i, name in enumerate(names)
    ]
    unit = found["weight_unit"].replace("_", " ")
    svg = row_chart("shares of the mixture", rows, (0.0, 1.05 * most), f"share of {unit}")
    cells = [
        (name, [percent(start[name]), percent(shares[name]), number(found["passes"][name], 2)])
        for name in names
    ]
    table = Table(["domain", "start", "found", "passes in the run"], cells, color_rows=True)
    lead = "Found (mark) and start (upright line); passes over a domain's samples in the finished run."
    return PageSection("mixture", "Mixture", lead, pictures=[Picture("Shares", svg)], tables=[table])


def _losses(found: Json, names: Sequence[str]) -> PageSection:
    rows, cells, ends = [], [], [0.0]
    for i, name in enumerate(names):
        loss = found["losses"][name]
        values = [loss["predicted"], loss["measured"], *loss["interval_95"], loss["start_measured"]]
        predicted, measured, low, high, started = (value / loss["base"] - 1 for value in values)
        limit = math.nan if loss["limit"] is None else loss["limit"]
        ends += [predicted, measured, low, high, *([] if math.isnan(limit) else [limit])]
        rows.append(Row(name=name, color=i, marks=[predicted, measured], span=(low, high), target=limit))
        changes = (predicted, low, high, measured, started, limit)
        texts = ["" if math.isnan(x) else f"{100 * x:+.2f} %".replace("-", MINUS) for x in changes]
        cells.append((name, [number(loss["base"], 4), texts[0], f"{texts[1]} .. {texts[2]}", *texts[3:]]))
    pad = 0.05 * (max(ends) - min(ends))
    axis = (min(ends) - pad, max(ends) + pad)
    svg = row_chart("predicted and measured changes", rows, axis, "change of the held-out loss")
    head = ["domain", "before", "predicted", "95 % interval", "measured", "start mixture, measured", "limit"]
    lead = (
        "Held-out loss after a run on the mixture against that before it: predicted (circle, with its 95 % "
        "interval), measured in a run that the prediction had not seen (square); an upright line is a limit."
    )
    table = Table(head, cells, color_rows=True)
    return PageSection("losses", "Losses", lead, pictures=[Picture("Change by domain", svg)], tables=[table])


def _surface(found: Json, names: Sequence[str], sliced: tuple[Array, Array]) -> PageSection:
    steps, lines = sliced
    series = [
        Series(x=100 * steps[ok], y=line[ok], label=name, color=i)
        for i, (name, line) in enumerate(zip(names, lines, strict=True))
        if (ok := np.isfinite(line)).any()
    ]
    by_share = Chart(
        title="predicted objective by share", series=series, x_range=(0.0, 100.0), x_label="share in %",
        label_ends=True,
    )  # fmt: skip
    values = np.array([each["objective"] for each in found["tried"]])
    order = np.arange(1.0, len(values) + 1)
    start = found["objective"]["start"]["measured"]
    by_number = Chart(
        title="objective of the mixtures tried",
        series=[
            Series(x=order, y=values, label="tried", kind="hollow"),
            Series(x=order, y=np.minimum.accumulate(values), label="lowest", kind="step"),
            Series(x=order[[0, -1]], y=np.full(2, start), label="start", color=MUTED, dashes=1),
        ],
        x_range=(0.5, len(values) + 0.5),
        x_label="mixture, in order of trial",
        label_ends=True,
    )
    cells = [
        (name, [percent(found["losses"][name][key], 2) for key in ("left_out_rms", "spread")])
        for name in names
    ]
    lead = (
        "First what one domain's share does to the objective, the others in proportion, as far as shares "
        "were tried; then the objective of each mixture that was. The table shows what the surface is "
        "worth: its error at mixtures that it was not told of, against how far their losses lie apart. "
        "Where the two are alike it knows nothing, and longer or more runs are needed."
    )
    table = Table(["domain", "error, left out", "spread"], cells, color_rows=True)
    pictures = [
        Picture("Objective by share", line_chart(by_share)),
        Picture("Objective by mixture", line_chart(by_number)),
    ]
    return PageSection("surface", "Surface", lead, pictures=pictures, tables=[table])


def _tried(found: Json, names: Sequence[str]) -> PageSection:
    best = min(each["objective"] for each in found["tried"])
    rows: list[tuple[str, list[Cell | str]]] = []
    for i, each in enumerate(found["tried"], start=1):
        value = Cell(number(each["objective"], 4), each["objective"] == best)
        rows.append((str(i), [value, *(percent(each["shares"][name]) for name in names)]))
    fold = Fold(f"{len(rows)} mixtures", Table(["", "objective", *names], rows))
    return PageSection("tried", "Mixtures tried", folds=[fold])
