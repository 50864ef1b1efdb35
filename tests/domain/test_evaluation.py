"""Comparing two models sample by sample, and the file that holds an evaluation."""

import dataclasses
import json
import math

import numpy as np
import pytest

from versatune_ds.domain.evaluation import BenchmarkScore, ModelEvaluation, compare, compare_scores
from versatune_ds.domain.reference import Fingerprints
from versatune_ds.foundations.errors import ConfigError, DataError


def evaluation(losses, tokens, model="m", **fingerprints) -> ModelEvaluation:
    return ModelEvaluation(
        model=model,
        losses={name: np.array(values, dtype=float) for name, values in losses.items()},
        tokens={name: np.array(values, dtype=float) for name, values in tokens.items()},
        fingerprints=Fingerprints(**fingerprints),
    )


def test_change_by_hand():
    """Sums 10 -> 9: -10 %. Residuals a - 0.9 b: 1.1, -1.4, 0.3; n / (n - 1) * 3.26 / 100."""
    before = evaluation({"law": [1.0, 6.0, 3.0]}, {"law": [2, 4, 4]})
    after = evaluation({"law": [2.0, 4.0, 3.0]}, {"law": [2, 4, 4]})
    (change,) = compare(after, before)
    assert (change.before, change.after) == (1.0, 0.9)
    assert change.relative == pytest.approx(-0.1)
    assert change.stderr == pytest.approx(math.sqrt(1.5 * 3.26) / 10)
    assert change.interval == pytest.approx(
        (-0.1 - 1.959964 * change.stderr, -0.1 + 1.959964 * change.stderr)
    )
    assert change.forgetting == 0.0
    (back,) = compare(before, after)
    assert back.forgetting == pytest.approx(1 / 9)


def test_intervals_hold_what_they_promise():
    """Of 95 % intervals, about 95 in 100 hold the true change; unrelated means would give far wider ones."""
    generator = np.random.default_rng(0)
    held, widths, unpaired = 0, [], []
    for _ in range(400):
        tokens = generator.integers(5, 60, 60).astype(float)
        hardness = generator.gamma(4.0, 0.5, 60)  # what makes a sample hard is the same for both models
        b = tokens * hardness
        a = 1.05 * b * generator.normal(1.0, 0.1, 60)
        old, new = evaluation({"law": b}, {"law": tokens}), evaluation({"law": a}, {"law": tokens})
        (change,) = compare(new, old)
        low, high = change.interval
        held += low <= 0.05 <= high
        widths.append(change.stderr)
        unpaired.append(math.hypot(new.sums.stderr()[0], old.sums.stderr()[0]) / change.before)
    assert 0.92 <= held / 400 <= 0.98
    assert np.mean(widths) < 0.3 * np.mean(unpaired)


def answered(scores, model="m") -> ModelEvaluation:
    """With a score for each sample of law; None: no score."""
    answers = [
        {
            "domain": "law",
            "source": f"law:{i}",
            "reference": "r",
            "answer": "a",
            "score": score,
            "finished": True,
        }
        for i, score in enumerate(scores)
    ]
    return dataclasses.replace(evaluation({"law": [1.0]}, {"law": [1]}, model), answers=tuple(answers))


def test_change_of_scores_by_hand():
    """0, 1, 0.5 -> 1, 1, 0 (the fourth has no score before): differences 1, 0, -0.5 with mean 1/6 and
    variance (25 + 1 + 16) / 36 / 2 = 7/12; its mean has the standard error sqrt(7/12 / 3)."""
    before, after = answered([0.0, 1.0, 0.5, None]), answered([1.0, 1.0, 0.0, 1.0])
    (change,) = compare_scores(after, before)
    assert (change.domain, change.better, change.worse, change.samples) == ("law", 1, 1, 3)
    assert change.before == 0.5 and change.after == pytest.approx(2 / 3)
    assert change.stderr == pytest.approx(math.sqrt(7 / 36))
    margin = 1.959964 * math.sqrt(7 / 36)
    assert change.interval == pytest.approx((1 / 6 - margin, 1 / 6 + margin))
    (alone,) = compare_scores(answered([1.0]), answered([0.0]))
    assert alone.interval is None and alone.after - alone.before == 1.0


