"""When a run has stopped learning."""

import json
import math

import pytest

from versatune_ds.domain.early_stopping import EarlyStopping


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


@pytest.mark.parametrize("losses", [[], [None], [3.0, 2.1234567890123456, 2.5]])
def test_state_goes_through_json(losses):
    before, after = fed(2, losses), EarlyStopping(2)
    after.load_state(json.loads(json.dumps(before.state(), allow_nan=False)))
    assert after == before
