"""From our settings to DeepSpeed's: the user's JSON plus the keys that our sections own.

Batch sizes, precision, clipping and the optimizer are set once, in the run's YAML; a DeepSpeed file that sets
them too is refused, because one of the two would silently lose.

DeepSpeed ignores top-level keys that it does not know, and reads others that change nothing here: they
belong to features that a caller must switch on (`engine.compile`, `checkpointing.configure`), or to loaders,
optimizers and engines that the trainer does not use. So every key has a place in one of the tables below:
it passes, it is set by one of our sections, or it is refused with the reason. What a section may hold is left
to DeepSpeed's own validation, whose errors become ours; where it has none, we do it.

DeepSpeed's throughput timer is switched off: it waits for the device in every forward from the third step on.

What is not covered: whether values suit the machine (buckets, offload, the ranks of a ZeRO++ partition).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from versatune_ds.config.load import read_deepspeed
from versatune_ds.config.schema import Config
from versatune_ds.data.plan.balance import check_world_size
from versatune_ds.engine.backend.optimizer import require_muon
from versatune_ds.engine.backend.zero_sizes import DEEPSPEED_SUB_GROUP, SUB_GROUP_KEY
from versatune_ds.foundations.errors import ConfigError, unknown_name

PASSED_KEYS = (
    *("aio", "comms_logger", "communication_data_type", "data_types", "disable_python_gc", "dump_state"),
    *("flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients"),
    *("wall_clock_breakdown", "zero_optimization"),
)
"""Top-level keys that do here what DeepSpeed's documentation says."""
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
    "timers": "(off: DeepSpeed's timer waits for the device in every forward)",
    "gradient_allreduce_op": "(the loss is divided by the tokens of all ranks, then gradients are averaged)",
    "zero_allow_untested_optimizer": "optimizer.states",
    "managed_gradient_accumulation": "(the loop says which pack ends a step)",
    "torch_autocast": "model.dtype",
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), "metrics"),
}
WITHOUT_EFFECT = {
    "activation_checkpointing": "is for models that call DeepSpeed's checkpoint function; set "
    "model.activation_checkpointing",
    "compile": "is for DeepCompile, which the trainer does not start; set model.compile",
    "autotuning": "is for DeepSpeed's autotuner, which cannot run the trainer; see versatune-ds plan",
    "data_efficiency": "is for DeepSpeed's data loader; set data and batch",
    "dataloader_drop_last": "is for DeepSpeed's data loader; set data and batch",
    "disable_allgather": "is read by nothing in DeepSpeed",
    "expert_parallel": "would put other layers into the model, which the trainer does not know",
    "hybrid_engine": "is for generating texts between steps, which the trainer does not do",
    "pipeline": "is for DeepSpeed's pipeline engine, which the trainer does not use",
    "seq_parallel_communication_data_type": "is for DeepSpeed's sequence parallelism; set "
    "batch.sequence_parallel",
    "tensor_parallel": "would change which ranks share data, which the trainer's sums do not know",
    "use_data_before_expert_parallelism": "is for expert parallelism, which the trainer does not have",
    "vocabulary_size": "only makes DeepSpeed print a warning",
    "weight_quantization": "is for inference",
    "zero_force_ds_cpu_optimizer": "is for optimizers other than DeepSpeed's own, which offloading takes",
}
ZERO_WITHOUT_EFFECT = {
    "allgather_partitions": "is read by nothing in DeepSpeed",
    "compute_grad_norm": "is on: in the norm the trainer finds gradients that are not finite",
    "cpu_offload": "is deprecated; set offload_optimizer: {device: cpu}",
    "cpu_offload_param": "is deprecated; set offload_param: {device: cpu}",
    "cpu_offload_use_pin_memory": "is deprecated; set pin_memory in offload_optimizer and offload_param",
    "elastic_checkpoint": "is for DeepSpeed's own checkpoints; any number of ranks reads the trainer's",
    "gather_16bit_weights_on_model_save": "is for DeepSpeed's own export; the trainer's needs no key",
    "legacy_stage1": "is refused by DeepSpeed",
    "load_from_fp32_weights": "is for DeepSpeed's own checkpoints; the trainer's always keep fp32 weights",
    "pipeline_loading_checkpoint": "is for DeepSpeed's own checkpoints",
    "save_muon_momentum_buffer_in_memory": "is for Muon offloaded to nvme, which the trainer refuses",
    "stage3_gather_16bit_weights_on_model_save": "is for DeepSpeed's own export; the trainer's needs no key",
    "stage3_gather_fp16_weights_on_model_save": "is for DeepSpeed's own export; the trainer's needs no key",
    "zenflow": "takes optimizer steps later than the trainer counts them",
    "zero_quantized_nontrainable_weights": "needs a call that the trainer does not make, and loses weights "
    "that are frozen before they are partitioned",
}
"""Keys of zero_optimization."""
ONLY_1_AND_2 = (
    *("allgather_bucket_size", "ignore_unused_parameters", "parameter_alignment", "round_robin_gradients"),
    "use_multi_rank_bucket_allreduce",
)
ONLY_3 = (
    *("leaf_module", "log_trace_cache_warnings", "memory_efficient_linear", "offload_param"),
    *("override_module_apply", "sub_group_size", "zero_hpz_partition_size", "zero_quantized_gradients"),
    "zero_quantized_weights",
)
STAGES: dict[str, tuple[int, ...]] = {
    "offload_optimizer": (1, 2, 3),
    **dict.fromkeys(ONLY_1_AND_2, (1, 2)),
    **dict.fromkeys(ONLY_3, (3,)),
}
"""ZeRO stages at which a key of zero_optimization does something, where not at all; keys that begin with
`stage3_` need stage 3."""

