"""Packs that ranks share beside the same packs whole, family by family; a script started by `launch`.

Usage: sequence_cases.py OUT_FOLDER. Four ranks share a pack by twos, threes (the last one has it alone) and
fours. Each case leaves OUT_FOLDER/CASE.safetensors (rank 0) with losses, sums and gradients of both, and the
bytes that rank 0 has sent.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_families import FAMILY_CONFIGS, VOCAB_SIZE, family_model

from versatune_ds.data.collate import Batch, collate, rows_of
from versatune_ds.data.plan.packing import Pack
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.packed_lm import PackedCausalLM, model_inputs
from versatune_ds.engine.model.recompute import recompute_in_backward
from versatune_ds.engine.model.router import Routers, experts_of
from versatune_ds.engine.model.sequence import SequenceGroup, share_heads

PACK_LEN = 30
LENGTHS = (1, 7, 1, 9, 5)
"""In packs of 30 tokens, of which four ranks get 8 rows each, one of them nothing but padding."""
NORMALIZER = 7.0
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96}
"""Three ranks must hold each key-value head three times."""
RANKS = 4
CASES: dict[str, tuple[str, int, dict]] = {
    **{f"{kind} by {n}": (kind, n, {}) for kind in FAMILY_CONFIGS if kind != "gemma2" for n in (2, 4)},
    "wide by 3": ("qwen2", 3, HEADS),
    "recomputed by 2": ("qwen2", 2, {}),
    "weighed by 4": ("qwen2", 4, {}),
    "alone by 2": ("qwen2", 2, {}),
    "empty by 2": ("qwen2", 2, {}),
}
"""Family, ranks that share a pack, and fields of its configuration. Gemma 2's capped scores are refused."""


class Samples:
    """Random tokens, of which about half are supervised; with weights where these are wanted."""

    def __init__(self, lengths: tuple[int, ...], weighed: bool) -> None:
        self.lengths, self.weighed = lengths, weighed

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(i)
        tokens = generator.integers(0, VOCAB_SIZE, self.lengths[i]).astype(np.uint32)
        chosen = generator.random(self.lengths[i])
        return tokens, np.where(chosen < 0.5, 0, chosen).astype(np.float32) if self.weighed else chosen < 0.5


def whole_batch(case: str, rows: int) -> Batch:
    lengths = {"empty by 2": (), "alone by 2": (PACK_LEN,)}.get(case, LENGTHS)
    count = len(lengths)
    pack = Pack(np.zeros(count, np.int32), np.arange(count), np.array(lengths, np.int32))
    return collate(pack, [Samples(lengths, case.startswith("weighed"))], rows, 0)


def model(case: str, attention: AttentionChoice, group: SequenceGroup | None) -> PackedCausalLM:
    kind, _, more = CASES[case]
    lm = family_model(kind, **more)
    lm.set_attn_implementation(attention.implementation)
    recompute_in_backward(lm, "all" if case.startswith("recomputed") else "off")
    routers = Routers(lm.config, None) if experts_of(lm.config) else None
    return PackedCausalLM(lm, "chunked", routers=routers, sequence=group).train()


def results(model: PackedCausalLM, batch: Batch, group: SequenceGroup | None, kind: str) -> dict:
    """Loss, sums and gradients; those of a group added up where the loop would."""
    out = model(**model_inputs(batch, NORMALIZER))
    out.loss.backward()
    total = torch.clone if group is None else group.total
    found = {"loss": total(out.loss.detach()), "tokens": out.sample_tokens, "loss_sum": out.sample_loss}
    found["loss_sq"] = out.sample_loss_sq
    if model.routers is not None:
        found["routers"] = total(model.routers.take())
    for name, parameter in model.named_parameters():
        zero = torch.zeros_like(parameter)
        found[f"gradient {name}"] = total(zero if parameter.grad is None else parameter.grad)
    return {f"{kind} {name}": value.detach().clone() for name, value in found.items()}


def main() -> None:
    out_folder, sent = Path(sys.argv[1]), []
    start_process_group()
    rank = dist.get_rank()
    handles = {
        n: [dist.new_group(list(range(i, min(i + n, RANKS)))) for i in range(0, RANKS, n)] for n in (2, 3, 4)
    }
    original = dist.all_to_all_single

    def counted(received, tensor, group):
        size = dist.get_world_size(group)
        sent.append(tensor.nbytes * (size - 1) // size)
        return original(received, tensor, group=group)

    dist.all_to_all_single = counted
    for case, (_, n, _) in CASES.items():
        handle = handles[n][rank // n]
        group = SequenceGroup(rank % n, dist.get_world_size(handle), handle)
        attention = AttentionChoice("sdpa", "")
        sent.clear()
        batch = (
            whole_batch(case, rows_of(PACK_LEN, n)).part(group.rank, group.size) if group.size > 1 else None
        )
        shared = {}
        if batch is not None:
            shared = results(model(case, share_heads(attention, n), group), batch, group, "shared")
        if rank == 0:
            whole = results(model(case, attention, None), whole_batch(case, PACK_LEN), None, "whole")
            save_file(
                {**shared, **whole, "sent": torch.tensor(sum(sent))}, out_folder / f"{case}.safetensors"
            )
    close_process_group()


if __name__ == "__main__":
    main()
