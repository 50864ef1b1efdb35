"""Ranks that train nothing and meet a fault under the heartbeat; a script started by `start_ranks`.

Usage: heartbeat_cases.py FAULT RANK FOLDER: what happens to which rank. Every rank leaves FOLDER/ready_RANK
once it is about to enter the first collective after the fault's. In faults that begin with "nccl" that
collective never returns, as NCCL's when a rank is gone; with "apart" rank 0 has a machine to itself.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from versatune_ds.engine.faults import heartbeat
from versatune_ds.engine.faults.heartbeat import Heartbeat
from versatune_ds.engine.faults.watchdog import mark
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import DataError, VersaTuneError
from versatune_ds.foundations.log import setup_logging

TIMEOUT_S = 12.0
NEVER_S = 3600.0


def sleep_in_the_loader() -> None:
    time.sleep(60)


def main() -> None:
    fault, victim, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    setup_logging()
    is_nccl = fault.startswith("nccl")
    if "apart" in fault:
        heartbeat._machine = lambda: "first" if distributed.rank() == 0 else "second"
    dist.init_process_group("gloo")
    try:
        with Heartbeat(NEVER_S if is_nccl else TIMEOUT_S):
            for step in range(1, 4):
                mark("waiting for data", step)
                if step == 3:
                    time.sleep(5 if fault == "stopped" else 0)  # two beats: the others have read the mark
                    (folder / f"ready_{distributed.rank()}").touch()
                    if distributed.rank() == victim:
                        meet(fault)
                mark("reduction", step)
                if is_nccl and step == 3:
                    threading.Event().wait()
                dist.all_reduce(torch.ones(1))
    except VersaTuneError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    os._exit(0)


def meet(fault: str) -> None:
    if fault == "stuck":
        sleep_in_the_loader()
    elif fault == "stopped":
        time.sleep(4)  # the test stops this process meanwhile
    elif fault == "fails alone":
        raise DataError("this row is bad", path="rows.jsonl", line=7)
    elif fault == "fails alone, unexpectedly":
        raise ZeroDivisionError("division by zero")
    elif fault.endswith("killed"):
        os.kill(os.getpid(), 9)


if __name__ == "__main__":
    main()
