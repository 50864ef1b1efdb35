"""Accelerators by name: what their data sheets say, for `versatune-ds plan`.

The dense bf16 peak is the one that MFU is computed with (`observability.throughput.PEAK_TFLOPS`).

What is not covered: CPUs, slices of a GPU, and what a driver keeps of the memory (a margin stands for it).
"""

from __future__ import annotations

from typing import NamedTuple

from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.observability.throughput import PEAK_TFLOPS


class Gpu(NamedTuple):
    """One accelerator."""

    peak_name: str
    """Key of `PEAK_TFLOPS`."""
    memory_gb: float
    """Memory in GB, 10^9 bytes, as the data sheet says; drivers report up to 7 % more."""
    memory_gb_per_s: float
    """Bandwidth of that memory in GB/s."""
    link_gb_per_s: float
    """Bandwidth to the other GPUs of the node in GB/s, one direction: half the data sheet's NVLink figure."""

    @property
    def peak_tflops(self) -> float:
        """Dense bf16 peak in TFLOP/s."""
        return PEAK_TFLOPS[self.peak_name]


GPUS: dict[str, Gpu] = {
    # Sources: NVIDIA's data sheets of A100, A40, L4, L40S, H100, H200 and HGX B200 and product pages of A800,
    # H800 and H20; AMD's of Instinct MI300X. Without NVLink: PCIe x16, 32 GB/s (4.0) or 64 GB/s (5.0).
    "a40": Gpu("A40", 48, 696, 32),
    "a100-40g": Gpu("A100", 40, 1555, 300),
    "a100-80g": Gpu("A100", 80, 2039, 300),
    "a800-80g": Gpu("A800", 80, 2039, 200),
    "l4": Gpu("L4", 24, 300, 32),
    "l40s": Gpu("L40S", 48, 864, 32),
    "h100-80g": Gpu("H100", 80, 3350, 450),
    "h100-80g-pcie": Gpu("H100 PCIe", 80, 2000, 64),
    "h100-94g-nvl": Gpu("H100 NVL", 94, 3900, 64),
    "h800-80g": Gpu("H800", 80, 3350, 200),
    "h20-96g": Gpu("H20", 96, 4000, 450),
    "h200-141g": Gpu("H200", 141, 4800, 450),
    "b200-180g": Gpu("B200", 180, 7700, 900),
    "mi300x-192g": Gpu("MI300X", 192, 5300, 448),
}


def find_gpu(name: str) -> Gpu:
    """The accelerator of a name such as `h100-80g`.

    Raises:
        ConfigError: unknown; names the known ones.
    """
    if name.lower() not in GPUS:
        raise ConfigError(unknown_name("GPU", name, GPUS))
    return GPUS[name.lower()]
