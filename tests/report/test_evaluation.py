"""Tables and chart of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from versatune_ds.domain.evaluation import BenchmarkScore, ModelEvaluation, compare
from versatune_ds.domain.reference import Fingerprints
from versatune_ds.report.evaluation import show


def evaluation(losses, scores=(), **provenance) -> ModelEvaluation:
    return ModelEvaluation(
        model="runs/a/model",
        losses={name: np.array([10.0 * value, 12.0 * value]) for name, value in losses.items()},
        tokens={name: np.array([10.0, 10.0]) for name in losses},
        fingerprints=Fingerprints(),
        benchmarks=tuple(BenchmarkScore(t, t.upper(), "law", "acc", v, 0.1, 5) for t, v in scores),
        provenance=provenance,
    )


NOT_RUN = {"U": "no task"}
AFTER = evaluation({"law": 1.0, "medicine": 2.0, "code": 3.0}, [("t", 0.25)], benchmarks_not_run=NOT_RUN)
BEFORE = evaluation({"law": 2.0, "medicine": 1.6, "code": 3.0}, [("t", 0.5)])


def test_tables_hold_the_numbers(tmp_path):
    picture = tmp_path / "chart.png"
    text = show(AFTER, BEFORE, compare(AFTER, BEFORE), picture)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "law 1.1000 0.1000 3.00 2 20" in lines
    assert "law 2.2000 1.1000 -50.00 % -50.00 .. -50.00 % 0.00 %" in lines
    assert "medicine 1.7600 2.2000 +25.00 % +25.00 .. +25.00 % 25.00 %" in lines
    assert "forgotten: medicine 25.00 %" in lines
    assert "law T acc 0.2500 0.1000 5 0.5000" in lines
    assert "not run: U: no task" in lines
    assert str(picture) in lines
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_nothing_forgotten_is_said(tmp_path):
    assert "forgotten: nothing" in show(AFTER, AFTER, compare(AFTER, AFTER), tmp_path / "x.png")


@pytest.mark.parametrize("losses", [{"law": 1.0}, {"law": 1.0, "code": 2.0}])
def test_two_axes_are_no_radar(tmp_path, losses):
    text = show(evaluation(losses), None, [], tmp_path / "x.png")
    assert "no radar chart" in text and not (tmp_path / "x.png").exists()
