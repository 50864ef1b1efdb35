"""From our settings to DeepSpeed's: the user's JSON plus the keys that our sections own.

Batch sizes, precision, clipping and the optimizer are set once, in the run's YAML; a DeepSpeed file that sets
them too is refused, because one of the two would silently lose.

What is not covered: the meaning of DeepSpeed's own keys (ZeRO stage, offload, buckets, ZeRO++).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from versatune_ds.config.schema import Config
from versatune_ds.data.balance import check_world_size
from versatune_ds.foundations.errors import ConfigError

OWNED_KEYS = {
    "train_batch_size": "batch.packs_per_step",
    "train_micro_batch_size_per_gpu": "batch (one pack is one micro-batch)",
    "gradient_accumulation_steps": "batch.packs_per_step",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "steps_per_print": "(the console is ours)",
    "checkpoint": "checkpoint (its files are written and verified by the trainer)",
    "datastates_ckpt": "checkpoint (its files are written and verified by the trainer)",
}


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    Args:
        config: the run's settings.
        world_size: number of ranks; must divide `batch.packs_per_step`.

    Raises:
        ConfigError: the file is missing or not JSON, sets a key we own, or the batch does not divide.
    """
    merged = _read(config.deepspeed)
    for key, owner in OWNED_KEYS.items():
        if key in merged:
            raise ConfigError(
                f"deepspeed: the key {key!r} is set by {owner}; remove it from the DeepSpeed file"
            )
    merged["train_micro_batch_size_per_gpu"] = 1
    check_world_size(config.batch.packs_per_step, world_size)
    merged["gradient_accumulation_steps"] = config.batch.packs_per_step // world_size
    merged["gradient_clipping"] = config.optimizer.max_grad_norm
    if config.model.dtype == "bf16":
        merged["bf16"] = {"enabled": True}
    if config.model.dtype == "fp16":
        merged["fp16"] = {"enabled": True}
    merged.setdefault("zero_optimization", {"stage": 3})
    merged["steps_per_print"] = 2**31
    return merged


def zero_stage(settings: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration."""
    return int(settings["zero_optimization"].get("stage", 0))


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """True if the optimizer runs on the CPU (it then has to be DeepSpeed's own CPU Adam)."""
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _read(source: dict[str, Any] | Path) -> dict[str, Any]:
    if isinstance(source, dict):
        return copy.deepcopy(source)
    if not source.is_file():
        raise ConfigError(f"deepspeed: no file {source}; see configs/deepspeed/ for ready ones")
    try:
        value = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: a DeepSpeed configuration is a JSON object")
    return value
