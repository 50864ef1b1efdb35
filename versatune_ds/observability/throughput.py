"""The peak of known accelerators, model FLOPs utilisation (MFU), and peak memory.

MFU = FLOPs / (seconds x accelerators x peak). `mfu` in the records is of useful work, `mfu_6n` of the FLOPs
that most papers count; both formulas stand in `engine/model/shape.py`.

What is not covered: the peak of CPUs, for which MFU is None.
"""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

from versatune_ds.observability.records import GIB

if TYPE_CHECKING:
    import torch

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


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        sys.modules["torch"].cuda.synchronize()


def reset_peak(device: torch.device) -> None:
    """Forget the peak of an accelerator's memory so far; that of a process on a CPU cannot be forgotten."""
    if device.type == "cuda":
        sys.modules["torch"].cuda.reset_peak_memory_stats()
