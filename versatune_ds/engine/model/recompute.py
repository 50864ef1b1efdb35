"""What layers keep for backward, and what they compute again (`model.activation_checkpointing`).

`all` and n keep a layer's input and run its forward once more. `offload` moves these inputs to pinned host
memory as they are made and fetches each back while the layer behind it works; on a CPU it is a copy.
`selective` keeps the outputs of matrix products and attention, too: what is computed again is elementwise. It
is torch's selective checkpointing, but that torch's would see the operators that fetch weights under ZeRO-3,
which in backward are others than in forward; here it sees those that are kept.

What is not covered: torch.compile with `selective` and `offload` (refused in `config/model.py`).
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from versatune_ds.foundations.errors import ConfigError

KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
}
"""Operators whose outputs `selective` keeps. The scores of eager attention are not among them."""


def recompute_in_backward(lm: PreTrainedModel, policy: str | int) -> None:
    """Apply `model.activation_checkpointing` to a model's layers; ConfigError where they cannot recompute."""
    if policy == "off":
        return
    run: Any = functools.partial(checkpoint, use_reentrant=False)
    if policy == "selective":
        run = functools.partial(run, context_fn=_keeping)
    if policy == "offload":
        run = HostInputs().checkpoint
    every = policy if isinstance(policy, int) else 1
    layers: Any = lm.base_model.layers
    for layer in layers[::every]:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ConfigError(
                f"layers of {type(lm).__name__} cannot recompute; set model.activation_checkpointing: off"
            )
        recompute: Any = layer
        recompute.gradient_checkpointing = True
        recompute._gradient_checkpointing_func = run


class KeptOnly(TorchDispatchMode):
    """Shows the kept operators to one of torch's two modes (save, reuse) and runs all others as they are.

    Args:
        copies: give away a copy of what is kept: DeepSpeed 0.19.8 has a linear layer of its own under ZeRO-3,
            which adds the bias to the product in place (runtime/zero/linear.py). It would be added once more
            when the layer is computed again, and torch does not see it.
    """

    def __init__(self, mode: Any, copies: bool = False) -> None:
        super().__init__()
        self.mode, self.copies = mode, copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operator."""
        if func.name() not in KEPT:
            return func(*args, **(kwargs or {}))
        out = self.mode.__torch_dispatch__(func, types, args, kwargs)
        return out.clone() if self.copies and func.name() == "aten::mm" else out


def _keeping() -> tuple[KeptOnly, KeptOnly]:
    """Contexts of one layer's forward and of its recomputation."""
    # of what `KeptOnly` shows them
    save, reuse = create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    return KeptOnly(save, torch.nn.functional.linear is not torch._C._nn.linear), KeptOnly(reuse)


class _Held:
    """A layer's input on its way."""

    def __init__(self, host: torch.Tensor, device: torch.device, before: weakref.ref[_Held] | None) -> None:
        self.host, self.device, self.before = host, device, before
        """`before`: the input of the layer before, if backward still needs it."""
        self.back: torch.Tensor | None = None


class HostInputs:
    """Layer inputs in host memory from forward to backward; shared by all layers of a model."""

    def __init__(self) -> None:
        self._last: weakref.ref[_Held] | None = None
        self._stream: Any = None

    def checkpoint(self, function: Any, *inputs: Any) -> Any:
        """torch's checkpoint, whose inputs (not what `function` saves) pass through the hooks."""
        with saved_tensors_hooks(self._away, self._back):
            return checkpoint(function, *inputs, use_reentrant=False)

    def _away(self, tensor: torch.Tensor) -> _Held:
        if tensor.device.type != "cuda":
            host = tensor.detach().clone()
        else:
            self._stream = self._stream or torch.cuda.Stream(tensor.device)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                host.copy_(tensor.detach(), non_blocking=True)
            tensor.record_stream(self._stream)
        held = _Held(host, tensor.device, self._last)
        self._last = weakref.ref(held)
        return held

    def _back(self, held: _Held) -> torch.Tensor:
        self._fetch(held)
        assert held.back is not None
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
            held.back.record_stream(torch.cuda.current_stream())
        before = held.before() if held.before is not None else None
        if before is not None:
            self._fetch(before)  # while this layer works
        return held.back

    def _fetch(self, held: _Held) -> None:
        if held.back is None:
            with torch.cuda.stream(self._stream):  # None: no effect
                held.back = held.host.to(held.device, non_blocking=True)
