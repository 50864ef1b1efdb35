"""The computed permutation: a bijection, the same however it is sliced, different per seed and pass."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from versatune_ds.data.plan import order
from versatune_ds.data.plan.order import Permutation, lookup

fast = settings(max_examples=60, deadline=None, derandomize=True)


def permutation(num_samples: int, seed: int = 0, domain: int = 0, pass_index: int = 0) -> Permutation:
    return Permutation(num_samples, seed=seed, domain=domain, pass_index=pass_index)


@fast
@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 40), st.integers(0, 9))
def test_visits_every_sample_once(num_samples: int, seed: int, domain: int, pass_index: int) -> None:
    visited = permutation(num_samples, seed, domain, pass_index).slice(0, num_samples)
    assert np.array_equal(np.sort(visited), np.arange(num_samples))


@fast
@given(st.data(), st.integers(1, 10**8))
def test_slices_agree_with_each_other(data: st.DataObject, num_samples: int) -> None:
    start = data.draw(st.integers(0, num_samples))
    stop = data.draw(st.integers(start, min(num_samples, start + 300)))
    middle = data.draw(st.integers(start, stop))
    whole = permutation(num_samples).slice(start, stop)
    parts = [permutation(num_samples).slice(start, middle), permutation(num_samples).slice(middle, stop)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_is_the_same_on_every_machine() -> None:
    # Fixed for ever: a resumed run must find the order in which it began.
    found = permutation(1000, seed=7, domain=2, pass_index=1).slice(500, 508)
    assert permutation(8, seed=7).slice(0, 8).tolist() == [4, 0, 6, 7, 2, 5, 3, 1]
    assert found.tolist() == [527, 295, 819, 655, 57, 347, 471, 132]


def test_depends_on_seed_domain_and_pass() -> None:
    orders = [
        permutation(1000, *key).slice(0, 1000)
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10, 0), (0, 1, 10)]
    ]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10  # two random orders agree in one place on average


@pytest.mark.parametrize("num_samples", [3, 4, 64, 1000])
def test_every_sample_is_equally_likely_in_every_place(num_samples: int) -> None:
    repeats, places = 2000, min(num_samples, 20)
    rows = np.array([permutation(num_samples, seed=s).slice(0, places) for s in range(repeats)])
    expected = repeats / num_samples
    for place in range(places):
        counts = np.bincount(rows[:, place], minlength=num_samples)
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        freedom = num_samples - 1
        assert chi_squared < freedom + 6 * np.sqrt(2 * freedom)


def test_all_orders_of_three_samples_occur() -> None:
    seen = Counter(tuple(permutation(3, seed=s).slice(0, 3).tolist()) for s in range(600))
    assert len(seen) == 6 and min(seen.values()) > 60


@pytest.mark.parametrize("block_samples", [1, 7, 4096])
def test_lookup_gives_the_slice_whatever_the_block_size(
    block_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "BLOCK_SAMPLES", block_samples)
    order._block.cache_clear()
    position, found = 0, []
    while position < 50:
        found.append(lookup(50, position, seed=3, domain=1, pass_index=2))
        position += len(found[-1])
    order._block.cache_clear()
    assert np.array_equal(np.concatenate(found), permutation(50, 3, 1, 2).slice(0, 50))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 11)])
def test_a_range_outside_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="do not lie in"):
        permutation(10).slice(start, stop)
