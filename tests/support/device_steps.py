"""Optimizer steps on the samples of `step_cases`, on one rank, on a CPU or a GPU; a script.

Usage: device_steps.py OUT_FOLDER MODEL_FOLDER CASE... Each case leaves OUT_FOLDER/CASE.safetensors:
`sums.STEP` (loss and supervised tokens of each domain), `master.NAME` (fp32 weights after the last step).

A case is words joined by `-`: bf16 or fp32 first, then any of
    onepack    all samples in one pack instead of four accumulation steps
    overlap    overlap_comm on; off without it
    recompute  activations of every layer; selective, hosted: other kinds (`step_cases.RECOMPUTE`)
    moments    in bf16; stochastic: master weights, too
    compile    every layer
    liger      liger-kernel's layers
    nan        a poisoned step after the second
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import step_cases as cases
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from versatune_ds.config.load import validate_config
from versatune_ds.data.collate import collate
from versatune_ds.engine.backend.deepspeed_backend import build_backend
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.checkpointing.hf_export import NAME_PREFIX
from versatune_ds.engine.model.packed_lm import LossHead
from versatune_ds.engine.skipping import reason_to_skip
from versatune_ds.engine.state import SpikeGuard
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.engine.train import accumulate, apply_step

STEPS = 5
STATES = {"moments": "bf16_moments", "stochastic": "bf16_stochastic"}
ONE_PACK = (tuple(range(len(cases.LENGTHS))),)


def run_case(case: str, model: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """All steps of a case."""
    dtype, *words = case.split("-")
    layout = ONE_PACK if "onepack" in words else cases.PACKED
    pack_len = sum(cases.LENGTHS) + 5 if "onepack" in words else cases.PACK_LEN
    settings = {
        "source": str(model),
        "dtype": dtype,
        "activation_checkpointing": next((cases.RECOMPUTE[w] for w in words if w in cases.RECOMPUTE), "off"),
        "compile": "layers" if "compile" in words else "off",
        "liger": "auto" if "liger" in words else "off",
    }
    raw = cases.settings(settings, layout, {"stage": 3, "overlap_comm": "overlap" in words})
    raw["batch"]["pack_len"] = pack_len
    raw["optimizer"]["states"] = next((STATES[word] for word in words if word in STATES), "fp32")
    config = validate_config(raw, case)
    run = SimpleNamespace(
        config=config,
        backend=build_backend(config, deepspeed_config(config, 1), Ranks.of_world(), device),
        statistics=StepStatistics(2, device),
        spikes=SpikeGuard(None, 10),
    )
    batches = [collate(pack, [cases.Samples()] * 2, pack_len, 0) for pack in cases.packs(layout)]
    plan = SimpleNamespace(step=0, loss_weight=sum(batch.supervised_tokens for batch in batches))
    out: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        if step == 2 and "nan" in words:
            assert not take_step(run, plan, batches, poisoned=True)
        sums = take_step(run, plan, batches)
        assert sums is not None
        out[f"sums.{step}"] = torch.from_numpy(sums[:2].copy())
    for parameter, name in run.backend.live.param_names.items():
        master = safe_get_full_fp32_param(parameter)
        out[f"master.{name.removeprefix(NAME_PREFIX)}"] = master.detach().cpu().clone()
    run.backend.close()
    return out


def take_step(run, plan, batches, poisoned=False):
    """One step; its domain sums, or None when it was skipped."""
    forward = LossHead.forward
    if poisoned:
        LossHead.forward = lambda self, hidden, *args: forward(self, hidden * float("nan"), *args)
    accumulate(run, plan, batches)
    LossHead.forward = forward
    totals = run.statistics.reduce()
    applied = apply_step(run, reason_to_skip(totals, run.spikes, run.backend), cases.LEARNING_RATE)
    return totals.sums.values if applied else None


def main() -> None:
    out_folder, model, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    device = start_process_group()
    for name in names:
        save_file(run_case(name, model, device), out_folder / f"{name}.safetensors")
    close_process_group()


if __name__ == "__main__":
    main()
