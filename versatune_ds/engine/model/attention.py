"""Attention that keeps packed samples apart, on every backend.

A pack is one row of several samples, and attention gets their boundaries: on CUDA a varlen kernel
(FlashAttention 3 under torch's on Hopper, else flash-attn, else torch's own, whichever is installed), on CPUs
torch's sdpa, one sample after the other. `sdpa` over the whole pack is the fallback: transformers then builds
a block-diagonal mask from position ids that restart, which it does only without an attention mask and without
a cache. `isolation.py` measures on the real model that a neighbour's tokens change nothing.

What is not covered: capped scores (Gemma 2) and attention sinks on the varlen backend (both refused), and
packs that ranks share (`sequence.py`).
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import attention as attention_kernels
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from versatune_ds.config.model import Model
from versatune_ds.foundations.errors import ConfigError

VARLEN, BY_SAMPLE = "versatune_varlen", "versatune_by_sample"
NAMES_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether torch's kernel wants to be told of grouped heads; the one of torch 2.11 takes them as they are."""
HOPPER = 9
"""Major compute capability; the only one that torch takes FlashAttention 3 for."""


class AttentionChoice(NamedTuple):
    """Name for transformers' `attn_implementation`, and why it was chosen."""

    implementation: str
    reason: str


def choose_attention(
    settings: Model, device_type: str, caps_scores: bool = False, shares_packs: bool = False
) -> AttentionChoice:
    """The attention implementation for a device.

    Args:
        settings: `model` section; `attention` names a backend or is `auto`.
        caps_scores: the model caps its attention scores, which only eager and flash_attention_2 do.
        shares_packs: ranks share a pack (`batch.sequence_parallel`): `sequence.share_heads` gets the choice.

    Raises:
        ConfigError: the named backend cannot run here or cannot keep samples apart here.
    """
    flash = importlib.util.find_spec("flash_attn") is not None
    wanted = settings.attention
    if shares_packs and (caps_scores or wanted == "flash_attention_2"):
        what = "a model that caps its scores" if caps_scores else f"model.attention {wanted}"
        raise ConfigError(
            f"batch.sequence_parallel with {what}: packs are shared over torch's varlen kernel (which is "
            "FlashAttention) and sdpa only; set batch.sequence_parallel: 1"
            + ("" if caps_scores else ", or model.attention: auto")
        )
    if caps_scores and wanted in ("sdpa", "varlen"):
        raise ConfigError(f"model.attention {wanted} would not cap the scores, as this model does; use auto")
    if caps_scores and wanted == "auto" and (device_type == "cpu" or settings.dtype == "fp32" or not flash):
        reason = "scores are capped, which else only flash-attn does; quadratic in batch.pack_len"
        return AttentionChoice("eager", reason)
    if device_type == "cpu":
        if wanted not in ("auto", "sdpa"):
            raise ConfigError(f"model.attention {wanted} needs CUDA; use auto or sdpa on CPUs")
        if wanted == "sdpa":
            return AttentionChoice("sdpa", "asked for; the mask is quadratic in batch.pack_len")
        AttentionInterface.register(BY_SAMPLE, sample_attention)
        return AttentionChoice(BY_SAMPLE, "CPU: sdpa, one sample after the other")
    if settings.dtype == "fp32":
        if wanted not in ("auto", "sdpa"):
            raise ConfigError(f"model.attention {wanted} computes in bf16 or fp16; model.dtype is fp32")
        return AttentionChoice("sdpa", "fp32: varlen kernels need bf16 or fp16; block-diagonal mask")
    if wanted == "sdpa":
        return AttentionChoice("sdpa", "asked for; the mask is quadratic in batch.pack_len")
    hopper_kernels = has_flash_attention_3()
    if wanted == "flash_attention_2" and not flash:
        raise ConfigError(
            "model.attention flash_attention_2: flash-attn is not installed; pip install "
            "'versatune-ds[cuda]', or use model.attention: varlen"
        )
    prefers_flash = flash and (caps_scores or not hopper_kernels) and not shares_packs
    if wanted == "flash_attention_2" or (wanted == "auto" and prefers_flash):
        return AttentionChoice("flash_attention_2", "flash-attn is installed")
    register_varlen()
    why = "packs are shared" if shares_packs else "flash-attn is not installed"
    reason = "asked for" if wanted == "varlen" else f"{why}: torch's varlen kernel"
    if hopper_kernels:
        attention_kernels.activate_flash_attention_impl("FA3")  # for all of the process
        reason = "torch's varlen kernel with FlashAttention 3 (flash_attn_interface is installed)"
    return AttentionChoice(VARLEN, reason)


def has_flash_attention_3() -> bool:
    """Whether torch can take FlashAttention 3 here: a GPU of Hopper's kind, and its package."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    return (
        hasattr(attention_kernels, "activate_flash_attention_impl")
        and torch.cuda.get_device_capability()[0] == HOPPER
    )


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
    boundaries, longest = _boundaries(kwargs)
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
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # keys before the query's own
        **grouped,
    )
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0), None


@torch.compiler.disable  # lengths are data
def sample_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`varlen_attention` by torch's sdpa for each segment: work by squared lengths, not the squared pack."""
    boundaries, _ = _boundaries(kwargs)
    lengths = boundaries.diff().tolist()
    parts = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        mask, length = None, q.shape[2]
        if sliding_window is not None and sliding_window < length:
            mask = (
                torch.ones(length, length, dtype=torch.bool, device=q.device)
                .tril_()
                .triu_(1 - sliding_window)
            )
        parts.append(
            nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _boundaries(options: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Where samples begin and end, and the longest one; raises ConfigError for what would be left out."""
    boundaries, longest = options.get("cu_seq_lens_q"), options.get("max_length_q")
    if boundaries is None or longest is None:
        raise ConfigError("varlen attention was called without sample boundaries: samples would mix")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ConfigError("varlen attention neither caps its scores nor has sinks; use flash_attention_2")
    return boundaries, longest
