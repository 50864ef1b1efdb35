"""A `Backend` with DeepSpeed: the model partitioned by ZeRO, its optimizer, and DeepSpeed's files.

Also the bare model for evaluation, without gradients: partitioned under ZeRO-3, whole otherwise.

Where the host waits for the device in what DeepSpeed 0.19.8 does under ZeRO-3 and offers no setting for:
after each backward for the stream that reduces gradients (their buffers are used again), before a parameter
is fetched for an older fetch (which bounds memory; on one rank for the fetch itself), and at the optimizer
step for the norm, to see whether it is finite. With flash-attn transformers looks in every forward whether
position ids hold several sequences; torch's varlen kernel is spared that (`attention.register_varlen`).

What is not covered: which settings DeepSpeed gets (`deepspeed_config.py`), and dividing a saved state anew
(`reshard.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import set_z3_leaf_modules
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from versatune_ds.config.schema import Config, Optimizer
from versatune_ds.engine.backend.backend import Backend, Write, all_names
from versatune_ds.engine.backend.deepspeed_config import (
    deepspeed_config,
    offloads_optimizer,
    state_layout,
    zero_stage,
)
from versatune_ds.engine.backend.optimizer import (
    average_weights,
    build_optimizer,
    set_learning_rate,
    settle_averages,
)
from versatune_ds.engine.backend.process_group import sequence_group
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.backend.reshard import load_resharded
from versatune_ds.engine.backend.safe_loading import tensors_only
from versatune_ds.engine.model.adapters import MAGNITUDE
from versatune_ds.engine.model.attention import AttentionChoice, choose_attention
from versatune_ds.engine.model.isolation import PROBE_TOKENS, probe_packs
from versatune_ds.engine.model.packed_lm import PackedCausalLM, build_model, float32_buffers, restore_buffers
from versatune_ds.engine.model.rope import turning_length
from versatune_ds.engine.model.sequence import check_heads, share_heads
from versatune_ds.engine.model.source import load_architecture, multiplies_bf16
from versatune_ds.foundations.errors import ConfigError, StateError, VersaTuneError
from versatune_ds.foundations.log import get_logger
from versatune_kernels import KernelError, LossOutput, resolve_backend

log = get_logger(__name__)

MAX_ISOLATION_LEAK = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
"""Largest accepted relative change of a sample by its neighbour. Exactly 0 is expected of dense models on
CPUs; CUDA kernels, and products over an expert's tokens, may split the same sum otherwise."""


