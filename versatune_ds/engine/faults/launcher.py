"""Leaving with the launcher: ranks notice that the process that started them is gone.

DeepSpeed's launcher is two processes, `deepspeed` and `deepspeed.launcher.launch`; neither takes the ranks
along when it is killed, and `deepspeed` does not even do so on SIGTERM. The ranks would train on, unseen, and
hold the GPUs. A thread looks every second whether each launcher is still the parent of what it started. When
one is not, this process gets SIGTERM: a run then saves at the next step boundary and leaves
(`engine/faults/signals.py`), anything else ends at once. What cannot reach a boundary is ended after a while.

What is not covered: processes without such a launcher (a shell that ends is no reason to stop), and srun or
mpirun, which take their tasks along themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from versatune_ds.foundations.constants import EXIT_LAUNCHER_LOST
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

MODULES = ("deepspeed.launcher.launch", "torch.distributed.run")
COMMANDS = ("deepspeed", "ds", "torchrun")
POLL_S = 1.0
GRACE_S = 600.0
"""Time for the running step and its checkpoint; longer than any of them should take."""


class Link(NamedTuple):
    """A process and the launcher that started it."""

    child: psutil.Process
    launcher_pid: int

    def holds(self) -> bool:
        """False once the launcher is gone: its children then have another parent (or are gone too)."""
        try:
            return bool(self.child.ppid() == self.launcher_pid)
        except psutil.NoSuchProcess:
            return False


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is a launcher's: its script, or its module after `-m`."""
    scripts = [Path(argument).name for argument in command[:2]]
    after_m = [command[i + 1] for i, argument in enumerate(command[:-1]) if argument == "-m"][:1]
    return any(script in COMMANDS for script in scripts) or any(module in MODULES for module in after_m)


def launcher_links() -> list[Link]:
    """This process and the launchers above it, nearest first; empty without a launcher."""
    links = []
    child = psutil.Process()
    for ancestor in child.parents():
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or somebody else's: no launcher of ours
            if is_launcher(ancestor.cmdline()):
                links.append(Link(child, ancestor.pid))
                child = ancestor
                continue
        break
    return links


def leave_with_launcher() -> None:
    """Watch the launchers above this process, if there are any, from a thread until the process ends."""
    if links := launcher_links():
        threading.Thread(target=_watch, args=(links,), name="launcher watch", daemon=True).start()


def _watch(links: list[Link]) -> None:
    while all(link.holds() for link in links):
        time.sleep(POLL_S)
    gone = next(link.launcher_pid for link in links if not link.holds())
    log.error(  # on whichever rank it is seen first: that one stops all of them
        "the launcher (process %d) is gone; this run saves at the next step boundary and leaves. Start the "
        "same command to go on",
        gone,
    )
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(EXIT_LAUNCHER_LOST)