NVME_KEYS = {"buffer_count", "buffer_size", "fast_init", "max_in_cpu", "pipeline_read", "pipeline_write"}
"""Keys of offload_optimizer and offload_param that only swapping reads."""


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    Args:
        world_size: ranks, or groups of them that share a pack; divides `batch.packs_per_step`.

    Raises:
        ConfigError: the file is missing or not JSON, sets a key that we own, that is unknown, that would have
            no effect or would falsify gradients, DeepSpeed refuses a value, or the batch does not divide.
    """
    merged = read_deepspeed(config.deepspeed)
    for key in merged:
        if key in OWNED_KEYS:
            raise ConfigError(
                f"deepspeed: the key {key!r} is set by {OWNED_KEYS[key]}; remove it from the DeepSpeed file"
            )
        if key in WITHOUT_EFFECT:
            raise _without_effect(key, WITHOUT_EFFECT[key])
    merged["train_micro_batch_size_per_gpu"] = 1
    check_world_size(config.batch.packs_per_step, world_size, config.batch.sequence_parallel)
    merged["gradient_accumulation_steps"] = config.batch.packs_per_step // world_size
    merged["gradient_clipping"] = config.optimizer.max_grad_norm
    if config.model.dtype != "fp32":
        merged[config.model.dtype] = {"enabled": True}
    zero = merged.setdefault("zero_optimization", {"stage": 3})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed: zero_optimization is {zero!r}; it must be an object with a stage")
    if config.optimizer.states != "fp32":
        _require_states(merged)
        merged["zero_allow_untested_optimizer"] = True
    if config.optimizer.states == "bf16_stochastic":
        merged["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    merged["steps_per_print"] = 2**31
    merged["timers"] = {"throughput": {"enabled": False}}
    accepted = _require_accepted(merged)
    _require_effect(merged)
    offload = merged["zero_optimization"].get("offload_optimizer") or {}
    if config.optimizer.ema_decay is not None and (not zero_stage(merged) or offload.get("device") == "nvme"):
        raise ConfigError(
            "optimizer.ema_decay averages fp32 master weights, which ZeRO stage 0 does not keep and which "
            "offloading to nvme puts out of reach: use stage 1, 2 or 3 without nvme"
        )
    if config.optimizer.kind == "muon":
        require_muon(config, merged)
    _require_exact_gradients(accepted, config.model.dtype)
    return merged


def zero_stage(settings: Mapping[str, Any]) -> int:
    return int(settings["zero_optimization"].get("stage", 0))


def offloads_optimizer(settings: Mapping[str, Any]) -> bool:
    """True if the optimizer runs on the CPU (it then has to be DeepSpeed's own CPU Adam)."""
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def state_layout(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What decides how DeepSpeed lays out saved state, beside the number of ranks; part of a checkpoint."""
    model, adapter, stage = config.model, config.model.adapter, zero_stage(settings)
    groups = settings["zero_optimization"].get("sub_group_size", DEEPSPEED_SUB_GROUP)
    return {
        "ZeRO stage": stage,
        SUB_GROUP_KEY: groups if stage == 3 else None,
        "model.dtype": model.dtype,
        "model.adapter": adapter and adapter.model_dump(include={"kind", "rank", "alpha", "targets"}),
        "optimizer offload": offloads_optimizer(settings),
        "optimizer.states": config.optimizer.states,
        "optimizer.kind": config.optimizer.kind,
    }


def _require_states(settings: dict[str, Any]) -> None:
    """Refuse where only fp32 states can be held.

    Raises:
        ConfigError: stage 0, offloading, or gradients that are summed in another dtype.
    """
    problem = None
    if zero_stage(settings) == 0:
        problem = "ZeRO stage 0 has no states of its own; use stage 1, 2 or 3"
    elif offloads_optimizer(settings):
        problem = "DeepSpeed's CPU Adam, which offloading needs, holds fp32 states; remove offload_optimizer"
    elif "grad_accum_dtype" in settings.get("data_types", {}):
        problem = "data_types.grad_accum_dtype takes an optimizer of DeepSpeed's with fp32 states; remove it"
    if problem is not None:
        raise ConfigError(f"optimizer.states other than fp32: {problem}")


def _require_accepted(settings: dict[str, Any]) -> DeepSpeedConfig:
    """Refuse whatever DeepSpeed does not take."""
    try:
        return DeepSpeedConfig(copy.deepcopy(settings))
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"deepspeed: DeepSpeed {deepspeed.__version__} refuses these settings: {_reason(error)}"
        ) from error


def _require_effect(settings: dict[str, Any]) -> None:
    """Refuse unknown keys of the top level, and what would change nothing within the sections."""
    for key in settings:
        if key not in PASSED_KEYS and key not in OWNED_KEYS:
            raise ConfigError(f"deepspeed: {unknown_name('key', key, PASSED_KEYS)}")
    zero, stage = settings["zero_optimization"], zero_stage(settings)
    for key in zero:
        if key in ZERO_WITHOUT_EFFECT:
            raise _without_effect(f"zero_optimization.{key}", ZERO_WITHOUT_EFFECT[key])
        stages = (3,) if key.startswith("stage3_") else STAGES.get(key)
        if stages is not None and stage not in stages:
            needed = " or ".join(map(str, stages))
            why = f"works at ZeRO stage {needed}; this is {stage}"
            raise _without_effect(f"zero_optimization.{key}", why)
    for key in ("gradient_predivide_factor", "prescale_gradients"):
        # above, DeepSpeed 0.19.8 refuses it once the model is built or, at stage 3 with reduce_scatter false
        # and a factor of the number of ranks, divides twice
        if key in settings and stage > 1:
            raise _without_effect(key, f"works at ZeRO stage 0 or 1; this is {stage}")
    sections = {key: zero.get(key) or {} for key in ("offload_optimizer", "offload_param")}
    for key, section in sections.items():
        if (section.get("device") == "nvme") != (section.get("nvme_path") is not None):
            raise ConfigError(
                f"deepspeed: zero_optimization.{key} needs both device: nvme and nvme_path, a folder on a "
                f"local disk, or neither; found {section}"
            )
        for inner in sorted(section.keys() & NVME_KEYS):
            if section.get("device") != "nvme":
                raise _without_effect(f"zero_optimization.{key}.{inner}", "is for device: nvme")
    on_nvme = [key for key, section in sections.items() if section.get("device") == "nvme"]
    if on_nvme and stage != 3:
        raise ConfigError(
            f"deepspeed: zero_optimization.{on_nvme[0]} to nvme works at ZeRO stage 3; this is {stage}, "
            "where DeepSpeed would keep it in host memory. Set stage 3, or device: cpu"
        )
    if "aio" in settings and not on_nvme:
        raise _without_effect("aio", "is for offloading to nvme, and nothing is")
    for key in settings.get("aio") or {}:
        if key not in AIO_DEFAULT_DICT:
            raise ConfigError(f"deepspeed: {unknown_name('key of aio', key, sorted(AIO_DEFAULT_DICT))}")
    for key in settings.get("data_types") or {}:
        if key != "grad_accum_dtype":
            raise _without_effect(
                f"data_types.{key}",
                "is set by model.dtype, and buffers stay in fp32; only grad_accum_dtype may stand there",
            )


def _require_exact_gradients(accepted: DeepSpeedConfig, dtype: str) -> None:
    """Refuse what DeepSpeed takes and what would falsify gradients in silence.

    DeepSpeed 0.19.8 hands the gradients to its 4-bit kernel as they are (`all_to_all_quant_reduce` in
    runtime/comm/coalesced_collectives.py), and the kernel reads any memory as fp16 (`swizzle_quant` in
    csrc/quantization/pt_binding.cpp): bf16 gradients of 1e-3, 1e-5 and 1e-8 become 0.81, 0.45 and 0.19.
    `communication_data_type: fp16` would convert them first, but only fp16 runs scale the loss: gradients
    below 6e-8 would be lost, and most of a large model's are not far above. Weights
    (`zero_quantized_weights`) are converted there and back, and int8 steps are coarser than fp16's.
    """
    sent_as_fp16 = accepted.communication_data_type is torch.float16
    if sent_as_fp16 and dtype != "fp16":
        raise ConfigError(
            f"deepspeed: communication_data_type fp16 loses gradients below 6e-8 when model.dtype is "
            f"{dtype}, because only fp16 runs scale the loss; remove it, or set bf16 or fp32"
        )
    is_fp16 = dtype == "fp16" and (sent_as_fp16 or accepted.communication_data_type is None)
    if accepted.zero_config.zero_quantized_gradients and not is_fp16:
        raise ConfigError(
            f"deepspeed: zero_optimization.zero_quantized_gradients with model.dtype {dtype}: DeepSpeed's "
            "4-bit kernel reads gradients as fp16 whatever they are, so they would be noise. Remove it; "
            "zero_hpz_partition_size and zero_quantized_weights may stay"
        )


def _without_effect(key: str, why: str) -> ConfigError:
    return ConfigError(f"deepspeed: {key} is of no use here: it {why}. Remove it from the DeepSpeed file")


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
