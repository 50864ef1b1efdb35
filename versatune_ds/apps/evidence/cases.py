"""What is compared: the models, by what the card holds, and the arms.

What is not covered: running (`comparison`) and the programs of the arms (`arms`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    shape: str
    """Name in `bench/shapes.SHAPES`."""
    layers: int
    pack_len: int
    packs: int
    """In a step."""
    warmup_steps: int
    steps: int
    """On the clock."""
    dtype: str
    lr: float
    """Constant from the first step on."""
    recompute: str
    """`model.activation_checkpointing`: "off" or "all"."""


CPU: dict[str, Any] = {"warmup_steps": 1, "dtype": "fp32", "recompute": "off"}


def _on_gpu(shape: str, layers: int, pack_len: int = 8192) -> TrainingCase:
    common: dict[str, Any] = {"warmup_steps": 2, "steps": 6, "dtype": "bf16", "lr": 1e-4, "recompute": "all"}
    return TrainingCase(shape=shape, layers=layers, pack_len=pack_len, packs=8, **common)


CPU_CASES = {
    "tiny": TrainingCase(shape="tiny", layers=2, pack_len=128, packs=4, steps=4, lr=3e-3, **CPU),
    "small": TrainingCase(shape="13m", layers=6, pack_len=1024, packs=8, steps=3, lr=1e-3, **CPU),
}
GPU_CASES: list[tuple[float, list[TrainingCase]]] = [
    # GiB of the card, cases: 16 bytes a parameter, and activations with recomputation of every layer
    (130, [_on_gpu("qwen2.5-32b", 8), _on_gpu("llama-3-8b", 32, 4096)]),
    (75, [_on_gpu("qwen2.5-32b", 4), _on_gpu("llama-3-8b", 12)]),
    (38, [_on_gpu("llama-3-8b", 2)]),
    (20, [_on_gpu("llama-2-7b", 2, 4096)]),
    (0, [_on_gpu("13m", 6, 1024)]),
]
ROUNDS = {"tiny": 2, "small": 3, "auto": 2}


class Arm(NamedTuple):
    name: str
    needs: tuple[str, ...]
    """Modules."""
    needs_cuda: bool = False


TRL = ("trl", "datasets", "pyarrow", "pandas")
ARMS = (
    Arm("ours", ("deepspeed",)),
    Arm("trl-varlen", (*TRL, "deepspeed"), needs_cuda=True),
    Arm("trl-sdpa", TRL),
)


def choose_cases(size: str, card_gib: float) -> list[TrainingCase]:
    """What fits: on a card by its memory, without one by `size`."""
    if size in CPU_CASES:
        return [CPU_CASES[size]]
    return next(cases for least, cases in GPU_CASES if card_gib >= least)
