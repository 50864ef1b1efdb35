"""What is tried next and what is taken."""

import numpy as np
import pytest

from versatune_ds.apps.search.choice import Goal, best, first_of, next_points, predict
from versatune_ds.apps.search.surface import Surface

NAMES = ["law", "code"]
POINTS = np.array([[w, 1 - w] for w in (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)])
BASE = np.array([2.0, 1.0])
CENTRES = [np.array([0.5, 0.5])]


def surfaces(noise: float = 0.0) -> list[Surface]:
    """log(l / b) is -0.2 sqrt(own share), but for given noise."""
    error = noise * np.random.default_rng(0).normal(size=(len(POINTS), 2))
    values = -0.2 * np.sqrt(POINTS) + error
    return [Surface.fit(POINTS, values[:, i], i) for i in range(2)]


def as_is(shares):
    return shares


def test_goals_by_name():
    goal = Goal.of(NAMES, {"code": 0.25, "law": 0.75}, {"code": 0.01}, BASE)
    assert goal.objective.tolist() == [0.75, 0.25]
    assert goal.limits.tolist() == [np.inf, pytest.approx(np.log(1.01))]
    assert goal.value(np.array([2.0, 4.0])) == 0.75 * 2 + 0.25 * 4
    assert Goal.of(NAMES, None, {}, BASE).objective.tolist() == [0.5, 0.5]


def test_predictions_by_hand():
    flat = [Surface(POINTS, np.full(7, v), np.ones(2), 0.5, variance=0.0004) for v in (0.0, np.log(1.1))]
    goal = Goal(np.array([0.75, 0.25]), BASE, np.array([np.inf, np.log(1.05)]))
    place = np.array([[0.5, 0.5]])
    found = predict(flat, goal, place)
    _, error, run_error = flat[0].at(place)
    np.testing.assert_allclose(found.loss, [[2.0, 1.1]])
    assert found.objective[0] == pytest.approx(0.75 * 2 + 0.25 * 1.1)
    wide = 2.446912 * run_error[0]  # Student, 6 degrees of freedom
    np.testing.assert_allclose(found.high, [[2 * np.exp(wide), 1.1 * np.exp(wide)]])
    np.testing.assert_allclose(found.low * found.high, found.loss**2)
    assert found.half_width[0] == pytest.approx(wide * (0.75 * 2 + 0.25 * 1.1))
    assert found.objective_error[0] == pytest.approx(error[0] * (0.75 * 2 + 0.25 * 1.1))
    assert found.over[0] == pytest.approx(np.log(1.1 / 1.05) + wide)
    assert found.over_at_best[0] == pytest.approx(np.log(1.1 / 1.05) - error[0])


@pytest.mark.parametrize(
    ("values", "over", "index"),
    [
        ([3.0, 1.0, 2.0], [-1.0, -1.0, -1.0], 1),
        ([3.0, 1.0, 2.0], [-1.0, 0.1, 0.0], 2),  # the lowest of those that keep the limits
        ([3.0, 1.0, 2.0], [0.3, 0.2, 0.4], 1),  # none does: the least overstepped
    ],
)
def test_the_lowest_within_the_limits(values, over, index):
    assert first_of(np.array(values), np.array(over)) == index


def test_the_best_mixture_is_where_calculus_says():
    # o b (1 - 0.2 sqrt(w) ...) is about lowest where (o_1 b_1 / o_2 b_2)^2 = w_1 / w_2: 4 with o 1/2 each
    goal = Goal.of(NAMES, None, {}, BASE)
    shares, kept = best(surfaces(), goal, CENTRES, as_is, 0)
    assert kept
    # exactly: 2 exp(-0.2 sqrt(w)) + exp(-0.2 sqrt(1 - w))
    w = np.linspace(0, 1, 100_001)
    exact = w[(2 * np.exp(-0.2 * np.sqrt(w)) + np.exp(-0.2 * np.sqrt(1 - w))).argmin()]
    assert shares[0] == pytest.approx(exact, abs=0.03)


def test_a_limit_moves_the_mixture_and_is_kept_by_the_upper_end():
    # code must fall by 12 %: exp(-0.2 sqrt(w)) = 0.88 at w = 0.41; the free optimum has less
    goal = Goal.of(NAMES, None, {"code": -0.12}, BASE)
    free, _ = best(surfaces(), Goal.of(NAMES, None, {}, BASE), CENTRES, as_is, 0)
    shares, kept = best(surfaces(), goal, CENTRES, as_is, 0)
    assert free[1] < 0.3 and shares[1] >= 0.40 and kept
    assert predict(surfaces(), goal, shares[None]).high[0, 1] <= 0.88 * BASE[1] * (1 + 1e-12)


def test_limits_that_cannot_be_kept_are_overstepped_least_and_that_is_said():
    goal = Goal.of(NAMES, None, {"code": -0.5}, BASE)
    shares, kept = best(surfaces(), goal, CENTRES, as_is, 0)
    assert not kept and shares[1] > 0.85


def test_bounds_hold_for_all_that_is_chosen():
    def bounded(shares):
        law = min(shares[0], 0.6)
        return np.array([law, 1 - law])

    goal = Goal.of(NAMES, None, {}, BASE)
    shares, _ = best(surfaces(), goal, CENTRES, bounded, 0)
    points = next_points(surfaces(0.02), goal, CENTRES, 3, bounded, 0)
    assert shares[0] == pytest.approx(0.6, abs=1e-3)
    assert all(point[0] <= 0.6 for point in points)


def test_next_points_are_promising_and_apart():
    goal = Goal.of(NAMES, None, {}, BASE)
    noisy = surfaces(0.02)
    points = next_points(noisy, goal, CENTRES, 4, as_is, 0)
    known = [*POINTS[:, 0], *(point[0] for point in points)]
    assert np.diff(sorted(known)).min() >= 0.02  # the same run again would say the same
    found = predict(noisy, goal, np.stack(points))
    line = np.linspace(0, 1, 201)
    everywhere = predict(noisy, goal, np.stack([line, 1 - line], axis=1))
    allowed = np.abs(line[:, None] - POINTS[:, 0]).min(axis=1) >= 0.02
    reach = found.objective - found.objective_error
    assert reach[0] <= (everywhere.objective - everywhere.objective_error)[allowed].min() + 1e-4
