"""Accelerators by name: memory and peak, as their data sheets say.

The dense bf16 peak is the one that MFU is computed with (`observability.throughput.PEAK_TFLOPS`).

What is not covered: CPUs, slices of a GPU, and what a driver keeps of the memory (a margin stands for it).
"""

from __future__ import annotations

from typing import NamedTuple

from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.observability.throughput import PEAK_TFLOPS


class Gpu(NamedTuple):
    peak_name: str
    """Key of `PEAK_TFLOPS`."""
    memory_gb: float
    """Memory in GB, 10^9 bytes, as the data sheet says; drivers report up to 7 % more."""

    @property
    def peak_tflops(self) -> float:
        """Dense bf16 peak in TFLOP/s."""
        return PEAK_TFLOPS[self.peak_name]


GPUS: dict[str, Gpu] = {
    # Sources: NVIDIA's data sheets of A100, A40, L4, L40S, H100, H200 and HGX B200 and product pages of A800,
    # H800 and H20; AMD's of Instinct MI300X.
    "a40": Gpu("A40", 48),
    "a100-40g": Gpu("A100", 40),
    "a100-80g": Gpu("A100", 80),
    "a800-80g": Gpu("A800", 80),
    "l4": Gpu("L4", 24),
    "l40s": Gpu("L40S", 48),
    "h100-80g": Gpu("H100", 80),
    "h100-80g-pcie": Gpu("H100 PCIe", 80),
    "h100-94g-nvl": Gpu("H100 NVL", 94),
    "h800-80g": Gpu("H800", 80),
    "h20-96g": Gpu("H20", 96),
    "h200-141g": Gpu("H200", 141),
    "b200-180g": Gpu("B200", 180),
    "mi300x-192g": Gpu("MI300X", 192),
}


def find_gpu(name: str) -> Gpu:
    """The accelerator of a name such as `h100-80g`."""
    if name.lower() not in GPUS:
        raise ConfigError(unknown_name("GPU", name, GPUS))
    return GPUS[name.lower()]
