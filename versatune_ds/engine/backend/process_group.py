"""Joining and leaving the process group of a launch.

What is not covered: launchers (`engine/faults/launcher.py`) and lost ranks (`engine/faults/heartbeat.py`).
"""

from __future__ import annotations

import functools
import gc
import os
import socket
import time
import warnings
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from versatune_ds.config.schema import DEFAULT_COLLECTIVE_TIMEOUT_S
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.faults.stale_files import (
    remove_stale_files,
    require_extension_folder,
    shared_memory_buffer,
)
from versatune_ds.engine.model.sequence import SequenceGroup
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError, VersaTuneError
from versatune_ds.foundations.launch import join


def start_process_group(timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S) -> torch.device:
    """Join the process group (alone without a launcher) and return this rank's device.

    What was imported so far is taken out of garbage collection: half a million objects that will stay, and
    each of DeepSpeed's explicit collections, or one in the middle of a step, would go through all of them.

    Args:
        timeout_s: how long ranks wait for each other, here and in every collective.

    Raises:
        VersaTuneError: the ranks do not meet.
    """
    set_only_rank()
    require_extension_folder()
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        if distributed.local_rank() >= accelerator.device_count():
            raise ConfigError(
                f"rank {distributed.rank()} on {socket.gethostname()} has the local rank "
                f"{distributed.local_rank()} and sees {accelerator.device_count()} devices; a node needs one "
                "for each of its ranks, and each must see all (srun: --gpus-per-node, not --gpus-per-task)"
            )
        accelerator.set_device(distributed.local_rank())
        device = torch.device(accelerator.device_name(), distributed.local_rank())
    remove_stale_files()
    gc.freeze()
    # torch 2.13 renames collectives that DeepSpeed 0.19 calls; the hint is for its authors
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
    try:
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(),
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise VersaTuneError(_why_ranks_cannot_meet(str(error).splitlines()[0], timeout_s)) from error
    return device


def _why_ranks_cannot_meet(reason: str, timeout_s: float) -> str:
    """What the first line of torch's error means for the user."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "timed out" in reason.lower():
        return (
            f"not all ranks came to {where} within {timeout_s:g} s (run.collective_timeout_s): {reason} Were "
            "all nodes started, did a rank fail before, and can all nodes reach that address (name, port, "
            "firewall)?"
        )
    return (
        f"the ranks cannot meet at {where}: {reason} Is another run using it? Give "
        "this one its own: deepspeed --master_port PORT ..., or MASTER_PORT=PORT for other launchers."
    )


def sequence_group(ranks: Ranks, timeout_s: float) -> SequenceGroup | None:
    """The ranks that share this rank's packs; None where each has its own. A collective of all ranks."""
    if ranks.sp.size == 1:
        return None
    return SequenceGroup(*ranks.sp, _neighbours(ranks.sp.size, ranks.size, timeout_s)[ranks.dp.rank])


@functools.cache  # a process may hold several models, one after the other
def _neighbours(n: int, ranks: int, timeout_s: float) -> list[Any]:
    """torch's groups of n ranks each; a collective."""
    timeout = timedelta(seconds=timeout_s)
    return [dist.new_group(list(range(first, first + n)), timeout=timeout) for first in range(0, ranks, n)]


def close_process_group() -> None:
    """Leave together, after a run that went well."""
    dist.barrier()
    leave_process_group()


def leave_process_group() -> None:
    """Leave alone, if there is a group to leave.

    Without the pause gloo aborts some runs at exit: DeepSpeed still holds the group.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    _neighbours.cache_clear()
    shared_memory_buffer().unlink(missing_ok=True)
    time.sleep(0.5)


def set_only_rank() -> None:
    """Without any launcher: the environment that one would give to the only rank."""
    join("train", os.environ)
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    only = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(only, MASTER_PORT=str(port))
