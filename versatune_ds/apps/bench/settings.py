"""What a trainer benchmark is asked for, and the settings of a run that follow from it.

What is not covered: whether it fits (`apps/bench/fit.py`) and measuring (`apps/bench/trainer.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from versatune_ds.apps.bench.shapes import shape_config
from versatune_ds.config.load import apply_override, load_config, validate_config
from versatune_ds.config.schema import Config
from versatune_ds.config.section import PlaceText, Section
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

DOMAINS = ("law", "medicine", "finance", "science", "code", "other")
ZERO_FILE = Path(__file__).resolve().parents[3] / "configs" / "deepspeed" / "zero3.json"
"""The DeepSpeed settings that the project's own runs use; a checkout has it, an installed copy has not."""


class BenchSettings(Section):
    """What is measured, and how often."""

    shape: str
    """Name in `shapes.SHAPES`."""
    layers: tuple[int, ...] = ()
    """Slices of the first n layers; empty: the whole model, or slices of it where it does not fit."""
    pack_len: int = 8192
    packs_per_rank: int = 8
    """Packs of a rank in a step: its accumulation steps. Few packs cannot be filled: 2 leave 5 % of
    the slots to padding, 8 leave 0.1 %."""
    warmup_steps: int = Field(5, ge=0)
    steps: int = Field(20, ge=1)
    """Steps on the clock."""
    split_steps: int = Field(5, ge=1)
    """Steps with every phase timed."""
    metrics: str = "both"
    """Domain statistics "on", "off", or "both" (adds steps that alternate)."""
    data: PlaceText | None = None
    """Settings whose prepared data is used; None: synthetic samples."""
    supervised: float = Field(0.5, gt=0, le=1)
    """Synthetic: share of a sample that has labels."""
    dtype: str = "bf16"
    activation_checkpointing: str | int = "auto"
    """off, all, every n-th layer, or auto: as little as fits, the same for all slices."""
    zero_stage: int = 3
    deepspeed: PlaceText | None = None
    """DeepSpeed JSON file; None: the shipped one with `zero_stage`."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for any other setting; they win."""

    def with_checkpointing(self, policy: str | int) -> BenchSettings:
        """The same with the activation checkpointing chosen."""
        return self.model_copy(update={"activation_checkpointing": policy})


def check_settings(settings: BenchSettings) -> None:
    """Raise ConfigError for what cannot be measured, before anything is started."""
    for layers in settings.layers or (None,):
        shape_config(settings.shape, layers)
    if any(text.startswith("model.activation_checkpointing=") for text in settings.overrides):
        raise ConfigError("bench: give --checkpointing instead of model.activation_checkpointing=...")
    if settings.activation_checkpointing == "auto":
        settings = settings.with_checkpointing("off")
    bench_config(settings, settings.shape, Path("run"))


def bench_config(settings: BenchSettings, source: str, run_dir: Path) -> Config:
    """A run's settings with the activation checkpointing chosen (not "auto"); `overrides` win over all."""
    names = list(DOMAINS)
    domains: dict[str, Any] = {"names": names}
    if settings.data is not None:
        given = load_config(settings.data)
        names = given.domains.names
        domains = given.domains.model_dump(mode="json")
    raw: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": {
            "source": source,
            "weights": "random",
            "dtype": settings.dtype,
            "activation_checkpointing": settings.activation_checkpointing,
        },
        "data": {"train": [{"path": "synthetic", "domain": names[0]}]},
        "domains": domains,
        # weights that move with the losses: a random model is above this reference in every domain
        "weights": {"strategy": "fostering", "reference": dict.fromkeys(names, 1.0)},
        "batch": {
            "pack_len": settings.pack_len,
            "packs_per_step": settings.packs_per_rank * distributed.world_size(),
        },
        "optimizer": {"schedule": "constant"},
        "train": {"max_steps": 10**6},
        "deepspeed": settings.deepspeed or shipped_deepspeed(settings.zero_stage),
    }
    for override in settings.overrides:
        apply_override(raw, override)
    return validate_config(raw, "bench")


def shipped_deepspeed(zero_stage: int) -> dict[str, Any]:
    """The shipped DeepSpeed settings with another ZeRO stage; DeepSpeed's defaults where they are not."""
    if not ZERO_FILE.is_file():
        log.warning(
            "%s is not there; DeepSpeed's defaults are measured instead (or give --deepspeed)", ZERO_FILE
        )
        return {"zero_optimization": {"stage": zero_stage}}
    shipped: dict[str, Any] = json.loads(ZERO_FILE.read_text(encoding="utf-8"))
    zero = shipped["zero_optimization"]
    if zero_stage < 3:
        zero = {key: value for key, value in zero.items() if not key.startswith("stage3_")}
    return {**shipped, "zero_optimization": {**zero, "stage": zero_stage}}
