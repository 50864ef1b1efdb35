"""Balance: every pack to exactly one rank, packs of one micro-step alike, idle time as by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from versatune_ds.data.plan.balance import by_cost, modelled_idle, pack_cost, quadratic_tokens, rank_packs
from versatune_ds.data.plan.packing import Pack
from versatune_ds.foundations.errors import ConfigError

fast = settings(max_examples=60, deadline=None, derandomize=True)


def pack(*lengths: int) -> Pack:
    """A pack of one domain; the sample index tells packs apart."""
    size = len(lengths)
    return Pack(np.zeros(size, np.int32), np.arange(size, dtype=np.int64), np.array(lengths, np.int32))


@fast
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 4))
def test_every_pack_goes_to_exactly_one_rank(world_size: int, num_micro_steps: int) -> None:
    packs = [pack(length + 1) for length in range(world_size * num_micro_steps)]
    dealt = [rank_packs(packs, rank, world_size) for rank in range(world_size)]
    assert all(len(own) == num_micro_steps for own in dealt)
    assert sorted(id(p) for own in dealt for p in own) == sorted(map(id, packs))


def test_packs_of_one_micro_step_are_neighbours_in_cost() -> None:
    packs = by_cost([pack(n) for n in (5, 100, 60, 99, 61, 98, 4, 62)], pack_len=100)
    dealt = [[p.length for p in rank_packs(packs, rank, 2)] for rank in range(2)]
    # Costs fall from 100, 99 | 98, 4 | 5, 62 to 61, 60: a pack of 4 tokens is nearly all padding,
    # which is one long segment of attention. Every second micro-step is dealt in reverse.
    assert dealt == [[100, 4, 5, 60], [99, 98, 62, 61]]


def test_idle_time_by_hand() -> None:
    packs = [pack(100), pack(50, 50), pack(25, 25, 25, 25), pack(20, 20, 20, 20, 20)]
    costs = [100 + 10000 / 200, 100 + 5000 / 200, 100 + 2500 / 200, 100 + 2000 / 200]
    assert [pack_cost(p, 100, 200.0) for p in packs] == costs
    found = [modelled_idle(packs, n, pack_len=100, quadratic_tokens=200.0) for n in (1, 2, 4)]
    expected = [0, 1 - sum(costs) / (2 * (costs[0] + costs[2])), 1 - sum(costs) / (4 * costs[0])]
    assert found == pytest.approx(expected)


def test_order_by_cost_lowers_idle_time() -> None:
    rng = np.random.default_rng(0)
    packs = [pack(n, 1000 - n) for n in rng.integers(1, 1000, 64).tolist()]

    def idle(ordered: tuple[Pack, ...] | list[Pack]) -> float:
        return modelled_idle(ordered, 8, pack_len=1000, quadratic_tokens=500.0)

    assert idle(by_cost(packs, 1000)) < idle(packs) / 4


def test_length_at_which_attention_equals_linear_work() -> None:
    n = quadratic_tokens(6_500_000_000, 28, 3584)
    linear = 2 * 6.5e9 * n
    causal_attention = 28 * sum(2 * 2 * position * 3584 for position in range(int(n)))
    assert causal_attention == pytest.approx(linear, rel=1e-3)


@pytest.mark.parametrize("world_size", [0, 5, 24])
def test_an_uneven_world_size_is_refused_and_the_fitting_ones_named(world_size: int) -> None:
    with pytest.raises(ConfigError, match="use one of 1, 2, 3, 4, 6, 12 ranks"):
        rank_packs([pack(1)] * 12, 0, world_size)


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 does not exist among 2 ranks"):
        rank_packs([pack(1)] * 2, 2, 2)
