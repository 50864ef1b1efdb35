"""Whether a run still goes on, for a page that follows it.

A living run holds a file that names its process (`engine/faults/run_lock.py`); a clean end removes it.

What is not covered: telling a killed run from a living one on another host: there only its silence is seen.
"""

from __future__ import annotations

import os
import socket
import time
from typing import NamedTuple

import numpy as np

from versatune_ds.foundations import constants
from versatune_ds.foundations.files import read_json_object
from versatune_ds.observability.progress import duration
from versatune_ds.report.measures import status
from versatune_ds.report.runs import GROWING, RunData

QUIET_S = 120.0
"""Shortest silence that is called standing still."""
QUIET_STEPS = 10
"""It is also longer than so many steps, and the longest evaluation, of the run."""


class State(NamedTuple):
    text: str
    is_over: bool


def state_of(run: RunData) -> State:
    """Running, standing still, ended, or killed; by the clock of this host."""
    holder = read_json_object(run.folder / constants.RUN_HOLDER_FILE)
    how_far = status(run).removesuffix(": running or stopped")
    if not holder:
        return State(f"ended, {how_far}", True)
    if holder.get("host") == socket.gethostname() and not os.path.exists(f"/proc/{holder.get('pid')}"):
        return State(f"killed, {how_far}: process {holder['pid']} is gone and did not end its run", True)
    written = [(run.folder / name).stat().st_mtime for name in GROWING if (run.folder / name).is_file()]
    silent_s = time.time() - max(written, default=time.time())
    step_s, eval_s = (float(np.nanmax(np.append(x[-50:], 0.0))) for x in (run.series["step_s"], run.eval_s))
    if silent_s > max(QUIET_S, QUIET_STEPS * step_s + 2 * eval_s):
        since = time.strftime("%H:%M:%S", time.localtime(max(written)))
        return State(f"stands still, {how_far}: nothing recorded since {since} ({duration(silent_s)})", False)
    return State(f"running, {how_far}", False)
