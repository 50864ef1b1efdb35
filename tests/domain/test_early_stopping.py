"""When a run has stopped learning."""

import json
import math

import pytest

from versatune_ds.domain.early_stopping import OVERALL, EarlyStopping, selected_loss


def fed(patience, losses) -> EarlyStopping:
    stopping = EarlyStopping(patience)
    for step, loss in enumerate(losses):
        stopping.observe(step, loss)
    return stopping


@pytest.mark.parametrize(
    ("patience", "losses", "exhausted", "best_step"),
    [
        (2, [3.0, 2.0, 2.1], False, 1),
        (2, [3.0, 2.0, 2.1, 2.0], True, 1),  # equal is not lower
        (2, [3.0, 2.0, 2.1, 1.9, 2.0], False, 3),  # a new best starts the count anew
        (1, [3.0, 3.5], True, 0),
        (2, [math.nan, None, 3.0], False, 2),  # what cannot be measured counts as not lower
        (2, [3.0, math.nan, math.inf], True, 0),
        (None, [1.0] + [2.0] * 50, False, 0),
    ],
)
def test_patience(patience, losses, exhausted, best_step):
    stopping = fed(patience, losses)
    assert (stopping.exhausted, stopping.best_step) == (exhausted, best_step)


@pytest.mark.parametrize(
    ("select", "losses", "expected"),
    [
        (OVERALL, {"a": 1.0, "b": 4.0, "c": None}, 2.0),  # 200 and 100 tokens; c has no held-out data
        ("b", {"a": math.nan, "b": 4.0}, 4.0),
        ({"a": 1.0, "b": 3.0}, {"a": 1.0, "b": 4.0}, 3.25),
        (OVERALL, {"a": 1.0, "b": math.nan}, None),  # not the loss of those that are known
        (OVERALL, {"a": 1.0, "b": None}, None),
        ({"a": 1.0, "b": 3.0}, {"a": math.inf, "b": 4.0}, None),
        ("c", {"a": 1.0, "b": 4.0, "c": None}, None),
    ],
)
def test_what_an_evaluation_is_judged_by(select, losses, expected):
    assert selected_loss(select, losses, {"a": 200, "b": 100, "c": 0}) == expected


def test_the_state_of_another_measure_is_not_taken_over():
    after = EarlyStopping(2, select={"law": 1.0})
    after.load_state(fed(2, [3.0, 2.0]).state())
    assert after == EarlyStopping(2, select={"law": 1.0})
    old = {"best_loss": 2.0, "best_step": 4, "waited": 1}  # before there were others
    stopping = EarlyStopping(2)
    stopping.load_state(old)
    assert (stopping.best_step, stopping.last_step, stopping.waited) == (4, None, 1)


@pytest.mark.parametrize("losses", [[], [None], [3.0, 2.1234567890123456, 2.5]])
def test_state_goes_through_json(losses):
    before, after = fed(2, losses), EarlyStopping(2)
    after.load_state(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert after == before
