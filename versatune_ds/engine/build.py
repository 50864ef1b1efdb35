"""Starting up and closing down: process group, model, optimizer and DeepSpeed engine in the right order.

What is not covered: data, statistics and the loop (`engine/train.py`).
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import socket
import time
import warnings
from datetime import timedelta
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from versatune_ds.config.schema import DEFAULT_COLLECTIVE_TIMEOUT_S, Config
from versatune_ds.engine import deepspeed_config as settings_for
from versatune_ds.engine.attention import AttentionChoice, choose_attention, isolation_leak
from versatune_ds.engine.leftovers import shared_memory_buffer, take_away_leftovers
from versatune_ds.engine.model import (
    PackedCausalLM,
    build_model,
    float32_buffers,
    restore_buffers,
)
from versatune_ds.engine.optimizer import build_optimizer
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError, VersaTuneError
from versatune_ds.foundations.log import get_logger
from versatune_ds.observability.throughput import peak_tflops
from versatune_kernels import KernelError, resolve_backend

log = get_logger(__name__)

MAX_ISOLATION_LEAK = {"cpu": 1e-6, "cuda": 1e-2}
"""Largest accepted relative change of a sample by its neighbour. Exactly 0 is expected; CUDA kernels may
choose another split of the same sum, which in bf16 moves the last bits; a leak moves losses by order 1."""


class Engine(NamedTuple):
    """A model ready to train."""

    deepspeed: Any
    """The DeepSpeed engine around `model`."""
    model: PackedCausalLM
    device: torch.device
    attention: AttentionChoice
    settings: dict[str, Any]
    """The DeepSpeed configuration in force."""


def start_process_group(timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S) -> torch.device:
    """Join the process group (alone without a launcher) and return this rank's device.

    What was imported so far is taken out of garbage collection: half a million objects that will stay, and
    each of DeepSpeed's explicit collections, or one in the middle of a step, would go through all of them.

    Args:
        timeout_s: how long ranks wait for each other, here and in every collective.

    Raises:
        VersaTuneError: the ranks do not meet.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        device = torch.device("cpu")
    else:
        accelerator.set_device(distributed.local_rank())
        device = torch.device(accelerator.device_name(), distributed.local_rank())
    take_away_leftovers()
    gc.freeze()
    # torch 2.13 renames collectives that DeepSpeed 0.19 calls; the hint is for its authors
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
    try:
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name(),
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise VersaTuneError(_why_ranks_cannot_meet(str(error).splitlines()[0], timeout_s)) from error
    return device


def _why_ranks_cannot_meet(reason: str, timeout_s: float) -> str:
    """What the first line of torch's error means for the user."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "timed out" in reason.lower():
        return (
            f"not all ranks came to {where} within {timeout_s:g} s (run.collective_timeout_s): {reason} Were "
            "all nodes started, did a rank fail before, and can all nodes reach that address (name, port, "
            "firewall)?"
        )
    return (
        f"the ranks cannot meet at {where}: {reason} Is another run using it? Give "
        "this one its own: deepspeed --master_port PORT ..., or MASTER_PORT=PORT for other launchers."
    )


def close_process_group() -> None:
    """Leave together, after a run that went well."""
    dist.barrier()
    leave_process_group()


def leave_process_group() -> None:
    """Leave alone, if there is a group to leave.

    Without the pause gloo aborts some runs at exit: DeepSpeed still holds the group.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    shared_memory_buffer().unlink(missing_ok=True)
    time.sleep(0.5)


def build_engine(config: Config, device: torch.device) -> Engine:
    """Build model, optimizer and DeepSpeed engine, and prove that packed samples are kept apart.

    Raises:
        ConfigError: settings that do not fit together or this machine.
        VersaTuneError: the attention backend mixes samples.
    """
    settings = settings_for.deepspeed_config(config, distributed.world_size())
    if config.model.dtype != "fp32" and settings_for.zero_stage(settings) == 0:
        raise ConfigError("deepspeed: ZeRO stage 0 keeps no fp32 master weights; use stage 1, 2 or 3")
    model, attention = _build_model(config, device, settings)
    buffers = float32_buffers(model)
    optimizer = build_optimizer(model, config.optimizer, settings_for.offloads_optimizer(settings))
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    restore_buffers(model, buffers)
    built = Engine(engine, model, device, attention, settings)
    check_isolation(built)
    return built


