"""Where every rank stands, and who is to blame when none moves on: the pure part of the heartbeat.

A rank marks its progress (`mark`) as it goes; a beat carries the last mark. All ranks pass the same marks in
the same order, so their numbers can be compared: where a run stands still, the rank with the lowest number
is the one the others wait for. A rank that does not even beat is stopped, dead or cut off.

Time comes in as seconds between two looks, measured with a monotonic clock by one process: no clocks are
compared across hosts, and a wall clock that jumps changes nothing.

What is not covered: how beats travel and what is done about a verdict (`engine/faults/heartbeat.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from versatune_ds.foundations import constants
from versatune_ds.foundations.text import listed

MAX_LOOK_S = 15.0
"""Most seconds that one look counts for: when the whole job was suspended, nobody is to blame."""
QUIET_S = 3.0
"""A rank that has not beaten for so long (a beat and a half) may be stopped or dead."""
GO_ON = "Start the same command to go on from the newest checkpoint"


class Mark(NamedTuple):
    progress: int = 0
    """Marks passed so far."""
    step: int | None = None
    """Optimizer step from 1; None outside the steps."""
    phase: str = "start"
    is_limited: bool = False
    """Whether staying here too long is a hang. Loading models and writing checkpoints take what they take."""

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


class Failure(NamedTuple):
    """Why a rank leaves, or why the run ends."""

    text: str
    code: int
    ranks: tuple[int, ...]
    """The ranks that are to blame; empty when it cannot be told."""
    is_consequence: bool = False
    """Only another rank's failure made this one fail."""


class Beat(NamedTuple):
    number: int
    """Beats so far."""
    place: Mark
    pid: int
    host: str
    machine: str
    """Tells process tables apart: equal on two ranks that see each other's processes."""
    done: bool = False
    """Left without an error."""
    failure: Failure | None = None
    """Of this rank; on rank 0 possibly the verdict on the whole run."""

    def dumps(self) -> str:
        return json.dumps(self)

    @staticmethod
    def loads(text: str | bytes) -> Beat:
        number, place, pid, host, machine, done, failure = json.loads(text)
        if failure is not None:
            reason, code, ranks, is_consequence = failure
            failure = Failure(reason, code, tuple(ranks), is_consequence)
        return Beat(number, Mark(*place), pid, host, machine, done, failure)


_here = Mark()


def mark(phase: str, step: int | None = None, is_limited: bool = True) -> None:
    """Note that this process has come to `phase` of `step` (from 1). Costs one assignment."""
    global _here
    _here = Mark(_here.progress + 1, step, phase, is_limited)


def here() -> Mark:
    return _here


class Watchdog:
    """Watches the beats of some ranks.

    Args:
        timeout_s: seconds without a beat, or without progress where progress is due, that make a hang.
    """

    def __init__(self, ranks: range, timeout_s: float) -> None:
        self.ranks = ranks
        self.timeout_s = timeout_s
        self.last: dict[int, Beat] = {}
        self.silent_s = dict.fromkeys(ranks, 0.0)
        """Seconds since each rank's last new beat."""
        self.stuck_s = dict.fromkeys(ranks, 0.0)
        """Seconds since each rank's last progress, while progress was due."""

    def look(self, elapsed_s: float, beats: Mapping[int, Beat]) -> None:
        """Take in what is known now, `elapsed_s` after the last look."""
        elapsed_s = min(elapsed_s, MAX_LOOK_S)
        for rank in self.ranks:
            old, new = self.last.get(rank), beats.get(rank, self.last.get(rank))
            if new is None:
                self.silent_s[rank] += elapsed_s
                continue
            is_new = old is None or new.number != old.number
            moved = old is None or new.place.progress != old.place.progress
            self.silent_s[rank] = 0.0 if is_new or new.done else self.silent_s[rank] + elapsed_s
            is_due = new.place.is_limited and not new.done
            self.stuck_s[rank] = self.stuck_s[rank] + elapsed_s if is_due and not moved else 0.0
            self.last[rank] = new

    def silence(self) -> Failure | None:
        """The verdict, once a rank has not beaten for too long."""
        silent = [rank for rank in self.ranks if self.silent_s[rank] >= self.timeout_s]
        if not silent:
            return None
        seen = "; ".join(
            f"{self.name(rank)} gave no sign of life for {self.silent_s[rank]:.0f} s, last seen in "
            f"{self._place(rank)}"
            for rank in silent
        )
        return Failure(
            f"{seen}. It was stopped or killed, or its machine or network is down. {GO_ON}",
            constants.EXIT_HANG,
            tuple(silent),
        )

    def standstill(self) -> Failure | None:
        """The verdict, once the ranks that are behind have made no progress for too long.

        Needs the beats of all ranks. One that is behind and moves is only slow, however long the others wait;
        one that is behind and silent is left to `silence`.
        """
        present = [rank for rank in self.ranks if rank in self.last and not self.last[rank].done]
        lowest = min((self.last[rank].place.progress for rank in present), default=0)
        behind = [rank for rank in present if self.last[rank].place.progress == lowest]
        stuck_s = min((self.stuck_s[rank] for rank in behind), default=0.0)
        if stuck_s < self.timeout_s or any(self.silent_s[rank] > QUIET_S for rank in behind):
            return None
        all_alike = len(behind) == len(present) > 1
        names = listed([self.name(rank) for rank in behind], 3)
        who = f"all {len(behind)} ranks stand" if all_alike else f"{names} stand{'s' * (len(behind) == 1)}"
        waiting = "; the others wait" if len(behind) < len(present) else ""
        return Failure(
            f"no progress for {stuck_s:.0f} s (run.hang_timeout_s): {who} in {self._place(behind[0])}"
            f"{waiting}. The stacks of the threads there are printed beside this message; raise "
            "run.hang_timeout_s if that may take so long",
            constants.EXIT_HANG,
            tuple(behind),
        )

    def name(self, rank: int) -> str:
        """A rank with its process and host, as far as they are known."""
        beat = self.last.get(rank)
        return f"rank {rank}" if beat is None else f"rank {rank} (process {beat.pid} on {beat.host})"

    def _place(self, rank: int) -> str:
        return str(self.last[rank].place) if rank in self.last else "no step yet"
