"""What models answered from the first to the last evaluation, side by side, and their scores as tables.

The samples shown are the first ones that were asked: no choice by what came of them.

What is not covered: the figures of the scores (`report.scores_section`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from versatune_ds.foundations import constants
from versatune_ds.report.figures import shorten
from versatune_ds.report.measures import NOTHING, all_names, first_last, percent
from versatune_ds.report.page import Cell, Table
from versatune_ds.report.runs import RunData, read_jsonl

MAX_SAMPLES = 4
"""Samples of a domain whose texts are shown."""
MAX_EVALUATIONS, MAX_TEXTS = 8, 4
"""Evaluations in the table of scores, and beside each other as texts: the first, the last, some between."""
MAX_CHARS = 500
"""Of a text; more of it stands in answers.jsonl."""

Line = Mapping[str, Any]


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers 0 .. count - 1, the first and the last among them, evenly apart."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def score_table(run: RunData) -> Table:
    """Mean score by domain at the first to the last evaluation."""
    asked = np.flatnonzero(np.isfinite(run.eval_score).any(axis=1))
    shown = asked[evenly(len(asked), MAX_EVALUATIONS)]
    head = [run.x_label, *(f"{run.eval_steps[e]:,.0f}" for e in shown)]
    rows = [
        (name, [percent(run.eval_score[e, i]) for e in shown])
        for i, name in enumerate(run.names)
        if np.isfinite(run.eval_score[:, i]).any()
    ]
    return Table(head, rows, "Mean score")


def last_scores(runs: Sequence[RunData]) -> Table:
    """Mean score at the last evaluation by domain and run; the highest is bold."""
    rows = []
    for name in all_names(runs):
        columns = [run.column(name) for run in runs]
        values = [
            math.nan if column is None else first_last(run.eval_score[:, column])[1]
            for run, column in zip(runs, columns, strict=True)
        ]
        if np.isfinite(values).any():
            cells = [Cell(percent(value), best=value == np.nanmax(values)) for value in values]
            rows.append((name, cells))
    head = ["Domain", *(run.label for run in runs)]
    return Table(head, rows, "Mean score at the last evaluation; highest in bold")


def answer_tables(run: RunData) -> list[Table]:
    """A table a domain: a row a sample, with its prompt, its reference, its answers over the evaluations."""
    samples = _read(run)
    tables = []
    for domain, lines in samples.items():
        steps = sorted({step for of_sample in lines.values() for step in of_sample})
        shown = [steps[i] for i in evenly(len(steps), MAX_TEXTS)]
        rows = []
        for source, of_sample in lines.items():
            line = next(iter(of_sample.values()))
            answers = [_answer(of_sample.get(step)) for step in shown]
            prompt = shorten(str(line.get("prompt")).strip(), MAX_CHARS + 1, keep_end=True)
            asked = [prompt, shorten(str(line.get("reference")), MAX_CHARS + 1)]
            rows.append((Path(source).name, [*asked, *answers]))
        head = ["", "Prompt", "Reference", *(f"after step {step:,}" for step in shown)]
        tables.append(Table(head, rows, f"Answers: {domain}", kind="texts answers"))
    return tables


def _read(run: RunData) -> dict[str, dict[str, dict[int, Line]]]:
    """Of answers.jsonl by domain, place of the sample and step: the first samples of each domain."""
    found: dict[str, dict[str, dict[int, Line]]] = {}
    for line in read_jsonl(run.folder / constants.ANSWERS_FILE, []):
        samples = found.setdefault(str(line.get("domain")), {})
        source = str(line.get("source"))
        if source in samples or len(samples) < MAX_SAMPLES:
            samples.setdefault(source, {})[int(line["step"])] = line
    return found


def _answer(line: Line | None) -> str:
    """The score's mark and the text, and where it was cut."""
    if line is None:
        return NOTHING
    score = line.get("score")
    marks = {1.0: "\u2713", 0.0: "\u2717"}
    mark = "?" if not isinstance(score, int | float) else marks.get(float(score), f"{score:.2f}")
    answer = shorten(str(line.get("answer")), MAX_CHARS + 1)
    return f"{mark} {answer}" + ("" if line.get("finished") is True else " [cut]")
