"""Looking at the machine before a run: versions, devices, chosen backends, disk, and traps that cost hours.

What is not covered: fixing anything (each finding says how), and other nodes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

PACKAGES = (
    "versatune-ds",
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "numpy",
    "sentencepiece",
    "safetensors",
    "triton",
    "flash-attn",
    "liger-kernel",
)
SHARED_MEMORY = Path("/dev/shm")
LOW_DISK_GB = 20.0
STALE_LOCK_MINUTES = 5.0
"""Building DeepSpeed's extensions takes under a minute; an older lock was left by a killed process."""


class Finding(NamedTuple):
    """One line of the report."""

    topic: str
    text: str
    is_problem: bool = False


def examine(run_dir: Path) -> list[Finding]:
    """All findings, in the order in which they are printed.

    Args:
        run_dir: folder whose file system will hold runs; the nearest existing parent is examined.
    """
    return [
        *versions(),
        *devices(),
        *backends(),
        disk(run_dir),
        *jit_locks(extension_folders()),
        *leftover_shared_memory(SHARED_MEMORY),
        kernels_import(),
    ]


def versions() -> list[Finding]:
    """Python and the packages that matter; optional ones may be absent."""
    found = [Finding("python", sys.version.split()[0])]
    for name in PACKAGES:
        try:
            found.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, "not installed"))
    return found


def devices() -> list[Finding]:
    """The accelerators torch sees."""
    import torch

    if not torch.cuda.is_available():
        return [Finding("accelerator", f"none; CPU with {os.cpu_count()} cores, torch {torch.__version__}")]
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory_gib = properties.total_memory / 2**30
        found.append(Finding("accelerator", f"cuda:{i} {properties.name}, {memory_gib:.1f} GiB"))
    return found


def backends() -> list[Finding]:
    """What `auto` would choose here, and why."""
    import torch

    from versatune_ds.config.schema import Model
    from versatune_ds.engine.attention import choose_attention
    from versatune_ds.engine.model import liger_problem
    from versatune_kernels import resolve_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Model(source="-")
    attention, no_liger = choose_attention(settings, device.type), liger_problem(settings.liger, device.type)
    loss = resolve_backend("auto", device.type)
    return [
        Finding("attention", f"{attention.implementation} ({attention.reason})"),
        Finding("loss", f"{loss.name} ({loss.reason})"),
        Finding("liger", f"off ({no_liger})" if no_liger else "RMSNorm, SwiGLU and RoPE, as the model has"),
    ]


def disk(folder: Path) -> Finding:
    """Free space where runs will be written."""
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free_gb = shutil.disk_usage(existing).free / 1e9
    text = f"{free_gb:.0f} GB free at {existing}"
    if free_gb < LOW_DISK_GB:
        return Finding(
            "disk", f"{text}: less than {LOW_DISK_GB:.0f} GB; a checkpoint of 1B parameters takes 16", True
        )
    return Finding("disk", text)


def extension_folders() -> Path:
    """Where torch builds extensions just in time."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache).expanduser() / "torch_extensions"


def jit_locks(folder: Path) -> list[Finding]:
    """Locks of extension builds. One left by a killed process makes every later run wait without a word."""
    found = []
    for lock in sorted(folder.glob("**/lock")) if folder.is_dir() else []:
        minutes = (time.time() - lock.stat().st_mtime) / 60
        text = (
            f"{lock} is {minutes:.0f} min old; if no build is running, delete it: runs wait for it for ever"
        )
        found.append(Finding("jit lock", text, True))
    return found or [Finding("jit lock", f"none in {folder}")]


def stale_locks(folder: Path) -> list[Path]:
    """Locks that are older than any build takes."""
    oldest = time.time() - 60 * STALE_LOCK_MINUTES
    return [lock for lock in sorted(folder.glob("**/lock")) if lock.stat().st_mtime < oldest]


def leftover_shared_memory(folder: Path) -> list[Finding]:
    """DeepSpeed's CPU all-reduce buffers that no process maps any more."""
    buffers = sorted(folder.glob("deepspeed_allreduce_buffer_*")) if folder.is_dir() else []
    unused = [path for path in buffers if not _is_mapped(path)]
    if not unused:
        return [Finding("shared memory", "no leftovers of killed runs")]
    used_mib = sum(path.stat().st_blocks * 512 for path in unused) / 2**20
    pattern = folder / "deepspeed_allreduce_buffer_*"
    text = f"{len(unused)} buffers of killed runs use {used_mib:.0f} MiB; delete {pattern}"
    return [Finding("shared memory", text, True)]


def kernels_import() -> Finding:
    """`kernels` is Hugging Face's package; a folder of ours must not take its name."""
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        return Finding("kernels", "no package of that name (optional)")
    if spec.origin is not None and (Path(spec.origin).parent / "versatune_kernels").is_dir():
        text = f"`import kernels` finds {spec.origin}; remove that file: it hides Hugging Face's package"
        return Finding("kernels", text, True)
    return Finding("kernels", "not shadowed")


def _is_mapped(path: Path) -> bool:
    """Whether any process has the file mapped."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(path) in maps.read_text():
                return True
        except OSError:
            continue  # the process ended, or belongs to somebody else
    return False
