"""FLOPs of a step, the peak of known accelerators, and model FLOPs utilisation (MFU).

Convention: useful work only. A step of T real tokens, S of them supervised, in samples of lengths L_i costs

    6 N T                       linear layers, forward and backward (N: parameters outside embedding and head)
  + 6 H V S                     the head, on the positions that have a label
  + 6 n_layers A sum_i L_i^2    attention scores and values, the causal half (A: heads x head size)

Padding and recomputation are not counted; the embedding look-up is no matrix product. Per layer, scores
and values are two products of 2 A L^2 FLOPs forward, the causal half of that is 2 A L^2, and backward is
twice forward: 6 A L^2. MFU = FLOPs / (seconds x accelerators x peak).

What is not covered: hardware FLOPs (with recomputation), sliding-window attention, mixture of experts, and
the peak of CPUs, for which MFU is None.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from typing import Any

from versatune_ds.observability.records import GIB

TERA = 1e12

PEAK_TFLOPS: dict[str, float] = {
    # Dense bf16 tensor-core peak of one device as its datasheet says (sparse figures halved), by a part
    # of the name that torch.cuda.get_device_name() gives. The longest part that fits decides.
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40": 181.0,
    "L40S": 362.0,
    "H100": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.4,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "MI300X": 1307.4,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of one accelerator by its name; None when unknown, a slice, or a CPU."""
    words = f" {device_name.upper().replace('-', ' ').replace('_', ' ')} "
    if " MIG " in words:
        return None
    fitting = [name for name in PEAK_TFLOPS if f" {name.upper()} " in words]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the FLOPs of a decoder depend on."""

    num_parameters_nonembedding: int
    """N: all parameters except the embedding and the head, tied or not."""
    num_layers: int
    attention_width: int
    """A: number of query heads times head size."""
    hidden_size: int
    """H."""
    vocab_size: int
    """V: rows of the head."""

    @classmethod
    def from_config(cls, config: Any, num_parameters_nonembedding: int) -> ModelShape:
        """Read the shape from a transformers configuration of a Qwen or Llama model."""
        head_size = getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads)
        return cls(
            num_parameters_nonembedding=num_parameters_nonembedding,
            num_layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * head_size,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )


def step_flops(
    shape: ModelShape, *, real_tokens: int, supervised_tokens: int, sum_squared_lengths: int
) -> float:
    """FLOPs of useful work of one optimizer step over all ranks; the formula in the module's text.

    Args:
        shape: the model.
        real_tokens: tokens of samples, without padding.
        supervised_tokens: positions with a label.
        sum_squared_lengths: sum over samples of their length in tokens squared.
    """
    linear = 6.0 * shape.num_parameters_nonembedding * real_tokens
    head = 6.0 * shape.hidden_size * shape.vocab_size * supervised_tokens
    attention = 6.0 * shape.num_layers * shape.attention_width * sum_squared_lengths
    return linear + head + attention


def mfu(flops: float, seconds: float, num_accelerators: int, peak_tflops_each: float | None) -> float | None:
    """Model FLOPs utilisation, 0..1; None when the peak is unknown or no time has passed."""
    if peak_tflops_each is None or seconds <= 0 or num_accelerators < 1:
        return None
    return flops / (seconds * num_accelerators * peak_tflops_each * TERA)


def peak_memory_gib() -> float | None:
    """Peak memory of this process so far in GiB: allocated on its accelerator, else resident in RAM."""
    torch = sys.modules.get("torch")  # never the one to load it: on CPU this is called without torch too
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024) / GIB
