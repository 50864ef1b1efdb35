"""Peak memory of a stretch of work: the allocator's on CUDA, resident memory of this process on Linux CPUs.

What is not covered: other systems' CPUs (None), and memory that libraries take outside torch's
allocator on CUDA."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes above the level at which it was made.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._known = True
        if self._cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._base = torch.cuda.memory_allocated(device)
            return
        _give_back_free_memory()
        try:
            CLEAR.write_text("5")  # the highest resident size starts anew from the present one
            self._base = _resident_bytes("VmRSS")
        except OSError:
            self._known = False

    def bytes(self) -> int | None:
        """Highest level since then, above the base; None where it cannot be known."""
        if not self._known:
            return None
        if self._cuda:
            return int(torch.cuda.max_memory_allocated()) - self._base
        return _resident_bytes("VmHWM") - self._base


def _give_back_free_memory() -> None:
    """Ask glibc to return what earlier work has freed: kept, it would count as part of the base."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another libc
        return


def _resident_bytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")
