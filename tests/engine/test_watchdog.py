"""Who is blamed for a standstill, with made-up clocks and beats."""

from __future__ import annotations

import pytest

from versatune_ds.engine.faults.watchdog import MAX_LOOK_S, Beat, Failure, Mark, Watchdog
from versatune_ds.foundations import constants

WAITING = Mark(7, 3, "reduction", True)


def hang(watchdog: Watchdog) -> Failure | None:
    return watchdog.silence() or watchdog.standstill()


def beats(number: int, *places: Mark) -> dict[int, Beat]:
    return {
        rank: Beat(number, place, 100 + rank, f"host{rank}", "machine") for rank, place in enumerate(places)
    }


def watch(
    watchdog: Watchdog, seconds: int, *places: Mark, silent: tuple[int, ...] = (), start: int = 0
) -> None:
    """One look a second at ranks that stay where they are; silent ones give no new beat."""
    for second in range(start + 1, start + seconds + 1):
        found = beats(second, *places)
        watchdog.look(1.0, {rank: beat for rank, beat in found.items() if rank not in silent})


def test_a_beat_survives_its_journey():
    beat = Beat(3, WAITING, 1, "host", "machine", False, Failure("text", 7, (1, 2), True))
    assert Beat.loads(beat.dumps()) == beat


def test_the_rank_with_the_least_progress_is_behind():
    watchdog = Watchdog(range(3), 10)
    places = (WAITING, Mark(5, 3, "waiting for data", True), WAITING)
    watch(watchdog, 10, *places)
    assert hang(watchdog) is None  # the first look only showed where they stand
    watch(watchdog, 1, *places, start=10)
    verdict = hang(watchdog)
    assert verdict.ranks == (1,) and verdict.code == constants.EXIT_HANG
    assert "rank 1 (process 101 on host1) stands in step 3, waiting for data; the others wait" in verdict.text


def test_a_rank_without_beats_is_to_blame_though_it_is_not_behind():
    watchdog = Watchdog(range(3), 10)
    watch(watchdog, 3, WAITING, WAITING, WAITING)
    watch(watchdog, 7, WAITING, WAITING, WAITING, silent=(2,), start=3)
    assert hang(watchdog) is None
    watch(watchdog, 3, WAITING, WAITING, WAITING, silent=(2,), start=10)
    verdict = hang(watchdog)
    assert verdict.ranks == (2,)
    assert "rank 2 (process 102 on host2) gave no sign of life for 10 s" in verdict.text
    assert "last seen in step 3, reduction" in verdict.text


def test_ranks_that_stand_together_are_all_named():
    watchdog = Watchdog(range(2), 10)
    watch(watchdog, 11, WAITING, WAITING)
    verdict = hang(watchdog)
    assert verdict.ranks == (0, 1) and "all 2 ranks stand in step 3, reduction" in verdict.text


def test_a_slow_rank_that_moves_is_no_hang():
    watchdog = Watchdog(range(2), 10)
    for second in range(100):
        slow = Mark(second // 5, 3, "forward and backward of pack 1 of 100", True)
        watchdog.look(1.0, beats(second, WAITING._replace(progress=1000), slow))
        assert hang(watchdog) is None


def test_progress_and_unlimited_phases_are_no_hang():
    watchdog = Watchdog(range(1), 10)
    for second in range(100):
        watchdog.look(1.0, beats(second, Mark(second, 3, "reduction", True)))
    watch(watchdog, 100, Mark(1000, 3, "checkpoint", False), start=100)
    assert hang(watchdog) is None


def test_a_rank_that_is_done_may_be_silent():
    watchdog = Watchdog(range(2), 10)
    for second in range(100):
        rank_0, rank_1 = beats(second, Mark(second, 3, "x", True), WAITING).values()
        watchdog.look(1.0, {0: rank_0, 1: rank_1._replace(number=1, done=True)})
    assert hang(watchdog) is None


@pytest.mark.parametrize("pause_s", [3600.0, 1e9])
def test_a_suspended_job_blames_nobody(pause_s):
    """Ctrl-Z or a scheduler's suspension: the watchdog stood still too, and a look counts for little."""
    watchdog = Watchdog(range(2), 10 + MAX_LOOK_S)
    watch(watchdog, 5, WAITING, WAITING)
    watchdog.look(pause_s, beats(5, WAITING, WAITING))
    assert hang(watchdog) is None


def test_only_time_that_passes_counts(monkeypatch):
    """A wall clock that jumps changes nothing: the heartbeat hands in monotonic seconds only."""
    import time

    monkeypatch.setattr(time, "time", lambda: 4e9)
    watchdog = Watchdog(range(1), 10)
    watch(watchdog, 5, WAITING)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    watch(watchdog, 5, WAITING, start=5)
    assert hang(watchdog) is None


def test_a_rank_that_never_beat_is_named_without_a_process():
    watchdog = Watchdog(range(2), 10)
    for second in range(12):
        watchdog.look(1.0, {0: beats(second, Mark(second, 1, "x", True))[0]})
    assert hang(watchdog).ranks == (1,) and "rank 1 gave no sign" in hang(watchdog).text
