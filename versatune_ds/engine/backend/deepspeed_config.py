"""From our settings to DeepSpeed's: the user's JSON plus the keys that our sections own.

Batch sizes, precision, clipping and the optimizer are set once, in the run's YAML; a DeepSpeed file that sets
them too is refused, because one of the two would silently lose.

DeepSpeed ignores top-level keys that it does not know, so a misspelt section would be lost. Which keys the
installed DeepSpeed knows is seen by letting it read a dict that notes what is looked up in it. The rest is
left to DeepSpeed's own validation, whose errors become ours.

What is not covered: the meaning of DeepSpeed's own keys (ZeRO stage, offload, buckets, ZeRO++), and unknown
keys within the few sections that DeepSpeed does not validate (aio, activation_checkpointing, ...).
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from versatune_ds.config.schema import Config
from versatune_ds.data.plan.balance import check_world_size
from versatune_ds.foundations.errors import ConfigError, unknown_name

OWNED_KEYS = {
    "train_batch_size": "batch.packs_per_step",
    "train_micro_batch_size_per_gpu": "batch (one pack is one micro-batch)",
    "gradient_accumulation_steps": "batch.packs_per_step",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
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
        ConfigError: the file is missing or not JSON, sets a key we own or one that DeepSpeed does not know,
            DeepSpeed refuses a value, or the batch does not divide.
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
    _require_accepted(merged)
    return merged


def zero_stage(settings: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration."""
    return int(settings["zero_optimization"].get("stage", 0))


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """True if the optimizer runs on the CPU (it then has to be DeepSpeed's own CPU Adam)."""
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


class _Noting(dict[str, Any]):
    """A dict that notes the keys that are looked up in it, be they there or not.

    DeepSpeedConfig first asks for keys that it no longer takes, then reads all others from a copy: with the
    copy the notes begin anew.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __copy__(self) -> _Noting:
        self.asked.clear()
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dict."""
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """The dict itself: DeepSpeed asks `key in settings.keys()`."""
        return self


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Top-level keys that the installed DeepSpeed reads from its configuration."""
    noting = _Noting({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(noting)
    return tuple(sorted(noting.asked))


def _require_accepted(settings: dict[str, Any]) -> None:
    """Refuse a key that DeepSpeed would ignore, and whatever it does not take.

    Raises:
        ConfigError: names the key or the section.
    """
    zero = settings["zero_optimization"]
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed: zero_optimization is {zero!r}; it must be an object with a stage")
    try:
        DeepSpeedConfig(copy.deepcopy(settings))
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"deepspeed: DeepSpeed {deepspeed.__version__} refuses these settings: {_reason(error)}"
        ) from error
    unknown = [key for key in settings if key not in known_keys()]
    if unknown:
        free = [key for key in known_keys() if key not in OWNED_KEYS]
        raise ConfigError(f"deepspeed: {unknown_name('key', unknown[0], free)}")


def _reason(error: Exception) -> str:
    """An error of DeepSpeed in one line; a misspelt key of the ZeRO section with the nearest one."""
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    found = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in found["loc"])
    is_zero = error.title == DeepSpeedZeroConfig.__name__ and len(found["loc"]) == 1
    if found["type"] == "extra_forbidden" and is_zero:
        fields = DeepSpeedZeroConfig.model_fields.items()
        return unknown_name("key of zero_optimization", place, sorted(f.alias or name for name, f in fields))
    return f"{error.title}: {place}: {found['msg']} (found {found['input']!r})"


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
