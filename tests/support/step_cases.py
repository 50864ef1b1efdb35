"""Optimizer steps on fixed samples, run on 1, 2 or 4 ranks; a script started by `launch`.

Usage: step_cases.py OUT_FOLDER MODEL_FOLDER CASE... Each case leaves OUT_FOLDER/CASE.safetensors (rank 0).
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from versatune_ds.config.load import validate_config
from versatune_ds.data.collate import Batch, collate, compare, rows_of
from versatune_ds.data.plan.balance import rank_packs
from versatune_ds.data.plan.comparison import chosen_samples
from versatune_ds.data.plan.packing import Pack
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
from versatune_ds.foundations import distributed

PACK_LEN = 32
VOCAB_SIZE = 96
LENGTHS = (5, 17, 30, 9, 12, 24, 3, 20)
DOMAINS = (0, 0, 1, 0, 1, 1, 0, 1)
PACKED = ((2,), (1, 3, 0), (4, 7), (5, 6))
UNPACKED = tuple((i,) for i in range(len(LENGTHS)))
WITHOUT_SUPERVISION = 2
"""This sample has no supervised token: packed alone, it makes a batch without any on one rank."""
# eps 1 makes AdamW's first step proportional to the gradient; with the usual eps it would be its sign, and a
# gradient wrong by a factor would go unseen.
LEARNING_RATE, EPS = 0.5, 1.0
RATES = {"first": 0.3, "poisoned": 5.0, "second": 0.45}
"""Of each step; none is that of the settings."""
STEPS = ("first", "poisoned", "second")
MUON_FACTOR = 0.1
"""Learning rate of Muon's matrices over AdamW's, in the `-muon` cases."""
ALPHA = 20.0
"""Of the `-noise` cases: the noise moves losses by a tenth."""
KL = {"coefficient": 1.5, "share": 0.5}
"""Of the `-kl` cases."""
LONG = tuple(f"{step:02}" for step in range(20))
RECOMPUTE = {"recompute": "all", "selective": "selective", "hosted": "offload", "second": 2}
"""Words of a case for `model.activation_checkpointing`."""
BUCKETS = {"reduce_bucket_size": 3000, "stage3_prefetch_bucket_size": 3000}
"""Of the `-overlap` cases; a layer of the models has about 8,000 elements."""
ADAPTER = {"rank": 4, "alpha": 6.0, "targets": ["q_proj", "v_proj", "down_proj"]}
MAX_NORM = 0.25
"""Of the `-clip` cases; a fraction of the global gradient norm of both steps (checked in test_step.py)."""


class Samples:
    """The fixed samples, in the shape of a token cache."""

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(i)
        tokens = generator.integers(0, VOCAB_SIZE, LENGTHS[i]).astype(np.uint32)
        mask = generator.random(LENGTHS[i]) < 0.6
        mask[-1] = True
        return tokens, mask & (i != WITHOUT_SUPERVISION)


def packs(layout: tuple[tuple[int, ...], ...]) -> list[Pack]:
    """A layout as packs; domains and indices address the same `Samples` under two domain ids."""
    return [
        Pack(
            np.array([DOMAINS[i] for i in pack], np.int32),
            np.array(pack, np.int64),
            np.array([LENGTHS[i] for i in pack], np.int32),
        )
        for pack in layout
    ]


def settings(model: dict, layout: tuple[tuple[int, ...], ...], zero: dict, max_norm: float = 0) -> dict:
    return {
        "run": {"dir": "unused"},
        "model": model,
        "data": {"train": [{"path": "unused", "domain": "a"}]},
        "domains": {"names": ["a", "b"]},
        "batch": {"pack_len": PACK_LEN, "packs_per_step": len(layout)},
        "optimizer": {"lr": LEARNING_RATE, "eps": EPS, "max_grad_norm": max_norm},
        "train": {"max_steps": 3},
        "deepspeed": {"zero_optimization": zero},
    }


def run_case(case: str, models: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Two steps and their results.

    Args:
        case: `<tied|untied>-<packed|unpacked>-zero<stage>[-offload][-recompute][-compile][-triton][-nan]
            [-clip][-frozen][-bf16][-sums][-overlap][-long][-by<n>][-dft][-noise][-muon][-kl]`; recompute: or
            another word of RECOMPUTE; frozen: its routers; sums: gradients are summed in fp32, by another
            optimizer of DeepSpeed's; overlap: of communication, with buckets smaller than a layer; long: 20
            steps; by: n ranks share a pack.
    """
    words = case.split("-")
    layout = PACKED if "packed" in words else UNPACKED
    zero: dict = {"stage": int(next(w for w in words if w.startswith("zero")).removeprefix("zero"))}
    if "offload" in words:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "long" in words:
        zero |= {"overlap_comm": "overlap" in words, **(BUCKETS if "overlap" in words else {})}
        if zero["stage"] < 3:
            zero.pop("stage3_prefetch_bucket_size", None)
    model = {
        "source": str(models / words[0]),
        "dtype": "bf16" if "bf16" in words else "fp32",
        "activation_checkpointing": next((RECOMPUTE[w] for w in words if w in RECOMPUTE), "off"),
        "compile": "layers" if "compile" in words else "off",
        "objective": "dft" if "dft" in words else "cross_entropy",
        "neftune_alpha": ALPHA if "noise" in words else None,
        "router": "frozen" if "frozen" in words else "train",
        "loss_backend": "triton" if "triton" in words else "chunked",
    }
    if "kl" in words:
        model["kl_to_base"] = KL
    for kind in {"lora", "dora"} & set(words):
        model["adapter"] = {**ADAPTER, "kind": kind, "start_from": str(models / f"{words[0]}-{kind}")}
        if words[0] == "experts":
            del model["adapter"]["targets"]  # all-linear
    max_norm = MAX_NORM if "clip" in words else 0
    raw = settings(model, layout, zero, max_norm)
    if "sums" in words:
        raw["deepspeed"]["data_types"] = {"grad_accum_dtype": "fp32"}
    if "muon" in words:
        raw["optimizer"] |= {"kind": "muon", "muon_lr": MUON_FACTOR * LEARNING_RATE}
    torch._dynamo.config.disable = "muon" in words  # DeepSpeed compiles Newton-Schulz
    config = validate_config(raw, case)
    ranks = Ranks.of_world(next((int(w.removeprefix("by")) for w in words if w.startswith("by")), 1))
    backend = build_backend(config, deepspeed_config(config, ranks.dp.size), ranks, device)
    its = backend.model
    statistics = StepStatistics(2, device, its.routers, counts=ranks.sp.rank == 0, base_kl=its.base_kl)
    run = SimpleNamespace(backend=backend, statistics=statistics, spikes=SpikeGuard(None, 10))
    chosen = packs(layout)
    mine = rank_packs(chosen, *ranks.dp)
    sources = [Samples(), Samples()]
    batches = [collate(pack, sources, rows_of(PACK_LEN, ranks.sp.size), 0).part(*ranks.sp) for pack in mine]
    everything = [collate(pack, sources, PACK_LEN, 0) for pack in chosen]
    plan = SimpleNamespace(step=0, loss_weight=sum(batch.supervised_tokens for batch in everything))
    out = {}
    steps = STEPS if "nan" in words else ("first", "second")
    for step in LONG if "long" in words else steps:
        if step == "poisoned":
            poison_last_rank()
        plan.step = STEPS.index(step) if step in STEPS else int(step)
        if "kl" in words:
            batches = rank_packs(with_compared(chosen, everything, plan.step, ranks.size), *ranks.dp)
        accumulate(run, plan, batches)
        totals = run.statistics.reduce()
        applied = apply_step(run, reason_to_skip(totals, run.spikes, run.backend), RATES.get(step, 0.1))
        if step == "poisoned":
            LossHead.forward = ORIGINAL_FORWARD
            assert totals.sums is None and not applied
            continue
        assert applied
        out[f"sums_{step}"] = torch.from_numpy(totals.sums.values.copy())
        if totals.base_kl is not None:
            out[f"kl_{step}"] = torch.from_numpy(totals.base_kl.copy())
        if totals.routers is not None:
            out[f"routers_{step}"] = torch.from_numpy(totals.routers.copy())
    for name, parameter in backend.parameters():
        out[f"parameter.{name.removeprefix(NAME_PREFIX)}"] = parameter.detach().clone()
    if "bf16" in words:
        for parameter, name in backend.live.param_names.items():
            out[f"master.{name.removeprefix(NAME_PREFIX)}"] = safe_get_full_fp32_param(parameter).clone()
    backend.close()
    return out


def with_compared(packs: list[Pack], batches: list[Batch], step: int, world_size: int) -> list[Batch]:
    """Whole batches of all packs with what is compared in a step."""
    chosen = chosen_samples(packs, KL["share"], 0, step)
    sources = [Samples(), Samples()]

    def compared(normalizer: float) -> list[Batch]:
        rows = zip(batches, packs, chosen, strict=True)
        return [compare(*row, sources, 0, normalizer) for row in rows]

    return compared(sum(len(batch.compared.rows) for batch in compared(1.0)) / world_size)


ORIGINAL_FORWARD = LossHead.forward


def poison_last_rank() -> None:
    """From now on the last rank's hidden states are NaN."""

    def forward(self, hidden, *args):
        return ORIGINAL_FORWARD(self, hidden * float("nan"), *args)

    if distributed.rank() == distributed.world_size() - 1:
        LossHead.forward = forward


def main() -> None:
    out_folder, models, cases = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    device = start_process_group()
    for case in cases:
        out = run_case(case, models, device)
        if distributed.is_main():
            save_file(out, out_folder / f"{case}.safetensors")
        distributed.barrier()
    close_process_group()


if __name__ == "__main__":
    main()
