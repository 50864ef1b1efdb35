"""FLOPs of a step, the peak of known accelerators, and model FLOPs utilisation (MFU).

Two conventions, because numbers of other trainers are mostly in the second. `mfu`, the strict one, counts
useful work only. A step of T real tokens, S of them supervised, in samples of lengths L_i costs

    6 N T                       linear layers, forward and backward (N: parameters outside embedding and head)
  + 6 H V S                     the head, on the positions that have a label
  + 6 n_layers A sum_i L_i^2    attention scores and values, the causal half (A: heads x head size)

Padding and recomputation are not counted; the embedding look-up is no matrix product. Per layer, scores
and values are two products of 2 A L^2 FLOPs forward, the causal half of that is 2 A L^2, and backward is
twice forward: 6 A L^2. MFU = FLOPs / (seconds x accelerators x peak).

`mfu_6n`, the common one (PaLM, arXiv 2204.02311, appendix B, and after it most papers and trainers),
counts for every slot token, padding and positions without a label included, in packs of P tokens

    6 N_all + 12 n_layers A P     N_all: all parameters, the embedding included (a tied matrix once)

as if each token attended to the whole pack, in both directions. It is the larger number of the two: packs
hold several samples, attention is causal, and the embedding multiplies nothing. Some (torchtitan) leave the
embedding out of N_all, so a number from elsewhere is compared with neither before its formula is known.
Worked: 8B (N_all 8.03e9, 32 layers, A 4096) in full samples of 4,096 tokens, 10,471 tokens/s on an H200, is
57.8 % in the common convention (54.6 GFLOPs a token) and 51.1 % in the strict one (48.2).

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

    num_parameters: int
    """N_all: all parameters, a tied embedding and head once."""
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
    def from_config(cls, config: Any, num_parameters: int, num_parameters_nonembedding: int) -> ModelShape:
        """Read the shape from a transformers configuration of a Qwen or Llama model."""
        head_size = getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads)
        return cls(
            num_parameters=num_parameters,
            num_parameters_nonembedding=num_parameters_nonembedding,
            num_layers=config.num_hidden_layers,
            attention_width=config.num_attention_heads * head_size,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )


def step_flops(
    shape: ModelShape, *, real_tokens: float, supervised_tokens: float, sum_squared_lengths: float
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


def step_flops_6n(shape: ModelShape, *, slot_tokens: float, pack_len: int) -> float:
    """FLOPs of one optimizer step over all ranks as most papers count; the module's second formula.

    Args:
        shape: the model.
        slot_tokens: tokens of all packs, padding included.
        pack_len: tokens of one pack.
    """
    attention = 12.0 * shape.num_layers * shape.attention_width * pack_len
    return (6.0 * shape.num_parameters + attention) * slot_tokens


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