class HandingOver(TorchCheckpointEngine):
    """What DeepSpeed calls a checkpoint engine: it hands everything that is to be saved to `write`."""

    def __init__(self) -> None:
        super().__init__()
        self.write: Write | None = None
        self.left_out: frozenset[str] = frozenset()
        """Names in the model's state that are not saved. (DeepSpeed leaves out frozen parameters by their
        first name, and still writes a tied head.)"""

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Called by DeepSpeed for each file."""
        assert self.write is not None
        for name in self.left_out & state_dict.get("module", {}).keys():
            del state_dict["module"][name]
        self.write(state_dict, Path(path))


class DeepSpeedBackend:
    """See `Backend`.

    Args:
        live: the DeepSpeed engine around `model`, or `model` itself where it only goes forward.
    """

    def __init__(
        self,
        live: Any,
        model: PackedCausalLM,
        device: torch.device,
        attention: AttentionChoice,
        settings: Mapping[str, Any],
        layout: dict[str, Any],
        ranks: Ranks,
        optimizer: Optimizer,
    ) -> None:
        self.ema_decay, self.muon_factor = optimizer.ema_decay, (optimizer.muon_lr or 0.0) / optimizer.lr
        self.live, self.model, self.device, self.attention = live, model, device, attention
        self.settings, self.layout, self.ranks = settings, layout, ranks
        self._files = HandingOver()
        self._trains_a_part = layout["model.adapter"] is not None or model.base is not None
        """Then files hold what is trained, and the rest comes from the model's own folder."""
        if self._trains_a_part:
            parameters = model.named_parameters(remove_duplicate=False)
            self._files.left_out = frozenset(name for name, p in parameters if not p.requires_grad)
        if live is not model:
            live.checkpoint_engine = self._files
            # it copies scripts into every checkpoint between two barriers; a full disk would part ranks
            live._copy_recovery_script = lambda path: None

    # --- a step ---------------------------------------------------------------------------------------------

    def forward(self, **inputs: Any) -> LossOutput:
        out: LossOutput = self.live(**inputs)
        return out

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        self.live.set_gradient_accumulation_boundary(is_last)
        # clone: at ZeRO stage 0 DeepSpeed 0.19.8 divides the gradient of a model output by the accumulation
        # steps in spite of scale_wrt_gas; the hook that should prevent it runs too late on that very tensor
        self.live.backward(loss.clone(), scale_wrt_gas=False)

    def gradients_are_finite(self) -> bool:
        """As `Backend.gradients_are_finite`.

        ZeRO stages check for themselves in `step`; stage 0 does not. The gradients are averaged already, so
        all ranks see the same.
        """
        if zero_stage(self.settings) > 0:
            return True
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

    def step(self, learning_rate: float) -> bool:
        set_learning_rate(self.live.optimizer, learning_rate, self.muon_factor)
        self.live.step()
        applied = bool(self.live.was_step_applied())
        if applied and self.ema_decay is not None:
            average_weights(self.live.optimizer.optimizer.state, self.ema_decay)
        return applied

    def discard(self) -> None:
        # what DeepSpeed itself does when a loss scale overflows
        optimizer = self.live.optimizer
        optimizer.zero_grad()
        if getattr(optimizer, "averaged_gradients", None):
            optimizer.averaged_gradients = {}
        if zero_stage(self.settings) in (1, 2):
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        if offloads_optimizer(self.settings):
            optimizer.reset_cpu_buffers()

    def grad_norm(self) -> float | None:
        norm = self.live.get_global_grad_norm()
        return None if norm is None else float(norm)

    # --- the model ------------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.live.eval()
        with torch.no_grad():
            yield
        self.live.train()

    def parameters(self, wanted: Callable[[str], bool] = all_names) -> Iterator[tuple[str, torch.Tensor]]:
        """As `Backend.parameters`; a collective per partitioned parameter."""
        for name, parameter in self.model.own_parameters():
            if not wanted(name):
                continue
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                    yield name, parameter.data
            else:
                yield name, parameter.data

    # --- state ----------------------------------------------------------------------------------------------

    def save(self, folder: Path, write: Write) -> None:
        self._files.write = write
        self.live.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            save_latest=False,
            exclude_frozen_parameters=self._trains_a_part,
        )

    def load(self, folder: Path, layout: Mapping[str, Any], world_size: int) -> None:
        """As `Backend.load`; bit for bit with as many ranks and this layout, else shards are divided anew."""
        self._load(folder, layout, world_size)
        if self.layout["ZeRO stage"] > 0:
            settle_averages(self.live.optimizer.optimizer.state, self.ema_decay)

    def _load(self, folder: Path, layout: Mapping[str, Any], world_size: int) -> None:
        if self.layout["ZeRO stage"] == 0 or (world_size == self.ranks.size and layout == self.layout):
            with tensors_only(folder):
                loaded, _ = self.live.load_checkpoint(
                    str(folder.parent),
                    tag=folder.name,
                    load_lr_scheduler_states=False,
                    load_module_strict=not self._trains_a_part,
                )
            if loaded is None:
                raise StateError(f"{folder}: DeepSpeed found nothing to load there")
            return
        changes = {key: (layout[key], value) for key, value in self.layout.items()}
        changes["ranks"] = (world_size, self.ranks.size)
        moved = [f"{key} {old} -> {new}" for key, (old, new) in changes.items() if old != new]
        log.info("dividing the state of %s anew: %s", folder.name, ", ".join(moved))
        load_resharded(folder, world_size, self.live)

    def close(self) -> None:
        self.live.destroy()


def build_backend(
    config: Config, settings: dict[str, Any], ranks: Ranks, device: torch.device
) -> DeepSpeedBackend:
    """Build model, optimizer and DeepSpeed engine, and prove that packed samples are kept apart.

    Raises:
        ConfigError: settings that do not fit together or this machine.
        VersaTuneError: the attention backend mixes samples.
    """
    if config.model.dtype != "fp32" and zero_stage(settings) == 0:
        raise ConfigError("deepspeed: ZeRO stage 0 keeps no fp32 master weights; use stage 1, 2 or 3")
    model, attention = _build_model(config, device, settings, ranks)
    buffers = float32_buffers(model)
    optimizer = build_optimizer(model, config.optimizer, offloads_optimizer(settings))
    live, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    restore_buffers(model, buffers)
    if config.model.compile == "layers":
        model.compile_layers()
    layout = state_layout(settings, config)
    backend = DeepSpeedBackend(live, model, device, attention, settings, layout, ranks, config.optimizer)
    check_isolation(backend, config)
    return backend


