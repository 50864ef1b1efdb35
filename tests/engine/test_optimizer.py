"""The learning rate is a function of the step; decay spares vectors."""

from __future__ import annotations

import math

import pytest
import torch

from versatune_ds.config.schema import Optimizer
from versatune_ds.engine.backend.optimizer import learning_rate, parameter_groups


def rates(steps: int = 11, **settings) -> list[float]:
    return [learning_rate(Optimizer(lr=1.0, **settings), step, steps) for step in range(steps)]


def test_warm_up_rises_linearly_to_the_peak():
    # ceil(0.35 * 11) = 4 steps: 1/4, 2/4, 3/4, 4/4, and the peak again where decay begins
    assert rates(warmup_ratio=0.35)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_goes_from_peak_to_floor():
    values = rates(steps=10, warmup_ratio=0, min_lr_ratio=0.1)
    assert values[0] == 1.0 and values[5] == pytest.approx(0.55)
    assert values == sorted(values, reverse=True)
    assert 0.1 < values[-1] < 0.13  # the floor would be reached one step later: no step is wasted on it


def test_linear_and_constant():
    falling = rates(steps=10, warmup_ratio=0, schedule="linear")
    assert falling == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates(warmup_ratio=0, schedule="constant") == [1.0] * 11


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [("wsd_linear", [1, 0.75, 0.5, 0.25]), ("wsd_sqrt", [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)])],
)
def test_warm_up_stays_and_decays(schedule, decay):
    """2 steps of warm-up, 4 at the peak, then ceil(0.35 * 10) = 4, the first of which is at the peak."""
    values = rates(steps=10, warmup_ratio=0.2, decay_ratio=0.35, schedule=schedule, min_lr_ratio=0.1)
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, *(0.1 + 0.9 * share for share in decay)])
    # where warm-up leaves less than that, decay begins after it
    assert rates(steps=4, warmup_ratio=0.5, decay_ratio=1, schedule="wsd_linear") == [0.5, 1, 1, 0.5]
    assert rates(steps=2, warmup_ratio=1, decay_ratio=1, schedule=schedule) == [0.5, 1]


def test_a_longer_run_is_the_same_until_the_shorter_one_decays():
    short, long = (
        rates(steps=n, warmup_ratio=2 / n, decay_ratio=5 / n, schedule="wsd_sqrt") for n in (20, 40)
    )
    assert short[:16] == long[:16] and short[16] < long[16]


def test_a_decay_of_schedules_without_one_is_refused():
    with pytest.raises(ValueError, match="decay_ratio is of no use: schedule is cosine"):
        Optimizer(decay_ratio=0.1)


def test_one_step_and_all_warm_up_are_defined():
    assert rates(steps=1) == [1.0]
    assert rates(steps=4, warmup_ratio=1.0)[-1] == 1.0


def test_decay_is_for_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    matrices, vectors = parameter_groups(model, 0.1)
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0
