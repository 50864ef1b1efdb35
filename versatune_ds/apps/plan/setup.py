"""The settings that memory depends on, from a run's configuration or from a command's options.

What is not covered: the model's shape (`engine/model/shape.py`) and the memory itself (`memory.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from versatune_ds.config.load import read_deepspeed
from versatune_ds.config.model import Adapter, Recompute
from versatune_ds.config.schema import Config
from versatune_ds.data.collate import rows_of
from versatune_ds.engine.backend.zero_sizes import with_sizes
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.engine.model.source import DTYPES

Offload = Literal["none", "optimizer", "all"]
Checkpointing = Recompute | int

GIB = 2**30
FP32, LONG, INT = 4, 8, 4
"""Bytes of an element."""


@dataclass(frozen=True, kw_only=True)
class ZeroBuffers:
    """DeepSpeed's sizes, in elements; defaults are DeepSpeed's."""

    reduce_bucket: int = 0
    prefetch_bucket: int = 0
    sub_group: int = 0
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    hpz_ranks: int = 1
    """ZeRO++: ranks that share a secondary copy of the parameters; 1: none."""
    overlap: bool = True

    @classmethod
    def of(cls, shape: ModelShape, setup: Setup) -> ZeroBuffers:
        """Those of a run, as its `zero_optimization` section and the model's size say."""
        zero = with_sizes({**setup.zero, "stage": setup.zero_stage}, shape, setup.adapter)
        keys = {
            "overlap": "overlap_comm",
            "reduce_bucket": "reduce_bucket_size",
            "prefetch_bucket": "stage3_prefetch_bucket_size",
            "persistence_threshold": "stage3_param_persistence_threshold",
            "max_live": "stage3_max_live_parameters",
            "sub_group": "sub_group_size",
            "hpz_ranks": "zero_hpz_partition_size",
        }
        given = {name: zero[key] for name, key in keys.items() if isinstance(zero.get(key), int | float)}
        return cls(**{name: int(size) for name, size in given.items()})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings that memory depends on."""

    gpus: int
    zero_stage: int = 3
    dtype: str = "bf16"
    pack_len: int = 8192
    packs_per_step: int = 128
    sequence_parallel: int = 1
    checkpointing: Checkpointing = "off"
    offload: Offload = "none"
    zero: Mapping[str, Any] = field(default_factory=dict)
    """`zero_optimization` of the DeepSpeed file, for its buffers."""
    logits_dtype: Literal["fp32", "compute"] = "fp32"
    supervised: float = 0.5
    """Share of positions with a label."""
    adapter: Adapter | None = None
    """What is trained in the model's place."""
    compares: bool = False
    """With `model.kl_to_base`."""
    states: str = "fp32"
    """`optimizer.states`."""
    has_muon: bool = False
    has_average: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: as the tests run: chunked loss, sdpa, one sample after the other."""

    @property
    def element(self) -> int:
        """Bytes of an element in `dtype`."""
        return DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> int:
        """Tokens of a pack on one GPU."""
        return rows_of(self.pack_len, self.sequence_parallel) // self.sequence_parallel

    @property
    def shards(self) -> int:
        """Ranks that share the optimizer state."""
        return self.gpus if self.zero_stage else 1

    @property
    def is_qlora(self) -> bool:
        """The model in 4 bits, which ZeRO-3 cannot divide."""
        return self.adapter is not None and self.adapter.kind == "qlora"

    @property
    def keeps_base(self) -> bool:
        """A frozen copy of the model beside the one that is trained."""
        return self.compares and self.adapter is None

    @property
    def master(self) -> int:
        """Bytes of a master weight."""
        return 2 if self.states == "bf16_stochastic" else FP32

    @property
    def moment(self) -> int:
        """Bytes of one moment of a parameter."""
        return FP32 if self.states == "fp32" else 2

    @property
    def inputs_on_host(self) -> bool:
        """Layer inputs wait in host memory; on a CPU there is no other."""
        return self.checkpointing == "offload" and self.device == "cuda"

    @property
    def offloads_optimizer(self) -> bool:
        """Master weights and moments in host memory."""
        return self.offload != "none"


def read_offload(zero: dict[str, Any]) -> Offload:
    """What a `zero_optimization` section offloads."""

    def is_on(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") != "none"

    if is_on("offload_param"):
        return "all"
    return "optimizer" if is_on("offload_optimizer") else "none"


def setup_fields(config: Config) -> dict[str, Any]:
    """The fields of `Setup` that a run's settings decide; errors as `read_deepspeed`."""
    zero = read_deepspeed(config.deepspeed).get("zero_optimization", {"stage": 3})
    return {
        "zero_stage": int(zero.get("stage", 0)),
        "dtype": config.model.dtype,
        "logits_dtype": config.model.logits_dtype,
        "pack_len": config.batch.pack_len,
        "packs_per_step": config.batch.packs_per_step,
        "sequence_parallel": config.batch.sequence_parallel,
        "compares": config.model.kl_to_base is not None,
        "states": config.optimizer.states,
        "has_muon": config.optimizer.kind == "muon",
        "has_average": config.optimizer.ema_decay is not None,
        "checkpointing": config.model.activation_checkpointing,
        "offload": read_offload(zero),
        "zero": zero,
        "adapter": config.model.adapter,
    }
