"""Where a training step waits for the device, counted on a CPU; a script started by `launch`.

Usage: wait_cases.py OUT_FILE MODEL_FOLDER. A tiny model takes steps as on a GPU: bf16, ZeRO-3, and the name
of the varlen attention, computed with a block-diagonal mask here. OUT_FILE gets, of `STEPS` steps after
`FIRST_STEPS` (in which DeepSpeed compares the order of modules across ranks): calls of the accelerator's
`synchronize` (DeepSpeed's throughput timer begins with the third step), calls of transformers' search for
packed sequences, and reads of a tensor's value (`item`, `bool`, `float`) by the function that asked.
"""

from __future__ import annotations

import collections
import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import step_cases as cases
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from versatune_ds.config.load import validate_config
from versatune_ds.data.collate import collate
from versatune_ds.engine.backend import deepspeed_backend, process_group
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.model import attention
from versatune_ds.engine.skipping import reason_to_skip
from versatune_ds.engine.state import SpikeGuard
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.engine.train import accumulate, apply_step

FIRST_STEPS = 2
STEPS = 3
COUNTS: collections.Counter[str] = collections.Counter()


def counted(name: str, function):
    def call(*args, **kwargs):
        COUNTS[name] += 1
        return function(*args, **kwargs)

    return call


def block_diagonal(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What the varlen kernel computes."""
    boundaries = kwargs["cu_seq_lens_q"].numpy()
    sample = torch.repeat_interleave(torch.arange(len(boundaries) - 1), torch.from_numpy(boundaries).diff())
    mask = (sample[:, None] == sample) & torch.ones(len(sample), len(sample), dtype=torch.bool).tril()
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value by the first caller outside of torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            COUNTS[f"{Path(frames[-1].filename).name}:{frames[-1].name}"] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    out_file, model = Path(sys.argv[1]), sys.argv[2]
    attention.varlen_attention = block_diagonal
    attention.register_varlen()
    deepspeed_backend.choose_attention = lambda *args: attention.AttentionChoice(
        attention.VARLEN, "as on a GPU"
    )
    device = process_group.start_process_group()
    raw = cases.settings({"source": model, "dtype": "bf16"}, cases.PACKED, {"stage": 3}, max_norm=1.0)
    config = validate_config(raw, "waits")
    settings = deepspeed_config(config, 1)
    run = SimpleNamespace(
        config=config,
        backend=deepspeed_backend.build_backend(config, settings, Ranks.of_world(), device),
        statistics=StepStatistics(2, device),
        spikes=SpikeGuard(None, 10),
    )
    sources = [cases.Samples(), cases.Samples()]
    batches = [collate(pack, sources, cases.PACK_LEN, 0) for pack in cases.packs(cases.PACKED)]
    plan = SimpleNamespace(step=0, loss_weight=sum(batch.supervised_tokens for batch in batches))

    def take(steps: int) -> None:
        for _ in range(steps):
            accumulate(run, plan, batches)
            totals = run.statistics.reduce()
            assert totals.sums is not None
            assert apply_step(run, reason_to_skip(totals, run.spikes, run.backend), 1e-3)

    take(FIRST_STEPS)
    accelerator = get_accelerator()
    accelerator.synchronize = counted("synchronize", accelerator.synchronize)
    masking_utils.find_packed_sequence_indices = counted(
        "search for packed sequences", masking_utils.find_packed_sequence_indices
    )
    with Reads():
        take(STEPS)
    out_file.write_text(json.dumps(COUNTS))
    process_group.close_process_group()


if __name__ == "__main__":
    main()
