"""Sums on the device equal the plain ones, and a NaN stays where it is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from versatune_ds.domain.statistics import DomainSums
from versatune_ds.engine.statistics import NO_FLAGS, Flags, StepStatistics
from versatune_ds.foundations import distributed

CPU = torch.device("cpu")


def output(losses, tokens):
    return SimpleNamespace(
        sample_loss=torch.tensor(losses, dtype=torch.float64), sample_tokens=torch.tensor(tokens)
    )


def test_sums_equal_the_reference_over_micro_batches():
    generator = np.random.default_rng(0)
    statistics, expected = StepStatistics(4, CPU), DomainSums.zeros(4)
    for size in (5, 1, 0, 17):
        domains = generator.integers(0, 3, size)  # domain 3 stays absent
        losses, tokens = generator.random(size) * 9, generator.integers(0, 5, size)
        losses[tokens == 0] = 0.0
        statistics.add(output(losses, tokens), torch.from_numpy(domains))
        expected += DomainSums.from_samples(domains, losses, tokens, 4)
    totals = statistics.reduce(Flags(stop=True))
    assert totals.flags == Flags(stop=True)
    np.testing.assert_allclose(totals.sums.values, expected.values, rtol=1e-12)
    again = statistics.reduce()
    assert again.flags == Flags() and not again.sums.values.any()  # reduce starts anew


def test_weighted_and_plain_losses_are_told_apart():
    """Two samples of domains 1 and 0, padding behind them; then a pack without weights."""
    statistics = StepStatistics(2, CPU)
    out = output([3.0, 4.0], [2, 1])
    out.token_loss = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0])
    ids, weight = torch.tensor([0, 0, 1, 1, -1]), torch.tensor([0.5, 2.0, 0.25, 0.0, 0.0])
    statistics.add(out, torch.tensor([1, 0]), ids, weight)
    statistics.add(output([5.0], [2]), torch.tensor([0]))
    totals = statistics.reduce()
    assert totals.weighted.tolist() == [[1.0 + 5.0, 4.5], [0.25 + 2.0, 2.5]]
    assert totals.sums.mean_loss().tolist() == [9.0 / 3, 3.0 / 2]
    assert not statistics.reduce().weighted.any()


def test_a_nan_marks_the_step_and_no_other_domain():
    statistics = StepStatistics(2, CPU)
    statistics.add(output([1.0, float("nan"), 3.0], [1, 1, 1]), torch.tensor([0, 1, 0]))
    assert statistics._sums[0, 0] == 4.0
    assert statistics._sums[0, 1].isnan()
    assert statistics.reduce().sums is None
    statistics.add(output([2.0], [1]), torch.tensor([1]))
    assert statistics.reduce().sums.tokens.tolist() == [0.0, 1.0]


def on_three_ranks(monkeypatch, said, losses):
    """What the first of three ranks gets back, each with its flags and one sample's loss."""
    packed = []
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda mine: packed.append(mine) or mine)
    for flags, loss in reversed(list(zip(said, losses, strict=True))):
        statistics = StepStatistics(2, CPU)
        statistics.add(output([loss], [3]), torch.tensor([1]))
        if len(packed) == 2:
            monkeypatch.setattr(distributed, "all_reduce_sum", lambda mine: mine + sum(packed))
        totals = statistics.reduce(flags)
    return totals


@pytest.mark.parametrize("name", Flags._fields)
def test_what_one_rank_says_is_true_for_all_and_nothing_else(monkeypatch, name):
    totals = on_three_ranks(monkeypatch, [NO_FLAGS, Flags(**{name: True}), NO_FLAGS], [1.0, 2.0, 4.0])
    assert totals.flags == Flags(**{name: True})
    assert totals.sums.values[:, 1].tolist() == [7.0, 9.0, 3.0, 21.0, 21.0, 27.0]


def test_a_nan_on_one_rank_is_one_for_all(monkeypatch):
    assert on_three_ranks(monkeypatch, [NO_FLAGS] * 3, [1.0, float("nan"), 4.0]).sums is None


def test_infinite_losses_whose_sums_are_finite_are_found():
    """A sample without a domain here adds nothing to the sums."""
    statistics = StepStatistics(1, CPU)
    statistics.add(output([float("inf"), 1.0], [1, 1]), torch.tensor([5, 0]))
    assert statistics.reduce().sums is None
