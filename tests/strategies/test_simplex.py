"""Projection onto floor, cap, step limit and sum 1: properties over random problems, and cases by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from versatune_ds.foundations.errors import ConfigError
from versatune_ds.strategies.simplex import (
    SUM_TOLERANCE,
    entropy,
    limit_weights,
    normalise,
    project,
    weights_digest,
)

LOOSE = {"min_weight": 0.0, "max_weight": 1.0, "max_relative_change": None}
share = st.floats(0, 1, allow_subnormal=True)


def on_simplex(values: list[float]) -> np.ndarray:
    return normalise(np.array(values) + (sum(values) == 0))


@st.composite
def problems(draw):
    """(proposed, lower, upper) that some weights satisfy: the bounds lie around a point of the simplex."""
    k = draw(st.integers(1, 7))
    vectors = st.lists(share, min_size=k, max_size=k)
    inner = on_simplex(draw(vectors))
    lower = inner * np.array(draw(vectors))
    upper = inner + (1 - inner) * np.array(draw(vectors))
    proposed = np.array(draw(vectors)) * draw(st.sampled_from([1e-200, 1e-3, 1.0, 1e6]))
    return proposed, lower, np.maximum(lower, upper)


@settings(max_examples=300, deadline=None)
@given(problems())
def test_projection_is_feasible_idempotent_and_deterministic(problem):
    proposed, lower, upper = problem
    weights = project(proposed, lower, upper)
    assert abs(math.fsum(weights) - 1) <= SUM_TOLERANCE
    assert (lower <= weights).all() and (weights <= upper).all()
    assert project(weights, lower, upper).tobytes() == weights.tobytes()
    assert project(proposed.copy(), lower, upper).tobytes() == weights.tobytes()


@settings(max_examples=300, deadline=None)
@given(problems())
def test_one_factor_scales_all_domains_inside_their_bounds(problem):
    proposed, lower, upper = problem
    weights = project(proposed, lower, upper)
    shape = proposed / max(proposed.max(), np.finfo(float).tiny)
    for j in np.flatnonzero((weights > lower) & (weights < upper) & (shape > 1e-9)):
        expected = np.clip(weights[j] / shape[j] * shape, lower, upper)
        np.testing.assert_allclose(weights, expected, rtol=1e-6, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(share, min_size=5, max_size=5),
    st.lists(share, min_size=5, max_size=5),
    st.floats(0, 0.2),
    st.floats(0.2, 1),
    st.one_of(st.none(), st.floats(0.01, 3)),
)
def test_limits_hold_together(proposed, previous, floor, cap, change):
    floors = {"min_weight": floor, "max_weight": cap}
    before = limit_weights(on_simplex(previous), on_simplex(previous), **floors, max_relative_change=None)
    after = limit_weights(on_simplex(proposed), before, **floors, max_relative_change=change)
    assert (after >= floor).all() and (after <= cap).all()
    assert abs(math.fsum(after) - 1) <= SUM_TOLERANCE
    if change is not None:
        assert (np.abs(after - before) <= change * before * (1 + 1e-12) + 1e-15).all()


@pytest.mark.parametrize(
    ("proposed", "floor", "cap", "expected"),
    [
        # nothing binds: scaled to sum 1
        ([2.0, 1.0, 1.0], 0.0, 1.0, [0.5, 0.25, 0.25]),
        # the last is lifted to 0.1; 0.9 is left for 0.6 : 0.38, scale 0.9 / 0.98
        ([0.6, 0.38, 0.02], 0.1, 1.0, [0.6 * 0.9 / 0.98, 0.38 * 0.9 / 0.98, 0.1]),
        # the first is cut to 0.5; 0.5 is left for 0.15 : 0.05 = 3 : 1
        ([0.8, 0.15, 0.05], 0.0, 0.5, [0.5, 0.375, 0.125]),
        # all weight on one domain, capped: the zeros share the rest equally
        ([1.0, 0.0, 0.0], 0.0, 0.6, [0.6, 0.2, 0.2]),
        # bounds that leave one point
        ([0.9, 0.05, 0.05], 1 / 3, 1.0, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_floor_and_cap_by_hand(proposed, floor, cap, expected):
    after = project(np.array(proposed), np.full(3, floor), np.full(3, cap))
    np.testing.assert_allclose(after, expected, rtol=1e-14)


def test_step_limit_by_hand():
    # c = 0.5: bounds 0.25..0.75, 0.15..0.45, 0.1..0.3; the first wants 0.9 and gets 0.75,
    # the last would want 0.02 and gets 0.1, the second takes what is left
    after = limit_weights(
        np.array([0.9, 0.08, 0.02]),
        np.array([0.5, 0.3, 0.2]),
        min_weight=0.0,
        max_weight=1.0,
        max_relative_change=0.5,
    )
    np.testing.assert_allclose(after, [0.75, 0.15, 0.1], rtol=1e-14)


def test_solution_with_every_domain_at_a_bound():
    # c = 0.1; the first wants 0 and keeps 0.09, the fourth wants less than 0.36, the others more than their
    # bounds: 0.09 + 0.44 + 0.11 + 0.36 = 1 with no domain left to scale
    after = limit_weights(
        np.array([0.0, 3.0, 2.0, 1.0, 2.0, 4.0]) / 12,
        np.array([0.1, 0.4, 0.1, 0.4, 0.0, 0.0]),
        min_weight=0.0,
        max_weight=1.0,
        max_relative_change=0.1,
    )
    np.testing.assert_allclose(after, [0.09, 0.44, 0.11, 0.36, 0.0, 0.0], rtol=1e-14)


def test_floor_and_cap_win_over_the_step_limit():
    # 0.01 may only grow to 0.011, but the floor is 0.2: the step is measured from the floor
    after = limit_weights(
        np.array([0.99, 0.01]),
        np.array([0.99, 0.01]),
        min_weight=0.2,
        max_weight=1.0,
        max_relative_change=0.1,
    )
    np.testing.assert_allclose(after, [0.8, 0.2], rtol=1e-14)


def test_weights_within_all_limits_are_left_bit_for_bit():
    weights = normalise(np.array([0.1, 0.2, 0.4]))
    assert limit_weights(weights, weights, **LOOSE).tobytes() == weights.tobytes()
    assert normalise(weights).tobytes() == weights.tobytes()


def test_impossible_limits_are_errors():
    with pytest.raises(ConfigError, match=r"lower ones sum to 1\.2"):
        project(np.ones(3), np.full(3, 0.4), np.ones(3))
    with pytest.raises(ConfigError, match=r"upper ones to 0\.6"):
        project(np.ones(3), np.zeros(3), np.full(3, 0.2))
    with pytest.raises(ConfigError, match=r">= 0\.3 and <= 0\.2"):
        project(np.ones(2), np.array([0.3, 0.0]), np.array([0.2, 1.0]))
    with pytest.raises(ValueError, match="nan"):
        project(np.array([np.nan, 1.0]), np.zeros(2), np.ones(2))
    for bad in ([0.0, 0.0], [-1.0, 2.0], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="cannot be weights"):
            normalise(np.array(bad))


def test_entropy_and_digest():
    assert entropy(np.full(4, 0.25)) == pytest.approx(math.log(4))
    assert entropy(np.array([1.0, 0.0])) == 0.0
    weights = np.array([0.5, 0.5, 0.0])
    assert 0 <= weights_digest(weights) < 2**63
    assert weights_digest(weights) == weights_digest(np.array([0.5, 0.5, -0.0]))
    assert weights_digest(weights) != weights_digest(np.array([0.5, np.nextafter(0.5, 1), 0.0]))
