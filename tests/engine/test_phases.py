"""Phases: what the watchdog sees, and how nested ones share out the time."""

from __future__ import annotations

import pytest

from versatune_ds.engine.faults import watchdog
from versatune_ds.engine.phases import HostClock, Recorder, phase, recording, timed


class Ticks(HostClock):
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self.looks = 0

    def now(self) -> int:
        self.looks += 1
        return self.looks


def test_the_time_of_a_phase_is_with_those_inside_or_without():
    with recording(Recorder(Ticks())) as recorder:
        with phase("forward", 1):  # 1 .. 8
            with timed("loss"), timed("kernel"):  # 2 .. 5, 3 .. 4
                pass
            with timed("loss"):  # 6 .. 7
                pass
        with phase("backward", 1):  # 9 .. 10
            pass
    with phase("forward", 2):
        pass
    assert {name: recorder.seconds(name) for name in ("forward", "loss", "backward", "x")} == {
        "forward": 7,
        "loss": 4,
        "backward": 1,
        "x": 0,
    }
    assert recorder.own_seconds() == {"kernel": 1, "loss": 3, "forward": 3, "backward": 1}


def test_each_recorder_has_a_clock_of_its_own():
    with recording() as outer, recording(Recorder(Ticks())) as inner, phase("forward", 1):
        pass
    assert inner.seconds("forward") == 1 and 0 <= outer.seconds("forward") <= outer.age_s()


def test_a_phase_that_fails_is_over_all_the_same():
    with recording(Recorder(Ticks())) as recorder:
        with pytest.raises(ValueError), phase("a", 1), timed("b"):
            raise ValueError
        with phase("c", 1):
            pass
    assert recorder.own_seconds() == {"b": 1, "a": 2, "c": 1}


def test_the_watchdog_sees_phases_and_not_what_is_only_timed():
    before = watchdog.here().progress
    with phase("forward", 3, "of pack 2 of 4"), timed("loss"):
        here = watchdog.here()
    assert (here.progress - before, str(here), here.is_limited) == (1, "step 3, forward of pack 2 of 4", True)
    with phase("checkpoint", 3, is_limited=False):
        assert str(watchdog.here()) == "step 3, checkpoint" and not watchdog.here().is_limited