def test_scores_of_other_samples_are_not_compared():
    assert compare_scores(answered([1.0]), evaluation({"law": [1.0]}, {"law": [1]})) == []
    assert compare_scores(answered([None]), answered([1.0])) == []
    with pytest.raises(ConfigError, match="b and a were asked other samples"):
        compare_scores(answered([1.0], "b"), answered([1.0, 0.0], "a"))


def test_answers_survive_the_file(tmp_path):
    found = answered([1.0, None])
    found.write(tmp_path / "evaluation.json")
    assert ModelEvaluation.read(tmp_path / "evaluation.json").answers == found.answers
    assert found.scores() == {"law": [1.0]}


def test_one_sample_has_no_interval():
    (change,) = compare(evaluation({"law": [2.0]}, {"law": [2]}), evaluation({"law": [1.0]}, {"law": [2]}))
    assert change.relative == 1.0 and change.stderr is None and change.interval is None


@pytest.mark.parametrize(
    ("losses", "tokens", "prints", "text"),
    [
        ({"law": [1.0]}, {"law": [2]}, {"tokenizer": "b"}, "another tokenizer"),
        ({"law": [1.0]}, {"law": [2]}, {"data": "b"}, "another data"),
        ({"code": [1.0]}, {"code": [2]}, {}, "other samples"),
        ({"law": [1.0, 1.0]}, {"law": [2, 2]}, {}, "other samples"),
    ],
)
def test_what_was_not_measured_on_the_same_tokens_is_not_compared(losses, tokens, prints, text):
    ours = evaluation({"law": [1.0]}, {"law": [2]}, tokenizer="a", data="a")
    with pytest.raises(ConfigError, match=text):
        compare(ours, evaluation(losses, tokens, **prints))


def full() -> ModelEvaluation:
    score = BenchmarkScore("t", "T", "law", "acc", 0.5, None, 4)
    found = evaluation(
        {"law": [1.25, 2.5], "code": [800.0]}, {"law": [1, 3], "code": [1]}, tokenizer="t", data="d"
    )
    return ModelEvaluation(found.model, found.losses, found.tokens, found.fingerprints, (score,), {"x": 1})


def test_file_round_trips_and_can_be_read_by_people(tmp_path):
    path = tmp_path / "evaluation.json"
    full().write(path)
    raw = json.loads(path.read_text())
    assert raw["domains"]["law"] == {
        "loss": 3.75 / 4,
        "stderr": pytest.approx(math.sqrt(2 * ((1.25 - 0.9375) ** 2 + (2.5 - 3 * 0.9375) ** 2)) / 4),
        "perplexity": pytest.approx(math.exp(0.9375)),
        "supervised_tokens": 4,
        "samples": 2,
    }
    assert raw["domains"]["code"]["perplexity"] is None  # exp(800) is no float64
    assert raw["domains"]["code"]["stderr"] is None
    again = ModelEvaluation.read(path)
    assert again.to_json() == full().to_json()
    assert compare(again, full())[0].relative == 0.0


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: "[]", "holds a list"),
        (lambda text: text.replace("versatune_ds.evaluation", "lm_eval"), "format 'lm_eval'"),
        (lambda text: text.replace('"version": 1', '"version": 7'), "version 7"),
        (lambda text: text.replace("sample_losses", "loses"), "damaged"),
        (lambda text: text.replace("[1.25, 2.5]", '["x"]'), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, text):
    path = tmp_path / "evaluation.json"
    full().write(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=text):
        ModelEvaluation.read(path)
    with pytest.raises(DataError, match="no such file; --against"):
        ModelEvaluation.read(tmp_path / "none.json")
