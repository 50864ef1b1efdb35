"""Which losses are spikes; whole runs with one are in test_fault_runs.py."""

from __future__ import annotations

import pytest

from versatune_ds.engine.state import MIN_LOSSES, SpikeGuard, is_spike

STEADY = [2.0] * MIN_LOSSES


@pytest.mark.parametrize(
    ("loss", "earlier", "expected"),
    [
        (4.1, STEADY, True),
        (4.0, STEADY, False),
        (4.1, STEADY[1:], False),  # too little is known
        (4.1, [*STEADY, 100.0, 100.0, 100.0], True),  # the median forgets leaps that were let through
        (4.1, [2.0] * 5 + [3.0] * 6, False),
    ],
)
def test_a_spike_is_more_than_the_factor_times_the_median(loss, earlier, expected):
    assert is_spike(loss, earlier, 2.0) == expected


def test_the_guard_knows_the_last_losses_only():
    guard = SpikeGuard(2.0, 10, [1.0] * 10)
    assert guard.is_spike(2.5)
    for _ in range(10):
        guard.observe(2.0)
    assert not guard.is_spike(2.5) and guard.state() == [2.0] * 10


def test_without_a_factor_or_a_loss_nothing_is_a_spike():
    assert not SpikeGuard(None, 10, STEADY).is_spike(1e9)
    guard = SpikeGuard(2.0, 10, STEADY)
    assert not guard.is_spike(None)
    guard.observe(None)
    assert guard.state() == STEADY


def test_the_state_survives():
    guard = SpikeGuard(2.0, 50, STEADY)
    assert SpikeGuard(2.0, 50, guard.state()).is_spike(4.1)
