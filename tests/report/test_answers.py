"""The report's part about scored answers: figures, tables of scores, and texts side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest

from versatune_ds.report.answers import MAX_CHARS, MAX_SAMPLES, answer_tables, evenly
from versatune_ds.report.report import render
from versatune_ds.report.runs import read_run, read_runs

PAYLOAD = '"><script>alert(1)</script>'


def answer(step: int, sample: int, text: str, score: float | None, **more) -> dict:
    known = {"step": step, "domain": "law", "source": f"d/law:{sample}", "prompt": f"question {sample}?"}
    rest = {"answer": text, "reference": f"right {sample}", "score": score, "tokens": 3, "finished": True}
    return {**known, **rest, **more}


@pytest.fixture
def asked(make_run):
    """A run with scores of law at steps 0 and 20, and six samples that were asked."""

    def make(name: str = "run", last: float = 0.75):
        folder = make_run(name)
        path = folder / "eval.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line, score in zip(lines, (0.25, last), strict=True):
            line["domain_score"] = {"law": score}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        answers = [answer(0, n, f"wrong {n}", 0.0, finished=False) for n in range(6)]
        answers += [answer(20, n, f"right {n}", 1.0) for n in range(6)]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
        return folder

    return make


def test_texts_stand_side_by_side_from_first_to_last(asked):
    (table,) = answer_tables(read_run(asked()))
    assert table.head == ["", "Prompt", "Reference", "after step 0", "after step 20"]
    assert len(table.rows) == MAX_SAMPLES < 6
    label, cells = table.rows[1]
    assert label == "law:1"
    assert cells == ["question 1?", "right 1", "\u2717 wrong 1 [cut]", "\u2713 right 1"]


def test_scores_that_are_not_whole_or_not_known_and_long_texts(asked):
    folder = asked()
    lines = [
        answer(0, 0, "x" * 2000, 0.5, prompt="a" * 600 + "z"),
        answer(0, 1, "y", None),
        answer(5, 1, "y", 1),
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (table,) = answer_tables(read_run(folder))
    (_, first), (_, second) = table.rows
    assert first[2] == f"0.50 {'x' * MAX_CHARS}\u2026" and first[0].endswith("z") and len(first[0]) == 501
    assert second[2] == "? y" and second[3] == "\u2713 y"
    assert first[3] == "\u2013", "it was not asked after step 5"


def test_the_page_has_scores_and_texts_and_escapes_them(asked):
    folder = asked()
    line = answer(0, 9, f"{PAYLOAD}\nsecond line", 1.0, domain="code", prompt=PAYLOAD, reference=PAYLOAD)
    with open(folder / "answers.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    page = render(read_runs([folder]))
    assert "Scored answers" in page and "25.0 %" in page and "75.0 %" in page
    assert "&lt;script&gt;" in page and "<script" not in page


def test_several_runs_are_compared_by_their_last_scores(asked):
    page = render(read_runs([asked("one"), asked("two", 0.5)]))
    assert "Mean score at the last evaluation" in page and '<td class="best">75.0 %</td>' in page
    assert "after step 20" not in page


def test_a_run_that_asked_nothing_has_no_such_part(make_run):
    assert "Scored answers" not in render(read_runs([make_run()]))


def test_a_few_of_many_evaluations_are_shown():
    assert evenly(3, 6) == [0, 1, 2] and evenly(0, 6) == []
    found = evenly(100, 6)
    assert found[0] == 0 and found[-1] == 99 and len(found) == 6 and np.ptp(np.diff(found)) <= 1
