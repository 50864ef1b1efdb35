"""Whole training runs on several ranks within one process group; a script started by `launch`.

Usage: train_cases.py CASES.json, a list of {"config": FILE, "overrides": [...], "sabotage": NAME or null,
"dump": [STEPS DONE, ...], "folder": WHERE TO WORK}; the last two may be left out. It leaves
RUN_DIR/outcome_rank_R.json for every case: the error's type and text, or null; and for every step in `dump`
that the run trains to or begins with, all weights and moments: RUN_DIR/whole_STEP_trained.safetensors or
whole_STEP_loaded.safetensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import small_disk
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file

from versatune_ds.config.load import load_config
from versatune_ds.data.plan.balance import rank_packs
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.early_stopping import EarlyStopping
from versatune_ds.engine import train
from versatune_ds.engine.backend import deepspeed_backend
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.checkpointing import folder as checkpoint
from versatune_ds.engine.checkpointing import hf_export as export
from versatune_ds.engine.checkpointing import saver as saving
from versatune_ds.engine.checkpointing.hf_export import NAME_PREFIX
from versatune_ds.engine.model.packed_lm import LossHead
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.preflight import consistency
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError, VersaTuneError
from versatune_ds.foundations.log import setup_logging

ORIGINAL_FORWARD, ORIGINAL_RUN_STEP = LossHead.forward, train.run_step
ORIGINAL_HASH, ORIGINAL_CHECK = consistency.folder_hash, preflight.check_file
ORIGINAL_RUN_STEPS, ORIGINAL_ACCUMULATE = train.run_steps, train.accumulate
ORIGINAL_PART, ORIGINAL_BEGIN, ORIGINAL_WRITE = saving.write_part, saving.Share.begin, saving.Share._write
ORIGINAL_PUBLISH, ORIGINAL_FLUSH = checkpoint.publish, export.ShardWriter._flush
ORIGINAL_BUILD, ORIGINAL_AVAILABLE = deepspeed_backend.build_model, saving.available_bytes
ORIGINAL_UPDATE = WeightController.update
ORIGINAL_OBSERVE = EarlyStopping.observe
UNLIMITED = resource.RLIM_INFINITY
LAST_STEP = 5
"""Index of the last step of runs that write slowly."""


def disturb_hidden(change) -> None:
    """On the last rank, the head is given change(step, head, hidden, sample_ids) as its hidden states."""
    current = {"step": -1}

    def run_step(run, step, stop):
        current["step"] = step
        return ORIGINAL_RUN_STEP(run, step, stop)

    def forward(self, hidden, labels, sample_ids, *args):
        if distributed.rank() == distributed.world_size() - 1:
            hidden = change(current["step"], self, hidden, sample_ids)
        return ORIGINAL_FORWARD(self, hidden, labels, sample_ids, *args)

    train.run_step, LossHead.forward = run_step, forward


def nan_in_steps(*steps: int) -> None:
    """In these steps (from 0) the last rank's first sample of each pack has NaN losses."""

    def change(step, head, hidden, sample_ids):
        is_hit = step in steps and head.training
        return hidden.masked_fill((sample_ids == 0).unsqueeze(-1), float("nan")) if is_hit else hidden

    disturb_hidden(change)


def nan_gradient_from_step(first_step: int) -> None:
    """From this step on (from 0) the last rank's gradient is NaN, while every loss is finite."""

    def change(step, head, hidden, sample_ids):
        if step >= first_step and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * float("nan"))
        return hidden

    disturb_hidden(change)


def spike_in_steps(*steps: int) -> None:
    """In these steps (from 0) the last rank is so sure of wrong tokens that its losses leap."""
    disturb_hidden(lambda step, head, hidden, _: hidden * 100 if step in steps and head.training else hidden)


def other_weights() -> None:
    """On the last rank the first update gives the first domain a weight one bit larger."""

    def update(self, *args):
        record = ORIGINAL_UPDATE(self, *args)
        if distributed.rank() == distributed.world_size() - 1:
            self._weights[0] = np.nextafter(self._weights[0], 1)
        return record

    WeightController.update = update


def on_the_last_rank(name: str) -> None:
    """The last rank's node has other code, or a damaged copy of a cache."""

    def folder_hash(*args):
        return "0123456789ab"

    def check_file(path, *args, **kwargs):
        raise StateError(f"{path}: damaged")

    if distributed.rank() != distributed.world_size() - 1:
        return
    if name == "other code":
        consistency.folder_hash = folder_hash
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


