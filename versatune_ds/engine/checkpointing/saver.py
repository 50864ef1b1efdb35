"""Saving a run: files of one rank, written at once or in the background, and the ranks' agreement about them.

A checkpoint is made in four parts (`engine/checkpointing/folder.py` describes the folder):

    begin     rank 0 makes a hidden folder
    share     every rank writes, syncs and hashes its files, and lists them in a file of its own
    settle    the ranks agree that all shares are written, or that one could not be
    publish   rank 0 merges the lists into the manifest and renames the folder

With `checkpoint.asynchronous` the share is copied to host memory and written by a thread while the run trains
on, if the copies of all ranks of a host fit into what its memory (or control group) has left; else every rank
writes at once, and rank 0 says so. What they take is known before anything is copied: DeepSpeed hands over
its state, which stays as it is until the next step. The ranks then settle at the step boundaries: the
all-reduce of a step carries whether any rank is still writing and whether any has failed, so no thread ever
enters a collective. One checkpoint is in flight at most. A crash meanwhile leaves a hidden folder, which the
next checkpoint removes.

DeepSpeed's own background writer was not taken. `DecoupledCheckpointEngine` (0.19.8) returns from `save`
without a word when its process has died, waits for 300 s at most, and blocks the next optimizer step until
the files are written. Here a `Backend` hands what it wants saved to the `Share`.

What is not covered: page-locked copies, several checkpoints in flight, and folders that ranks do not share.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as safetensors_bytes

from versatune_ds.config.schema import Checkpoint
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.checkpointing import folder as folders
from versatune_ds.engine.checkpointing.due import LossBound, checkpoint_due
from versatune_ds.engine.checkpointing.host_copy import Need, host_bytes, host_copy, hosts_without_room
from versatune_ds.engine.phases import phase
from versatune_ds.engine.statistics import Flags
from versatune_ds.foundations import distributed
from versatune_ds.foundations.constants import CHECKPOINT_STATE_FILE
from versatune_ds.foundations.errors import SaveError, StateError
from versatune_ds.foundations.files import sha256_file, write_json_atomic
from versatune_ds.foundations.host_memory import available_bytes
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

PUBLISHING_PROBLEMS = (OSError, ValueError, StateError)
"""What ends all ranks together where rank 0 alone works: no room, and files that somebody has damaged."""


class Share:
    """One rank's files of one checkpoint after another.

    Nothing here raises: a backend's barriers come after `save`, and a rank that left before them would leave
    the others waiting. The first problem is kept in `problem`, and nothing is written after it.

    Attributes:
        problem: what went wrong with the share in hand, if anything.
    """

    def __init__(self) -> None:
        self.problem: Exception | None = None
        self._folder = Path()
        self._keep = False
        self._kept: list[tuple[Path, Any]] = []
        self._written: dict[str, dict[str, Any]] = {}
        self._thread: threading.Thread | None = None

    def begin(self, folder: Path, keep: bool) -> None:
        """Start a new share in `folder`; `keep`: write nothing before `finish`."""
        self._folder, self._keep = folder, keep
        self.problem, self._kept, self._written, self._thread = None, [], {}, None

    def save(self, content: Any, path: Path) -> None:
        """Write a file of this share (bytes, or anything for torch.save), or keep what it will hold."""
        if self._keep:
            self._kept.append((path, content))
        else:
            self._guarded(lambda: self._write(path, content))

    @property
    def kept_bytes(self) -> int:
        """Host memory that a copy of what is kept would take."""
        return sum(host_bytes(content) for _, content in self._kept)

    def finish(self, in_background: bool) -> None:
        """Write what was kept and the list of files; in the background: copy it, and write in a thread."""
        if in_background:
            self._guarded(self._copy_kept)
            self._thread = threading.Thread(target=self._write_all, name="versatune-checkpoint")
            self._thread.start()
        else:
            self._write_all()

    @property
    def writing(self) -> bool:
        """True while the thread works."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until everything is written, or a problem is known."""
        if self._thread is not None:
            self._thread.join()

    def _copy_kept(self) -> None:
        for i, (path, content) in enumerate(self._kept):
            self._kept[i] = (path, host_copy(content))

    def _write_all(self) -> None:
        while self._kept:
            path, content = self._kept.pop(0)
            self._guarded(lambda path=path, content=content: self._write(path, content))  # type: ignore[misc]
        self._guarded(lambda: write_part(self._folder, self._written))

    def _write(self, path: Path, content: Any) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self._written[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}

    def _guarded(self, action: Callable[[], object]) -> None:
        if self.problem is not None:
            return
        try:
            action()
        except Exception as error:  # torch.save raises RuntimeError when the disk is full
            self.problem = error


