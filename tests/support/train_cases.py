"""Whole training runs on several ranks within one process group; a script started by `launch`.

Usage: train_cases.py CASES.json, a list of {"config": FILE, "overrides": [...], "sabotage": NAME or null,
"dump": [STEPS DONE, ...]}. It leaves RUN_DIR/outcome_rank_R.json for every case: the error's type and text,
or null; and for every step in `dump` that the run trains to or begins with, all weights and moments:
RUN_DIR/whole_STEP_trained.safetensors or whole_STEP_loaded.safetensors.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file

from versatune_ds.config.load import load_config
from versatune_ds.engine import checkpoint, train
from versatune_ds.engine.build import close_process_group, start_process_group
from versatune_ds.engine.export import _gathered_parameters
from versatune_ds.engine.model import LossHead
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import VersaTuneError
from versatune_ds.foundations.log import setup_logging

ORIGINAL_FORWARD, ORIGINAL_RUN_STEP = LossHead.forward, train.run_step
ORIGINAL_RUN_STEPS = train.run_steps
ORIGINAL_MANIFEST = checkpoint._write_manifest


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


def dump_at(steps: list[int]) -> None:
    """Write the whole state at these steps, be it trained to or loaded."""
    original = train.run_step

    def run_step(run, step, stop):
        result = original(run, step, stop)
        if step + 1 in steps:
            dump(run, step + 1, "trained")
        return result

    def run_steps(run, stop):
        if run.first_step in steps:
            dump(run, run.first_step, "loaded")
        return ORIGINAL_RUN_STEPS(run, stop)

    train.run_step, train.run_steps = run_step, run_steps


def dump(run, done: int, how: str) -> None:
    """Gather fp32 weights, bf16/fp32 model weights and moments; AdamW's counters; hyperparameters."""
    live = run.engine.deepspeed
    if hasattr(live.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # stages 1 and 2 link moments in their first step
        live.optimizer._lazy_init_hp_params_optimizer_state()
    whole = {}
    for parameter, name in live.param_names.items():
        whole[f"fp32.{name}"] = safe_get_full_fp32_param(parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            whole[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind)
    for name, parameter in _gathered_parameters(run.engine.model):
        whole[f"model.{name}"] = parameter.detach()
    steps = {float(state["step"]) for state in live.optimizer.optimizer.state.values()}
    whole["steps"] = torch.tensor(sorted(steps))
    whole["decay"] = torch.tensor([g["weight_decay"] for g in live.optimizer.optimizer.param_groups])
    if distributed.is_main():
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.items()}
        save_file(whole, run.folder / f"whole_{done}_{how}.safetensors")


SABOTAGE = {
    None: lambda: None,
    "nan in step 4": lambda: nan_in_steps(4),
    "nan from step 4 on": lambda: nan_in_steps(*range(4, 100)),
    "nan gradient from step 4 on": lambda: nan_gradient_from_step(4),
    "stop in step 4": lambda: ask_to_stop_in_step(4),
    "stop in step 3": lambda: ask_to_stop_in_step(3),
    "die in checkpoint 6": lambda: die_in_checkpoint(6),
}


def repair() -> None:
    """Undo any sabotage."""
    LossHead.forward, train.run_step = ORIGINAL_FORWARD, ORIGINAL_RUN_STEP
    train.run_steps = ORIGINAL_RUN_STEPS
    checkpoint._write_manifest = ORIGINAL_MANIFEST


def main(cases: Path) -> None:
    """Run the cases of a file, one after the other, within one process group."""
    setup_logging()
    device = start_process_group()
    for case in json.loads(cases.read_text()):
        config = load_config(case["config"], case["overrides"])
        SABOTAGE[case["sabotage"]]()
        dump_at(case.get("dump", []))
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
    main(Path(sys.argv[1]))
