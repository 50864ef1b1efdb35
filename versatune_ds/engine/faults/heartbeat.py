"""Signs of life of all ranks, outside the collectives: hangs end, and a lost rank is named.

Every rank has a thread that writes a beat into the store of the process group (TCP, works across nodes; a
connection of its own) every two seconds. Rank 0 reads all beats and judges (`engine/faults/watchdog.py`); its
own beat carries the verdict back. The other ranks watch rank 0. So a run ends, with a text that says why,

- when a rank is silent, or makes no progress, for `run.hang_timeout_s`: each rank to blame prints its Python
  stacks, and the processes end with code 7, because the main threads may wait in a collective for ever;
- when a rank fails alone: it posts its error before it leaves, and the others end with that error instead of
  a broken connection or a silent wait;
- when a rank is killed: the broken connection is translated into the rank, its process and its host. Where a
  collective blocks instead of failing (NCCL), the ranks of its machine see in the process table that it is
  gone, and say so after `DEAD_S`.

The thread sleeps, reads a variable and sends some hundred bytes; nothing waits for the device.

Only a process table can tell a dead rank from one that is stopped, swapped out or cut off for a while, and
only its own machine has it. So a machine that is lost as a whole, or whose only rank was killed, is silent,
and ends the run after `run.hang_timeout_s`, unless NCCL's own network fails first.

What is not covered: the time before training starts (models load as long as they load; a silent rank is
noticed all the same), and a rank 0 that is cut off from some ranks only.
"""

from __future__ import annotations

import faulthandler
import itertools
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import torch.distributed as dist

from versatune_ds.engine.faults.stale_files import shared_memory_buffer
from versatune_ds.engine.faults.watchdog import GO_ON, QUIET_S, Beat, Failure, Watchdog, here
from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import PeerLostError, VersaTuneError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

BEAT_S = 2.0
FOLLOW_S = 10.0
"""Time that the main thread gets to fail by itself once the run's end is known."""
DEAD_S = 10.0
"""Time from when a rank's process is seen to be gone to the verdict: its last beat may still be under way,
and a collective that fails leads to the cause by itself. The machine's other ranks alone can see it, and
launchers kill them 30 s after they have asked them to end."""
SEARCH_S = 8.0
"""Time to find out which rank is lost; a living one beats several times meanwhile."""
RECEIPTS_S = 3 * BEAT_S
POLL_S = 0.2
_runs = itertools.count()