def build_for_evaluation(config: Config, device: torch.device) -> DeepSpeedBackend:
    """Build a model that only goes forward: no gradients, no optimizer.

    With ZeRO-3 it is partitioned over the ranks; with any other stage each rank holds all of it.

    Raises:
        ConfigError, VersaTuneError: as `build_backend`.
    """
    settings = deepspeed_config(config, world_size=1)  # batch sizes do not matter here
    settings["zero_optimization"].pop("offload_optimizer", None)
    ranks = Ranks.of_world(config.batch.sequence_parallel)
    model, attention = _build_model(config, device, settings, ranks)
    model.requires_grad_(False)
    live: Any = model
    if zero_stage(settings) == 3:
        buffers = float32_buffers(model)
        live, _, _, _ = deepspeed.initialize(model=model, config=settings)
        restore_buffers(model, buffers)
    else:
        model.to(device)
    layout = state_layout(settings, config)
    backend = DeepSpeedBackend(live, model, device, attention, settings, layout, ranks, config.optimizer)
    check_isolation(backend, config)
    return backend


def _build_model(
    config: Config, device: torch.device, settings: dict[str, Any], ranks: Ranks
) -> tuple[PackedCausalLM, AttentionChoice]:
    """The model (partitioned as it is made under ZeRO-3) and how it attends."""
    if config.model.trust_remote_code:
        log.warning("model.trust_remote_code is on: Python code of %s will run here", config.model.source)
    if config.model.dtype == "fp16" and device.type == "cpu":
        raise ConfigError("model.dtype fp16 needs CUDA; use bf16 or fp32 on CPUs")
    if config.model.dtype == "bf16" and device.type == "cpu" and not multiplies_bf16():
        log.warning("this CPU has no bf16 units: fp32 is many times faster here; set model.dtype: fp32")
    try:
        loss = resolve_backend(config.model.loss_backend, device.type)
    except KernelError as error:
        raise ConfigError(f"model.loss_backend: {error}") from None
    if config.model.logits_dtype == "compute" and loss.name != "triton":
        raise ConfigError(
            f"model.logits_dtype compute: only the triton loss holds 16-bit logits, and this run takes "
            f"{loss.name} ({loss.reason}); use fp32"
        )
    architecture = load_architecture(config.model)
    caps_scores = getattr(architecture, "attn_logit_softcapping", None) is not None
    attention = choose_attention(config.model, device.type, caps_scores, ranks.sp.size > 1)
    sequence = sequence_group(ranks, config.run.collective_timeout_s)
    if sequence is not None:
        check_heads(architecture.num_attention_heads, sequence.size)
        attention = share_heads(attention, sequence.size)
    is_zero3 = zero_stage(settings) == 3
    zero3 = HfDeepSpeedConfig(settings) if is_zero3 else None  # kept alive: transformers looks it up
    model = build_model(config.model, attention, config.run.seed, device.type, sequence)
    if is_zero3:
        _share_with_dora(model)
        if config.model.compile == "layers":
            # fetched and released as one, outside of what is compiled, not by hooks of each matrix in it
            set_z3_leaf_modules(model, list({type(layer) for layer in model.layers}))
    unset_hf_deepspeed_config()
    del zero3
    return model, attention


def _share_with_dora(model: PackedCausalLM) -> None:
    """Let ZeRO-3 gather a frozen weight for DoRA's layer, too, which computes the norms of its rows."""
    layer: Any
    for layer in model.modules():
        for dora in getattr(layer, MAGNITUDE, {}).values():
            deepspeed.zero.register_external_parameter(dora, layer.base_layer.weight)


def check_isolation(backend: Backend, config: Config) -> None:
    """Run the real model on a probe of packed samples.

    Raises:
        VersaTuneError: one sample sees another, or ranks that share a pack compute something else.
    """
    architecture = backend.model.lm.config
    turn = turning_length(architecture)
    # two samples below the turn beside one beyond it
    longer = PROBE_TOKENS if turn is None else min(2 * turn - 2, config.batch.pack_len)
    with backend.evaluating():
        leak, error = probe_packs(
            backend.forward, architecture.vocab_size, backend.device, longer, backend.ranks.sp
        )
    if not math.isfinite(leak):
        raise VersaTuneError(
            f"model.source {architecture.name_or_path!r} gives losses that are not finite on a short probe; "
            "its weights are damaged, or model.dtype is too narrow for it"
        )
    if leak > MAX_ISOLATION_LEAK[config.model.dtype]:
        raise VersaTuneError(
            f"attention {backend.attention.implementation} mixes packed samples (relative leak {leak:.2e}); "
            "choose another model.attention, and report the versions shown by versatune-ds doctor"
        )
    if not error <= MAX_ISOLATION_LEAK[config.model.dtype]:
        raise VersaTuneError(
            f"batch.sequence_parallel {backend.ranks.sp.size}: a shared pack has other losses than the whole "
            f"one (relative error {error:.2e}), so a layer of {architecture.model_type} mixes tokens outside "
            "of its attention; set batch.sequence_parallel: 1"
        )
