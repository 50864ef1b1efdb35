"""Sums per domain: pooled means, the ratio estimator's standard error, exact JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from versatune_ds.domain.statistics import NUM_ROWS, DomainSums, SumRow
from versatune_ds.foundations.errors import StateError


def test_mean_is_a_ratio_of_sums_and_not_a_mean_of_means():
    # 30 nats on 10 tokens and 10 nats on 90: 40 / 100 = 0.4; the mean of means would be (3 + 1/9) / 2 = 1.56
    sums = DomainSums.from_samples([0, 0], [30.0, 10.0], [10, 90], num_domains=1)
    assert sums.mean_loss()[0] == 0.4
    assert sums.total_loss() == 0.4


def test_stderr_by_hand():
    # l = 40 / 100 = 0.4; residuals 30 - 4 = 26 and 10 - 36 = -26; n / (n - 1) = 2
    # variance = 2 * (26^2 + 26^2) / 100^2 = 2704 / 10000; its root is 0.52
    sums = DomainSums.from_samples([0, 0], [30.0, 10.0], [10, 90], num_domains=1)
    assert sums.stderr()[0] == pytest.approx(0.52, rel=1e-12)


def test_stderr_matches_the_spread_of_many_draws():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        tokens = rng.integers(5, 200, size=50)
        loss = tokens * rng.normal(2.0, 0.5, size=50)
        sums = DomainSums.from_samples(np.zeros(50, int), loss, tokens, 1)
        means.append(sums.mean_loss()[0])
        errors.append(sums.stderr()[0])
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_equal_samples_have_no_error_and_undefined_values_are_nan():
    sums = DomainSums.from_samples([0, 0, 0, 1], [0.3] * 4, [3] * 4, num_domains=3)
    assert sums.stderr()[0] == pytest.approx(0.0, abs=1e-8)
    assert sums.mean_loss()[1] == pytest.approx(0.1) and math.isnan(sums.stderr()[1])
    assert math.isnan(sums.mean_loss()[2]) and math.isnan(sums.stderr()[2])
    assert DomainSums.zeros(2).total_loss() is None


@pytest.mark.parametrize("loss", [0.1 * n for n in range(1, 30)])
def test_rounding_never_makes_a_variance_negative(loss):
    sums = DomainSums.from_samples([0] * 3, [loss * n for n in (3, 7, 11)], [3, 7, 11], 1)
    assert 0 <= sums.stderr()[0] < 1e-7


def test_samples_without_supervision_do_not_count():
    with_empty = DomainSums.from_samples([0, 0, 0], [3.0, 0.0, 5.0], [1, 0, 2], 1)
    assert with_empty == DomainSums.from_samples([0, 0], [3.0, 5.0], [1, 2], 1)
    assert with_empty.samples[0] == 2


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400), st.integers(0, 60)), max_size=20), st.data()
)
def test_any_split_over_ranks_gives_the_same_sums(samples, data):
    columns = [list(column) for column in zip(*samples, strict=True)] or [[], [], []]
    cut = data.draw(st.integers(0, len(samples)))
    whole = DomainSums.from_samples(*columns, num_domains=3)
    parts = [
        DomainSums.from_samples(*(c[part] for c in columns), num_domains=3)
        for part in (slice(cut), slice(cut, None))
    ]
    assert parts[0] + parts[1] == whole


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1e12), min_size=2 * NUM_ROWS, max_size=2 * NUM_ROWS))
def test_json_is_exact(values):
    sums = DomainSums(np.array(values).reshape(NUM_ROWS, 2))
    assert DomainSums.from_json(json.loads(json.dumps(sums.to_json()))) == sums


def test_bad_sums_are_refused():
    with pytest.raises(ValueError, match=r"expected \(6, k\)"):
        DomainSums(np.zeros((2, 6)))
    values = np.zeros((NUM_ROWS, 2))
    values[SumRow.LOSS_SUM, 1] = np.nan
    with pytest.raises(ValueError, match=r"LOSS_SUM of domain id 1 is nan.*must be skipped"):
        DomainSums(values)
    with pytest.raises(ValueError, match="negative"):
        DomainSums(-np.ones((NUM_ROWS, 2)))
    with pytest.raises(ValueError, match="domain ids"):
        DomainSums.from_samples([2], [1.0], [1], num_domains=2)
    state = DomainSums.zeros(2).to_json()
    with pytest.raises(StateError, match="rows"):
        DomainSums.from_json({k: v for k, v in state.items() if k != "tokens"})
    with pytest.raises(StateError, match="cannot be read"):
        DomainSums.from_json({**state, "tokens": [0.0]})


def test_sums_cannot_be_changed_from_outside():
    buffer = np.zeros((NUM_ROWS, 1))
    sums = DomainSums(buffer)
    buffer[SumRow.TOKENS] = 7
    assert sums.tokens[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        sums.values[0, 0] = 1