class Board:
    """The beats of the ranks, written and read by a thread of its own.

    An answer of the store may never come: when rank 0 is stopped, its store is too. So nobody but this thread
    speaks with the store; the others see `beats` as they were when it last answered.

    Attributes:
        mates: the first beats of the other ranks on this machine.
    """

    def __init__(self, watched: range) -> None:
        self.watched = set(watched)
        self.mates: dict[int, Beat] = {}
        self.beats: dict[int, Beat] = {}
        """The newest known beats."""
        self.reads = 0
        """How often the store has answered."""
        self.is_lost = False
        """The store is gone, and with it rank 0."""
        self.mine = Beat(0, here(), os.getpid(), socket.gethostname(), _machine())
        self.pause_s = BEAT_S
        self._prefix = f"versatune/{next(_runs)}/beat/"
        self._store: dist.TCPStore | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep, name="heartbeat", daemon=True)

    def open(self) -> None:
        """Connect and start beating; a collective."""
        if distributed.world_size() > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
            self._exchange_mine()
            first = distributed.gather_objects(self.mine)  # from here on every rank's beat can be read
            machine, own = self.mine.machine, distributed.rank()
            self.mates = {r: beat for r, beat in enumerate(first) if r != own and beat.machine == machine}
        self._read()
        self._thread.start()

    def report(self, done: bool = False, failure: Failure | None = None) -> None:
        """Put something into this rank's next beat, which comes at once; what was reported first stays."""
        self.mine = self.mine._replace(done=done or self.mine.done, failure=self.mine.failure or failure)
        self._wake.set()

    def hurry(self) -> None:
        """Beat and read many times a second from now on."""
        self.pause_s = POLL_S
        self._wake.set()

    def close(self) -> None:
        """Send the last report and stop beating."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=BEAT_S)  # it may wait for a dead store; it is a daemon

    def _keep(self) -> None:
        is_last = False
        while not is_last and not self.is_lost:
            is_last = self._closed.is_set()
            self._wake.clear()
            try:
                self._exchange_mine()
                if not is_last:
                    self._read()
            except dist.DistNetworkError:
                self.is_lost = True
            if not self._closed.is_set():
                self._wake.wait(self.pause_s)

    def _exchange_mine(self) -> None:
        self.mine = self.mine._replace(number=self.mine.number + 1, place=here())
        if self._store is not None:
            self._store.set(f"{self._prefix}{distributed.rank()}", self.mine.dumps())

    def _read(self) -> None:
        if self._store is None:
            self.beats = {0: self.mine}
        else:
            ranks = sorted(self.watched)
            texts = self._store.multi_get([f"{self._prefix}{rank}" for rank in ranks])
            self.beats = {rank: Beat.loads(text) for rank, text in zip(ranks, texts, strict=True)}
        self.reads += 1


class Heartbeat:
    """The heartbeat of one run, as a context manager; every rank enters and leaves.

    Args:
        timeout_s: `run.hang_timeout_s`; None: hangs are not ended, lost ranks still named.

    Raises:
        PeerLostError: on leaving, in place of an error of a collective.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        watched = range(self._world_size) if self._rank == 0 else range(1)
        self._board = Board(watched)
        self._watchdog = Watchdog(watched, math.inf if timeout_s is None else timeout_s)
        self._looked = time.monotonic()
        self._found_dead: dict[int, tuple[float, int]] = {}
        """Ranks of this machine without a process: when that was seen, and the board's reads until then."""
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._board.open()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._leaving.set()
        self._thread.join()
        try:
            if error is not None:
                self._leave_with(error)
            self._board.report(done=True)
        finally:
            self._board.close()

    def _leave_with(self, error: BaseException) -> None:
        """Tell the others why, or find out from them."""
        if self._world_size == 1:
            return
        if is_lost_connection(error):
            failure = self._find_cause(error)
            raise PeerLostError(failure.text, failure.ranks, failure.code) from error
        text = str(error) if isinstance(error, VersaTuneError) else f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", constants.EXIT_FAILURE)
        text = f"rank {self._rank} (process {os.getpid()} on {self._board.mine.host}) failed: {text}"
        self._board.report(failure=Failure(text, code, (self._rank,)))
        self._await_receipts()

    # --- the thread -----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._leaving.wait(BEAT_S):
            self._look()
            failure = self._known_failure() or self._watchdog.silence()
            if failure is None and self._rank == 0:
                failure = self._watchdog.standstill()
            if failure is None and (failure := self._dead_mate()) is not None:
                self._board.report(failure=failure)  # rank 0 may be elsewhere and not see it
            if failure is not None:
                self._end(failure)

    def _look(self) -> None:
        now = time.monotonic()
        self._watchdog.look(now - self._looked, self._board.beats)
        self._looked = now

    def _end(self, failure: Failure) -> None:
        """End this process, unless its main thread comes to an end by itself."""
        speaks = self._rank == 0 or 0 in failure.ranks
        is_hang = failure.code == constants.EXIT_HANG
        if is_hang and speaks:
            log.error("%s", failure.text)
        if is_hang and self._rank in failure.ranks:
            sys.stderr.write(f"rank {self._rank} stands in {here()}; the stacks of its threads:\n")
            sys.stderr.flush()
            faulthandler.dump_traceback(all_threads=True)
        # from rank 0 this is the verdict, from the others the receipt that it waits for
        self._board.report(failure=failure._replace(is_consequence=self._rank != 0))
        if is_hang:
            self._await_receipts()
        elif self._leaving.wait(FOLLOW_S):
            return
        elif speaks:
            log.error("%s", failure.text)
        shared_memory_buffer().unlink(missing_ok=True)
        sys.stderr.flush()
        os._exit(failure.code)

    # --- who is lost ----------------------------------------------------------------------------------------

    def _find_cause(self, error: BaseException) -> Failure:
        """Whose end broke the connection: asks the board, and this machine's process table."""
        own = Failure(first_line(error), constants.EXIT_PEER_LOST, (), is_consequence=True)
        self._board.hurry()
        if self._rank != 0:  # rank 0 has its verdict to report
            self._board.report(failure=own)
        started, reads = time.monotonic(), self._board.reads
        found: Failure | None = None
        while found is None and time.monotonic() - started < SEARCH_S:
            self._look()
            found = self._known_failure()
            if found is None and self._board.reads > reads + 1:  # what a dead rank said last has been read
                found = self._dead_process()
            if found is None:
                time.sleep(POLL_S)
        found = found or self._dead_process() or self._silent_rank()
        if found is None:
            found = own._replace(
                text=f"the connection to another rank was lost in {here()}, and it cannot be told which one: "
                f"{own.text} Look at the output of the other ranks. {GO_ON}",
                is_consequence=False,
            )
        self._board.report(failure=found)
        self._await_receipts()
        return found

    def _known_failure(self) -> Failure | None:
        """What another rank has posted, or the loss of rank 0, without which nothing can be posted."""
        posted = [beat.failure for beat in self._watchdog.last.values() if beat.failure is not None]
        for failure in posted:
            if not failure.is_consequence:
                return failure
        if self._board.is_lost:
            return self._dead_process() or self._lost(0, "its store does not answer any more")
        return None

    def _dead_process(self) -> Failure | None:
        """A rank whose process on this machine died without a word."""
        for rank, beat in self._watchdog.last.items():
            silent = not beat.done and beat.failure is None
            if silent and beat.machine == self._board.mine.machine and not _is_alive(beat.pid):
                return self._lost(rank, "its process was killed")
        return None

    def _dead_mate(self) -> Failure | None:
        """A rank of this machine whose process has been gone for `DEAD_S` and that has not said why."""
        now = time.monotonic()
        for rank, first_beat in self._board.mates.items():
            if _is_alive(first_beat.pid):
                continue
            seen, reads = self._found_dead.setdefault(rank, (now, self._board.reads))
            self._board.watched.add(rank)
            if now - seen < DEAD_S or self._board.reads < reads + 2:  # one read may have been under way
                continue
            beat = self._watchdog.last[rank] = self._board.beats[rank]
            if not beat.done and beat.failure is None:
                return self._lost(rank, "its process was killed")
        return None

    def _silent_rank(self) -> Failure | None:
        silent = [rank for rank, seconds in self._watchdog.silent_s.items() if seconds > QUIET_S]
        return self._lost(silent[0], "it gives no sign of life") if silent else None

    def _lost(self, rank: int, how: str) -> Failure:
        beat = self._watchdog.last.get(rank)
        where = "" if beat is None else f" (last seen in {beat.place})"
        return Failure(
            f"{self._watchdog.name(rank)} is gone: {how}{where}. Look at its last output and at the system "
            f"log (the kernel kills what needs more memory than there is). {GO_ON}",
            constants.EXIT_PEER_LOST,
            (rank,),
        )

    def _await_receipts(self) -> None:
        """Rank 0 takes the store along when it leaves: let the others read why first."""
        if self._rank != 0:
            return
        self._board.hurry()
        started = time.monotonic()
        while time.monotonic() - started < RECEIPTS_S:
            others = [beat for rank, beat in self._board.beats.items() if rank != 0]
            if all(beat.done or beat.failure for beat in others):
                return
            time.sleep(POLL_S)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that a collective broke; gloo raises plain RuntimeErrors.

    Of several collectives under way, the first to time out names gloo's source file; the others do not.
    """
    is_gloo = any(words in str(error) for words in ("gloo", "Application timeout caused pair closure"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and is_gloo)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, as a sentence."""
    return str(error).strip().split("\n")[0].rstrip(".") + "."


def _machine() -> str:
    """The same on two ranks that see each other's processes: one boot, one process name space."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"  # not Linux: only itself


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