def build_for_evaluation(config: Config, device: torch.device) -> Engine:
    """Build a model that only goes forward: no gradients, no optimizer.

    With ZeRO-3 it is partitioned over the ranks; with any other stage each rank holds all of it.

    Raises:
        ConfigError, VersaTuneError: as `build_engine`.
    """
    settings = settings_for.deepspeed_config(config, world_size=1)  # batch sizes do not matter here
    settings["zero_optimization"].pop("offload_optimizer", None)
    model, attention = _build_model(config, device, settings)
    model.requires_grad_(False)
    forward: Any = model
    if settings_for.zero_stage(settings) == 3:
        buffers = float32_buffers(model)
        forward, _, _, _ = deepspeed.initialize(model=model, config=settings)
        restore_buffers(model, buffers)
    else:
        model.to(device)
    built = Engine(forward, model, device, attention, settings)
    check_isolation(built)
    return built


def _build_model(
    config: Config, device: torch.device, settings: dict[str, Any]
) -> tuple[PackedCausalLM, AttentionChoice]:
    """The model (partitioned as it is made under ZeRO-3) and how it attends."""
    if config.model.trust_remote_code:
        log.warning("model.trust_remote_code is on: Python code of %s will run here", config.model.source)
    if config.model.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("model.dtype fp16 needs CUDA; use bf16 or fp32 on CPUs")
    try:
        resolve_backend(config.model.loss_backend, device.type)
    except KernelError as error:
        raise ConfigError(f"model.loss_backend: {error}") from None
    attention = choose_attention(config.model, device.type)
    is_zero3 = settings_for.zero_stage(settings) == 3
    zero3 = HfDeepSpeedConfig(settings) if is_zero3 else None  # kept alive: transformers looks it up
    model = build_model(config.model, attention, config.run.seed, device.type)
    unset_hf_deepspeed_config()
    del zero3
    return model, attention


def check_isolation(built: Engine) -> None:
    """Run the real model on a two-sample probe; raises VersaTuneError if one sample sees the other."""
    built.deepspeed.eval()
    leak = isolation_leak(built.deepspeed, built.model.lm.config.vocab_size, built.device)
    built.deepspeed.train()
    if not math.isfinite(leak):
        raise VersaTuneError(
            f"model.source {built.model.lm.config.name_or_path!r} gives losses that are not finite on "
            "a short probe; "
            "its weights are damaged, or model.dtype is too narrow for it"
        )
    if leak > MAX_ISOLATION_LEAK[built.device.type]:
        raise VersaTuneError(
            f"attention {built.attention.implementation} mixes packed samples (relative leak {leak:.2e}); "
            "choose another model.attention, and report the versions shown by versatune-ds doctor"
        )


def discard_step(built: Engine) -> None:
    """Forget the gradients of the current accumulation window, as if its micro-batches had never run."""
    # what DeepSpeed itself does when a loss scale overflows
    optimizer = built.deepspeed.optimizer
    optimizer.zero_grad()
    if getattr(optimizer, "averaged_gradients", None):
        optimizer.averaged_gradients = {}
    if settings_for.zero_stage(built.settings) in (1, 2):
        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    if settings_for.offloads_optimizer(built.settings):
        optimizer.reset_cpu_buffers()


def gradients_are_finite(built: Engine) -> bool:
    """False if the averaged gradients hold NaN or infinity and DeepSpeed would apply them all the same.

    ZeRO stages check for themselves in `step`; stage 0 does not. The gradients are averaged already, so all
    ranks see the same.
    """
    if settings_for.zero_stage(built.settings) > 0:
        return True
    gradients = [p.grad for p in built.model.parameters() if p.grad is not None]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Facts about the machine for run.json."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "devices_per_node": torch.cuda.device_count() if cuda else 0,
        "cpu_count": os.cpu_count(),
    }


def accelerator_peak_tflops(config: Config, device: torch.device) -> float | None:
    """Dense peak of one accelerator in TFLOP/s, for MFU; None on a CPU and, with a warning, if unknown."""
    name = describe_hardware(device)["device"]
    peak = config.metrics.peak_tflops or peak_tflops(name)
    if peak is None and device.type != "cpu":
        log.warning(
            "the dense peak of %s is not known, so there is no MFU; set metrics.peak_tflops to what its "
            "data sheet says for model.dtype without sparsity",
            name,
        )
    return peak


def describe_versions() -> dict[str, str]:
    """Versions of what computes, for run.json."""
    import transformers

    import versatune_ds

    versions = {
        "versatune_ds": versatune_ds.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deepspeed": deepspeed.__version__,
    }
    for name in ("triton", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            versions[name] = getattr(__import__(name), "__version__", "installed")
    return versions


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