def no_memory_left(step_to_fail: int) -> None:
    """In this step (from 0) more memory is asked for than any device has."""

    def change(step, head, hidden, sample_ids):
        if step == step_to_fail and head.training:
            torch.empty(1 << 58, device=hidden.device)
        return hidden

    disturb_hidden(change)


def bad_label(step_to_fail: int) -> None:
    """In this step (from 0) a label is not in the vocabulary."""
    current = {"step": -1}

    def run_step(run, step, stop):
        current["step"] = step
        return ORIGINAL_RUN_STEP(run, step, stop)

    def forward(self, hidden, labels, *args):
        if current["step"] == step_to_fail and self.training:
            labels = labels.clone()
            labels[(labels >= 0).nonzero()[0]] = 10**6
        return ORIGINAL_FORWARD(self, hidden, labels, *args)

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

    def write_part(folder, files):
        if distributed.rank() == 1 and folder.name.endswith(f"{step:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        ORIGINAL_PART(folder, files)

    saving.write_part = write_part


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
    live = run.backend.live
    if hasattr(live.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # stages 1 and 2 link moments once, in their first step, before AdamW has made any
        live.optimizer._hp_optimizer_states_linked = False
        live.optimizer._lazy_init_hp_params_optimizer_state()
    whole = {}
    trained = [(p, name) for p, name in live.param_names.items() if p.requires_grad]
    for parameter, name in trained:
        whole[f"fp32.{name}"] = safe_get_full_fp32_param(parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            whole[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind)
    for name, parameter in run.backend.parameters():
        whole[f"model.{name.removeprefix(NAME_PREFIX)}"] = parameter.detach()
    steps = {float(state["step"]) for state in live.optimizer.optimizer.state.values()}
    whole["steps"] = torch.tensor(sorted(steps))
    whole["decay"] = torch.tensor([g["weight_decay"] for g in live.optimizer.optimizer.param_groups])
    if distributed.is_main():
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in whole.items()}
        save_file(whole, run.folder / f"whole_{done}_{how}.safetensors")


def fail_to_write(step: int) -> None:
    """The last rank's files of this checkpoint cannot grow beyond 4 kB, as on a full disk."""

    def begin(self, folder, keep):
        if distributed.rank() == distributed.world_size() - 1 and folder.name.endswith(f"{step:08d}"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, UNLIMITED))
        ORIGINAL_BEGIN(self, folder, keep)

    saving.Share.begin = begin


def fail_to_publish(step: int) -> None:
    """The disk is full when rank 0 wants to make this checkpoint visible."""

    def publish(folder, done, *args):
        if done == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return ORIGINAL_PUBLISH(folder, done, *args)

    checkpoint.publish = publish


def fail_to_export() -> None:
    """The disk is full when rank 0 writes the second shard of the finished model."""

    def flush(self):
        if self._names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ORIGINAL_FLUSH(self)

    export.ShardWriter._flush = flush


def freeze_two() -> None:
    """A matrix and a vector of the model are not trained."""

    def build_model(*args):
        model = ORIGINAL_BUILD(*args)
        for name in ("lm.model.layers.0.mlp.up_proj.weight", "lm.model.norm.weight"):
            model.get_parameter(name).requires_grad_(False)
        return model

    deepspeed_backend.build_model = build_model


def write_slowly() -> None:
    """Files of a checkpoint are written in the background when one more step has been trained."""
    current = {"step": 0}

    def run_step(run, step, stop):
        current["step"] = step
        return ORIGINAL_RUN_STEP(run, step, stop)

    def write(self, path, content):
        while threading.current_thread() is not threading.main_thread() and current["step"] < min(
            int(path.parent.name[-8:]) + 1, LAST_STEP
        ):
            time.sleep(0.01)
        ORIGINAL_WRITE(self, path, content)

    train.run_step, saving.Share._write = run_step, write


def no_room_for_a_copy() -> None:
    """The last rank sees no free host memory; what a thread would write fails, on all ranks."""

    def write(self, path, content):
        if threading.current_thread() is not threading.main_thread():
            raise OSError("written in the background")
        ORIGINAL_WRITE(self, path, content)

    saving.Share._write = write
    if distributed.rank() == distributed.world_size() - 1:
        saving.available_bytes = lambda: 0


def record_samples() -> None:
    """Every rank notes each pack it trains on: step, process, its samples and a hash of its tokens.

    Steps of milliseconds are stretched: whoever watches for a moment to kill must not come too late.
    """

    def accumulate(run, plan, batches):
        time.sleep(0.05)
        result = ORIGINAL_ACCUMULATE(run, plan, batches)
        packs = rank_packs(plan.packs, distributed.rank(), distributed.world_size())
        with open(run.folder / f"trained_rank_{distributed.rank()}.jsonl", "a") as file:
            for pack, batch in zip(packs, batches, strict=True):
                samples = [[int(d), int(i)] for d, i in zip(pack.domains, pack.samples, strict=True)]
                tokens = hashlib.sha256(batch.input_ids.numpy().tobytes()).hexdigest()
                line = {"step": plan.step, "pid": os.getpid(), "samples": samples, "tokens": tokens}
                file.write(json.dumps(line) + "\n")
        return result

    train.accumulate = accumulate


def lowest_after(best: int) -> None:
    """Held-out losses are lowest after this step, whatever they are."""
    EarlyStopping.observe = lambda self, step, _: ORIGINAL_OBSERVE(self, step, 1.0 + abs(step - best))


def leave_uncompiled() -> None:
    """What DeepSpeed compiles for Muon runs as it is written: compiling takes longer than these runs."""
    torch._dynamo.config.disable = True


SABOTAGE = {
    "leave uncompiled": leave_uncompiled,
    "lowest after step 4": lambda: lowest_after(4),
    "record samples": record_samples,
    "write slowly": write_slowly,
    "no room for a copy": no_room_for_a_copy,
    "freeze two": freeze_two,
    "cannot export": fail_to_export,
    "cannot write checkpoint 4": lambda: fail_to_write(4),
    "cannot publish checkpoint 4": lambda: fail_to_publish(4),
    None: lambda: None,
    "nan in step 3": lambda: nan_in_steps(3),
    "other weights on the last rank": other_weights,
    "nan in step 4": lambda: nan_in_steps(4),
    "nan from step 4 on": lambda: nan_in_steps(*range(4, 100)),
    "nan gradient from step 4 on": lambda: nan_gradient_from_step(4),
    "stop in step 4": lambda: ask_to_stop_in_step(4),
    "stop in step 11": lambda: ask_to_stop_in_step(11),
    "spike in step 12": lambda: spike_in_steps(12),
    "spike from step 12 on": lambda: spike_in_steps(*range(12, 100)),
    "no memory": no_memory,
    "no memory left in step 2": lambda: no_memory_left(2),
    "bad label in step 2": lambda: bad_label(2),
    "other code on the last rank": lambda: on_the_last_rank("other code"),
    "damaged cache on the last rank": lambda: on_the_last_rank("damaged cache"),
    "full disk in step 1": lambda: full_disk_after_step(0),
    "nothing": lambda: None,
    "stop in step 3": lambda: ask_to_stop_in_step(3),
    "die in checkpoint 6": lambda: die_in_checkpoint(6),
}


def repair() -> None:
    """Undo any sabotage."""
    LossHead.forward, train.run_step = ORIGINAL_FORWARD, ORIGINAL_RUN_STEP
    consistency.folder_hash, preflight.check_file = ORIGINAL_HASH, ORIGINAL_CHECK
    train.run_steps, train.accumulate = ORIGINAL_RUN_STEPS, ORIGINAL_ACCUMULATE
    saving.write_part, saving.Share.begin, saving.Share._write = ORIGINAL_PART, ORIGINAL_BEGIN, ORIGINAL_WRITE
    saving.available_bytes = ORIGINAL_AVAILABLE
    checkpoint.publish, export.ShardWriter._flush = ORIGINAL_PUBLISH, ORIGINAL_FLUSH
    deepspeed_backend.build_model = ORIGINAL_BUILD
    WeightController.update, EarlyStopping.observe = ORIGINAL_UPDATE, ORIGINAL_OBSERVE
    resource.setrlimit(resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
    torch._dynamo.config.disable = False


def main(cases: Path) -> None:
    """Run the cases of a file, one after the other, within one process group."""
    setup_logging()
    device = start_process_group()
    for case in json.loads(cases.read_text()):
        os.chdir(case.get("folder", "."))
        config = load_config(case["config"], case["overrides"])
        SABOTAGE[case["sabotage"]]()
        dump_at(case.get("dump", []))
        outcome = None
        try:
            train.train_in_group(config, device)
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
