"""Whole training runs on several ranks within one process group; a script started by `launch`.

Usage: train_cases.py CASES.json, a list of {"config": FILE, "overrides": [...], "sabotage": NAME or null}. It
leaves RUN_DIR/outcome_rank_R.json for every case: the error's type and text, or null.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import small_disk
import torch

from versatune_ds.config.load import load_config
from versatune_ds.engine import checkpoint, preflight, sameness, train
from versatune_ds.engine.build import close_process_group, start_process_group
from versatune_ds.engine.model import LossHead
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError, VersaTuneError
from versatune_ds.foundations.log import setup_logging

ORIGINAL_FORWARD, ORIGINAL_RUN_STEP = LossHead.forward, train.run_step
ORIGINAL_MANIFEST = checkpoint._write_manifest
ORIGINAL_HASH, ORIGINAL_CHECK = sameness.folder_hash, preflight.check_file


def nan_in_steps(*steps: int) -> None:
    """In these steps (from 0) the last rank's first sample of each pack has NaN losses."""
    current = {"step": -1}

    def run_step(run, step, stop):
        current["step"] = step
        return ORIGINAL_RUN_STEP(run, step, stop)

    def forward(self, hidden, labels, sample_ids, *args):
        last = distributed.rank() == distributed.world_size() - 1
        if last and current["step"] in steps and self.training:
            hidden = hidden.masked_fill((sample_ids == 0).unsqueeze(-1), float("nan"))
        return ORIGINAL_FORWARD(self, hidden, labels, sample_ids, *args)

    train.run_step, LossHead.forward = run_step, forward


def nan_gradient_from_step(first_step: int) -> None:
    """From this step on (from 0) the last rank's gradient is NaN, while every loss is finite."""
    current = {"step": -1}

    def run_step(run, step, stop):
        current["step"] = step
        return ORIGINAL_RUN_STEP(run, step, stop)

    def forward(self, hidden, *args):
        last = distributed.rank() == distributed.world_size() - 1
        if last and current["step"] >= first_step and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * float("nan"))
        return ORIGINAL_FORWARD(self, hidden, *args)

    train.run_step, LossHead.forward = run_step, forward


def spike_in_steps(*steps: int) -> None:
    """In these steps (from 0) the last rank is so sure of wrong tokens that its losses leap."""
    current = {"step": -1}

    def run_step(run, step, stop):
        current["step"] = step
        return ORIGINAL_RUN_STEP(run, step, stop)

    def forward(self, hidden, *args):
        last = distributed.rank() == distributed.world_size() - 1
        if last and current["step"] in steps and self.training:
            hidden = hidden * 100
        return ORIGINAL_FORWARD(self, hidden, *args)

    train.run_step, LossHead.forward = run_step, forward


def on_the_last_rank(name: str) -> None:
    """The last rank's node has other code, or a damaged copy of a cache."""

    def folder_hash(*args):
        return "0123456789ab"

    def check_file(path, *args, **kwargs):
        raise StateError(f"{path}: damaged")

    if distributed.rank() != distributed.world_size() - 1:
        return
    if name == "other code":
        sameness.folder_hash = folder_hash
    else:
        preflight.check_file = check_file


def full_disk_after_step(step_to_fill: int) -> None:
    """After this step (from 0) the run folder's disk has no byte left, up to its metrics file's last page."""

    def run_step(run, step, stop):
        stopping = ORIGINAL_RUN_STEP(run, step, stop)
        if step == step_to_fill:
            small_disk.fill(run.folder.parent)
        return stopping

    train.run_step = run_step


def no_memory() -> None:
    """The last rank runs out of memory in its first training pass."""

    def forward(self, hidden, *args):
        if distributed.rank() == distributed.world_size() - 1 and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails")
        return ORIGINAL_FORWARD(self, hidden, *args)

    LossHead.forward = forward


def ask_to_stop_in_step(step_to_stop: int) -> None:
    """In this step (from 0) the last rank gets SIGUSR1, in the middle of everything."""

    def run_step(run, step, stop):
        if step == step_to_stop and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return ORIGINAL_RUN_STEP(run, step, stop)

    train.run_step = run_step


def die_in_checkpoint(step: int) -> None:
    """kill -9 of rank 1 while the checkpoint of this step is being written."""

    def write_manifest(folder):
        if distributed.rank() == 1 and folder.name.endswith(f"{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        ORIGINAL_MANIFEST(folder)

    checkpoint._write_manifest = write_manifest


SABOTAGE = {
    None: lambda: None,
    "nan in step 4": lambda: nan_in_steps(4),
    "nan from step 4 on": lambda: nan_in_steps(*range(4, 100)),
    "nan gradient from step 4 on": lambda: nan_gradient_from_step(4),
    "stop in step 4": lambda: ask_to_stop_in_step(4),
    "stop in step 11": lambda: ask_to_stop_in_step(11),
    "spike in step 12": lambda: spike_in_steps(12),
    "spike from step 12 on": lambda: spike_in_steps(*range(12, 100)),
    "no memory": no_memory,
    "other code on the last rank": lambda: on_the_last_rank("other code"),
    "damaged cache on the last rank": lambda: on_the_last_rank("damaged cache"),
    "full disk in step 1": lambda: full_disk_after_step(0),
    "nothing": lambda: None,
    "die in checkpoint 6": lambda: die_in_checkpoint(6),
}


def repair() -> None:
    """Undo any sabotage."""
    LossHead.forward, train.run_step = ORIGINAL_FORWARD, ORIGINAL_RUN_STEP
    checkpoint._write_manifest = ORIGINAL_MANIFEST
    sameness.folder_hash, preflight.check_file = ORIGINAL_HASH, ORIGINAL_CHECK


def main() -> None:
    setup_logging()
    device = start_process_group()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(case["config"], case["overrides"])
        SABOTAGE[case["sabotage"]]()
        outcome = None
        try:
            train.train_in_group(config, device, Path(case["config"]))
        except VersaTuneError as error:  # raised on all ranks alike: the group is still whole
            outcome = {"type": type(error).__name__, "text": str(error)}
        finally:
            repair()
        path = config.run.dir / f"outcome_rank_{distributed.rank()}.json"
        path.write_text(json.dumps(outcome))
        distributed.barrier()
    close_process_group()


if __name__ == "__main__":
    main()
