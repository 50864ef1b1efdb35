"""Attention that keeps packed samples apart, on every backend.

A pack is one row of several samples. On CPUs transformers builds a block-diagonal mask from position ids that
restart, which it does only without an attention mask and without a cache. On CUDA a varlen kernel gets the
sample boundaries: flash-attn when it is installed, else torch's own. `isolation_leak` measures, on the real
model, that a neighbour's tokens change nothing; a backend that leaks is an error, never a warning.

What is not covered: sliding-window layers with a window shorter than a sample, and capped scores, on the
varlen backend (both refused); sequence parallelism.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from versatune_ds.config.schema import Model
from versatune_ds.foundations.constants import IGNORE_INDEX
from versatune_ds.foundations.errors import ConfigError
from versatune_kernels import LossOutput

VARLEN = "versatune_varlen"
NAMES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether torch's kernel wants to be told of grouped heads; the one of torch 2.11 takes them as they are."""
PROBE_SAMPLE_TOKENS = 16


class AttentionChoice(NamedTuple):
    """Name for transformers' `attn_implementation`, and why it was chosen."""

    implementation: str
    reason: str


def choose_attention(settings: Model, device_type: str) -> AttentionChoice:
    """The attention implementation for a device.

    Args:
        settings: `model` section; `attention` names a backend or is `auto`.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: the named backend cannot run here or cannot keep samples apart here.
    """
    flash = importlib.util.find_spec("flash_attn") is not None
    wanted = settings.attention
    if device_type == "cpu":
        if wanted not in ("auto", "sdpa"):
            raise ConfigError(f"model.attention {wanted} needs CUDA; use auto or sdpa on CPUs")
        return AttentionChoice("sdpa", "CPU: sdpa with a block-diagonal mask")
    if settings.dtype == "fp32":
        if wanted not in ("auto", "sdpa"):
            raise ConfigError(f"model.attention {wanted} computes in bf16 or fp16; model.dtype is fp32")
        return AttentionChoice("sdpa", "fp32: varlen kernels need bf16 or fp16; block-diagonal mask")
    if wanted == "sdpa":
        return AttentionChoice("sdpa", "asked for; the mask is quadratic in batch.pack_len")
    if wanted == "flash_attention_2" and not flash:
        raise ConfigError(
            "model.attention flash_attention_2: flash-attn is not installed; pip install "
            "'versatune-ds[cuda]', or use model.attention: varlen"
        )
    if wanted == "flash_attention_2" or (wanted == "auto" and flash):
        return AttentionChoice("flash_attention_2", "flash-attn is installed")
    register_varlen()
    reason = "asked for" if wanted == "varlen" else "flash-attn is not installed: torch's varlen kernel"
    return AttentionChoice(VARLEN, reason)


def register_varlen() -> None:
    """Make torch's varlen kernel known to transformers under the name `VARLEN`.

    It needs no mask, and none is registered: for a name without one transformers (5.17 and 5.23,
    `_preprocess_mask_arguments`) returns at once, and with one it would first look whether the position ids
    hold several sequences, for which the host waits for the device in every forward.
    """
    AttentionInterface.register(VARLEN, varlen_attention)


def varlen_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within segments, for transformers' AttentionInterface.

    Args:
        query: [1, heads, T, head_dim]; key, value: [1, kv_heads, T, head_dim].
        scaling: softmax scale; default 1 / sqrt(head_dim).
        kwargs: must hold `cu_seq_lens_q` int32[S+1] and `max_length_q` int.

    Returns:
        [1, T, heads, head_dim] and None (no attention weights).
    """
    boundaries, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if boundaries is None or longest is None:
        raise ConfigError("varlen attention was called without sample boundaries: samples would mix")
    if sliding_window is not None and sliding_window < longest:
        raise ConfigError("varlen attention does not do sliding windows; use flash_attention_2")
    if kwargs.get("softcap") is not None:
        raise ConfigError("varlen attention does not cap its scores; use flash_attention_2")
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if NAMES_GROUPED_HEADS else {}
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0), None


@torch.no_grad()
def isolation_leak(model: Callable[..., LossOutput], vocab_size: int, device: torch.device) -> float:
    """How much a neighbour in the pack changes a sample's token losses; 0 where samples are kept apart.

    Two samples share a pack; the first one's tokens are replaced; the second one's losses are compared. All
    ranks must call it together (under ZeRO-3 it gathers the model).

    Args:
        model: the DeepSpeed engine, or a `PackedCausalLM`.
        vocab_size: token ids are drawn below it.
        device: where the model computes.

    Returns:
        The largest absolute change over the largest loss.
    """
    n = PROBE_SAMPLE_TOKENS
    tokens = torch.arange(2 * n, device=device) % vocab_size
    changed = tokens.clone()
    changed[:n] = (changed[:n] + vocab_size // 2 + 1) % vocab_size
    labels = tokens.roll(-1)
    labels[n - 1], labels[2 * n - 1] = IGNORE_INDEX, IGNORE_INDEX

    def losses(ids: torch.Tensor) -> torch.Tensor:
        out = model(
            input_ids=ids,
            position_ids=torch.arange(n, device=device).repeat(2),
            labels=labels,
            sample_ids=torch.arange(2, device=device).repeat_interleave(n),
            cu_seqlens=torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device),
            max_seqlen=n,
            num_samples=2,
            num_valid=2 * (n - 1),
            normalizer=1.0,
        )
        return out.token_loss[n:]

    before, after = losses(tokens), losses(changed)
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-12))
