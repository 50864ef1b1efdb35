"""What `versatune-ds evaluate` found: tables for the console and the report, and a radar chart as PNG.

The chart has an axis per domain and, if benchmarks were run, a second one per task. Losses: further in is
better, all axes with one scale. Scores: further out is better, 0 to 1.

What is not covered: the numbers (`versatune_ds.domain.evaluation`), drawing (`figures`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from versatune_ds.domain.evaluation import Change, ModelEvaluation, ScoreChange
from versatune_ds.foundations.files import write_bytes_atomic
from versatune_ds.report.figures import Radar, radar_charts, to_png
from versatune_ds.report.measures import NOTHING, number, percent
from versatune_ds.report.page import Table, to_text

MIN_AXES = 3
"""A radar chart with fewer axes is a line."""


def show(
    after: ModelEvaluation,
    before: ModelEvaluation | None,
    changes: Sequence[Change],
    picture: Path,
    score_changes: Sequence[ScoreChange] = (),
) -> str:
    """All tables as text; draws the chart.

    Args:
        changes: from `compare`, empty without `before`.
        picture: PNG file to write.
        score_changes: from `compare_scores`.
    """
    parts = [f"{after.model}\n{to_text(loss_table(after))}"]
    if after.answers:
        parts.append(to_text(score_table(after)))
    if before is not None:
        worse = [change for change in changes if change.relative > 0]
        forgotten = ", ".join(f"{c.domain} {100 * c.forgetting:.2f} %" for c in worse) or "nothing"
        parts.append(f"against {before.model}\n{to_text(change_table(changes))}\nforgotten: {forgotten}")
    if score_changes:
        parts.append(to_text(score_change_table(score_changes)))
    if after.benchmarks:
        parts.append(to_text(benchmark_table(after, before)))
    not_run = after.provenance.get("benchmarks_not_run") or {}
    if not_run:
        parts.append("\n".join(f"not run: {name}: {why}" for name, why in not_run.items()))
    drawn = radar_chart(picture, after, before)
    parts.append(str(picture) if drawn else f"no radar chart: it needs {MIN_AXES} domains or tasks")
    return "\n\n".join(parts)


def loss_table(evaluation: ModelEvaluation, caption: str = "") -> Table:
    head = ("domain", "loss", "std. error", "perplexity", "samples", "tokens")
    keys = {"loss": 4, "stderr": 4, "perplexity": 2, "samples": None, "supervised_tokens": None}

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [f"{row[key]:,}" if n is None else number(row[key], n) for key, n in keys.items()]

    rows = [(name, cells(row)) for name, row in evaluation.to_json()["domains"].items()]
    return Table(head, rows, caption)


def change_table(changes: Sequence[Change]) -> Table:
    head = ("domain", "before", "after", "change", "95 % interval", "forgetting")
    rows = []
    for change in changes:
        between = "" if change.interval is None else " .. ".join(f"{100 * x:+.2f}" for x in change.interval)
        losses = [number(change.before, 4), number(change.after, 4), f"{100 * change.relative:+.2f} %"]
        rows.append(
            (change.domain, [*losses, f"{between} %" if between else NOTHING, percent(change.forgetting, 2)])
        )
    return Table(head, rows)


def score_table(evaluation: ModelEvaluation, caption: str = "") -> Table:
    """Mean score of each domain's answers, how many have one, and how many the model ended itself."""
    rows = []
    for name, scores in evaluation.scores().items():
        asked = [answer for answer in evaluation.answers if answer["domain"] == name]
        mean = sum(scores) / len(scores) if scores else None
        ended = sum(answer["finished"] for answer in asked)
        rows.append((name, [percent(mean), f"{len(scores):,} of {len(asked):,}", f"{ended:,}"]))
    return Table(("domain", "score", "answers scored", "ended by the model"), rows, caption)


def score_change_table(changes: Sequence[ScoreChange]) -> Table:
    head = ("domain", "score before", "after", "difference", "95 % interval", "better", "worse", "samples")
    rows = []
    for c in changes:
        between = "" if c.interval is None else " .. ".join(f"{100 * x:+.1f}" for x in c.interval)
        moved = f"{100 * (c.after - c.before):+.1f}"
        cells = [percent(c.before), percent(c.after), moved, between or NOTHING]
        rows.append((c.domain, [*cells, *(f"{count:,}" for count in (c.better, c.worse, c.samples))]))
    return Table(head, rows)


def benchmark_table(after: ModelEvaluation, before: ModelEvaluation | None, caption: str = "") -> Table:
    """Scores by domain, beside those of another model if it has them."""
    others = {score.task: score.value for score in before.benchmarks} if before is not None else {}
    head = ["domain", "benchmark", "metric", "score", "std. error", "samples", "before"]
    rows = []
    for score in after.benchmarks:
        values = (score.value, score.stderr, others.get(score.task))
        value, stderr, other = (number(v, 4) for v in values)
        rows.append((score.domain, [score.name, score.metric, value, stderr, f"{score.samples:,}", other]))
    if before is None:
        head, rows = head[:-1], [(name, cells[:-1]) for name, cells in rows]
    return Table(head, rows, caption)


def radar_chart(path: Path, after: ModelEvaluation, before: ModelEvaluation | None) -> bool:
    """Draw the radar chart; False (and no file) when there are fewer than three domains and tasks."""
    models = [after] if before is None else [after, before]
    panels: list[Radar] = []
    if len(after.names) >= MIN_AXES:
        losses = [[float(value) for value in model.sums.mean_loss()] for model in models]
        top = 1.1 * max(map(max, losses))
        panels.append(Radar("held-out loss, nats per token (inner is better)", after.names, losses, top))
    if len(after.benchmarks) >= MIN_AXES:
        scores = [{score.task: score.value for score in model.benchmarks} for model in models]
        values = [[found.get(score.task, math.nan) for score in after.benchmarks] for found in scores]
        names = [score.name for score in after.benchmarks]
        panels.append(Radar("benchmark score (outer is better)", names, values, 1.0))
    if panels:
        labels = ["/".join(Path(model.model).parts[-2:]) for model in models]
        write_bytes_atomic(path, to_png(radar_charts(panels, labels)))
    return bool(panels)