def write_part(folder: Path, files: Mapping[str, Any]) -> None:
    """This rank's list of files: the sign that they are written."""
    write_json_atomic(folder / folders.part_name(distributed.rank()), dict(files))


class InFlight(NamedTuple):
    """A checkpoint that has begun."""

    step: int
    folder: Path
    began: float
    stall_s: float
    """How long training stood still for it."""
    in_background: bool = False


class Saver:
    """Decides when to save and does it. Every rank calls every method, in the same order.

    Args:
        folder: the run's checkpoint folder, shared by all ranks.
        settings: when, how, and what to keep.
        newest: step of the checkpoint that the run goes on from; 0: none.
        needed: gives the steps whose checkpoints stay beside those that `settings` keep.
    """

    def __init__(
        self,
        folder: Path,
        settings: Checkpoint,
        backend: Backend,
        clock: Callable[[], float] = time.monotonic,
        newest: int = 0,
        needed: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._folder, self._settings, self._backend, self._clock = folder, settings, backend, clock
        self._share, self._needed = Share(), needed
        self._newest, self._best = newest, dict[str, Any]()
        self._in_flight: InFlight | None = None
        self._problem: SaveError | None = None
        """Publishing failed on rank 0."""
        self._stall_s = 0.0
        minutes = settings.max_lost_minutes
        self._bound = None if minutes is None else LossBound(60 * minutes, clock())
        self._has_logged_bound = False

    # --- at a step boundary ---------------------------------------------------------------------------------

    def flags(self, stop: bool) -> Flags:
        """What this rank has to say at the coming boundary."""
        due = False
        if self._bound is not None:
            now = self._clock()
            self._bound.step_ended(now)
            due = distributed.is_main() and self._in_flight is None and self._bound.due(now)
        writing = self._share.writing  # before `problem`: a thread that ends has set it by then
        failed = self._problem is not None or self._share.problem is not None
        return Flags(stop=stop, save=due, writing=writing, failed=failed)

    def settle(self, agreed: Flags) -> None:
        """After a boundary: publish what all ranks have written.

        Raises:
            SaveError: on all ranks, when one could not write.
        """
        began = self._clock()
        if agreed.failed:
            self._share.wait()
            self._raise_together()
        if self._in_flight is not None and not agreed.writing:
            self._publish()
        self._count_stall(began)

    @property
    def is_periodic(self) -> bool:
        """Whether checkpoints are written by steps or by the clock; the last step then has one."""
        return self._settings.every_n_steps is not None or self._bound is not None

    def due(self, done: int, agreed: Flags, last: bool) -> bool:
        """True when a checkpoint is to be written after `done` steps."""
        due = agreed.stop or agreed.save or checkpoint_due(self._settings, done) or done in self._needed()
        return due or (last and self.is_periodic)

    def take_stall_s(self) -> float:
        """Seconds that training stood still for saving since the last call."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    # --- saving ---------------------------------------------------------------------------------------------

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Save the run after `step` steps; complete when it returns, unless saving is asynchronous.

        Args:
            state: gives our own state, JSON-serialisable, the same on all ranks.

        Raises:
            SaveError: on all ranks, when one could not write.
        """
        with phase("checkpoint", step, is_limited=False):
            self._save(step, state)

    def keep_best(self, note: dict[str, Any], state: Callable[[], dict[str, Any]]) -> None:
        """Keep the checkpoint that `note` is about until another one is better; save it if it is not yet.

        Args:
            note: `EarlyStopping.note` after the evaluation of the parameters in hand.
            state: as for `save`.

        Raises:
            SaveError: on all ranks, when one could not write.
        """
        self._best = note
        if self._newest != note["step"]:
            self.save(note["step"], state)
        elif self._in_flight is None:  # else it is noted when it is complete
            if distributed.is_main():
                try:
                    folders.keep(self._folder, self._settings, note, self._needed())
                except PUBLISHING_PROBLEMS as error:
                    self._problem = SaveError(self._describe(error))
            self._raise_together()

    def finish(self) -> None:
        """Wait until everything is complete.

        Raises:
            SaveError: on all ranks, when one could not write.
        """
        with phase("end of a checkpoint", is_limited=False):
            self._complete()
            self._raise_together()

    def close(self) -> None:
        """Wait for this rank's writer only; after an error there may be no other ranks to agree with."""
        self._share.wait()

    # --- parts ----------------------------------------------------------------------------------------------

    def _save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Complete the last checkpoint, then write this one or hand it over."""
        self._complete()
        self._newest, began = step, self._clock()
        folder = self._folder / folders.unfinished_name(step)
        self._share.begin(folder, keep=self._settings.asynchronous)
        if distributed.is_main():
            self._share._guarded(lambda: folders.begin(self._folder, folder))
        self._in_flight = InFlight(step, folder, began, 0.0)
        self._raise_together()
        self._backend.save(folder, self._share.save)
        self._share.save(
            safetensors_bytes(folders.generator_states()), folder / folders.generator_name(distributed.rank())
        )
        if distributed.is_main():
            self._share._guarded(lambda: self._save_own(folder, step, state()))
        in_background = self._settings.asynchronous and self._have_room()
        self._share.finish(in_background)
        self._count_stall(began)
        self._in_flight = self._in_flight._replace(stall_s=self._clock() - began, in_background=in_background)
        if not in_background:
            self._complete()

    def _have_room(self) -> bool:
        """Whether every host has memory for the copies of its ranks; a collective, the same on all ranks."""
        mine = Need(socket.gethostname(), self._share.kept_bytes, available_bytes())
        lacking = hosts_without_room(distributed.gather_objects(mine))
        if lacking and distributed.is_main():
            log.warning(
                "checkpoint.asynchronous: not enough host memory on %s; this checkpoint is written while "
                "training stands still. More memory, or fewer ranks per node, would let it go on",
                ", ".join(lacking),
            )
        return not lacking

    def _save_own(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        own = {"version": folders.VERSION, "step": step, **state}
        text = json.dumps(own, indent=2, allow_nan=False) + "\n"
        self._share.save(text.encode("utf-8"), folder / CHECKPOINT_STATE_FILE)

    def _complete(self) -> None:
        if self._in_flight is None:
            return
        began = self._clock()
        self._share.wait()
        self._raise_together()
        self._publish()
        self._raise_together()
        self._count_stall(began)

    def _publish(self) -> None:
        """Give the folder its name; a problem is kept for the next agreement."""
        assert self._in_flight is not None
        step, folder, began, stall_s, in_background = self._in_flight
        if distributed.is_main():
            reached = self._clock()
            try:
                ranks, needed = distributed.world_size(), self._needed()
                folders.publish(folder, step, ranks, self._settings, self._best, needed)
            except PUBLISHING_PROBLEMS as error:
                self._problem = SaveError(self._describe(error))
                shutil.rmtree(folder, ignore_errors=True)
                self._in_flight = None
                return
            whole_s = self._clock() - began
            stood_s = stall_s + self._clock() - reached if in_background else whole_s
            log.info("checkpoint %d: training stood still %.2f s, complete in %.2f s", step, stood_s, whole_s)
        self._in_flight = None
        if self._bound is not None:
            now = self._clock()
            self._bound.saved(began, began + stall_s if in_background else now, now)
            self._tell(self._bound)

    def _tell(self, bound: LossBound) -> None:
        """Once, what the bound on lost work means in steps; a warning when it cannot be kept."""
        if self._has_logged_bound or not distributed.is_main():
            return
        self._has_logged_bound = True
        shortest_s = bound.save_s if self._settings.asynchronous else 0.0  # one is in flight at most
        if bound.interval_s <= shortest_s:
            log.warning(
                "checkpoint.max_lost_minutes %.3g cannot be kept: a step takes %.1f s and saving %.1f s; "
                "saving as often as possible",
                bound.limit_s / 60,
                bound.step_s,
                bound.save_s,
            )
        else:
            log.info(
                "checkpoint.max_lost_minutes %.3g: every %d steps or so (a step %.2f s, saving %.2f s)",
                bound.limit_s / 60,
                max(1, int(bound.interval_s / max(bound.step_s, 1e-9))),
                bound.step_s,
                bound.save_s,
            )

    def _raise_together(self) -> None:
        """Raise on all ranks if any has a problem; rank 0 takes away what was not finished."""
        error = self._problem
        if error is None and self._share.problem is not None:
            error = SaveError(self._describe(self._share.problem))
        try:
            distributed.raise_together(error)
        except SaveError:
            if distributed.is_main() and self._in_flight is not None:
                shutil.rmtree(self._in_flight.folder, ignore_errors=True)
            self._in_flight = None
            raise

    def _describe(self, problem: Exception) -> str:
        step = "" if self._in_flight is None else f" after step {self._in_flight.step}"
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        where = self._folder if self._folder.is_dir() else self._folder.parent
        try:
            free = f"{shutil.disk_usage(where).free / 1e9:.2f} GB are free there"
        except OSError as error:
            free = f"it cannot be read: {error.strerror}"
        return (
            f"the checkpoint{step} could not be written by rank {distributed.rank()} into {self._folder}: "
            f"{reason} ({free}). Earlier checkpoints are whole. Make room, then start the same command to go "
            "on from the newest one"
        )

    def _count_stall(self, began: float) -> None:
        now = self._clock()
        self._stall_s += now - began
        if self._bound is not None:
            self._bound.waited(now)
