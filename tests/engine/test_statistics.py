"""Sums on the device equal the plain ones, and a NaN stays where it is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from versatune_ds.domain.statistics import DomainSums
from versatune_ds.engine.statistics import Flags, StepStatistics

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


def test_a_nan_marks_the_step_and_no_other_domain():
    statistics = StepStatistics(2, CPU)
    statistics.add(output([1.0, float("nan"), 3.0], [1, 1, 1]), torch.tensor([0, 1, 0]))
    assert statistics.local_sums()[0, 0] == 4.0
    assert np.isnan(statistics.local_sums()[0, 1])
    assert statistics.reduce().sums is None
    statistics.add(output([2.0], [1]), torch.tensor([1]))
    assert statistics.reduce().sums.tokens.tolist() == [0.0, 1.0]
