"""Looking at the machine before a run: versions, devices, chosen backends, disk, and traps that cost hours.

What is not covered: the machine under it (`host_checks.py`), fixing anything (each finding says how), and
other nodes but for their clocks.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from versatune_ds.apps import host_checks
from versatune_ds.apps.host_checks import Finding
from versatune_ds.engine.faults.stale_files import (
    BUFFERS,
    SHARED_MEMORY,
    extension_folders,
    locks,
    unused_buffers,
)
from versatune_ds.foundations.machine import PACKAGES, installed

LOW_DISK_GB = 20.0


def examine(run_dir: Path, hosts: Sequence[str] = ()) -> list[Finding]:
    """All findings, in the order in which they are printed.

    Args:
        run_dir: folder whose file system will hold runs; the nearest existing parent is examined.
        hosts: other hosts, whose clocks are compared over ssh.
    """
    folder = run_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    return [
        *host_checks.system(),
        *versions(),
        *devices(),
        host_checks.flash_attention(),
        *backends(),
        *host_checks.limits(),
        host_checks.shared_memory_size(SHARED_MEMORY),
        disk(folder),
        *host_checks.disk_speed(folder),
        *host_checks.clocks(hosts),
        *jit_locks(extension_folders()),
        *leftover_shared_memory(SHARED_MEMORY),
        kernels_import(),
    ]


def versions() -> list[Finding]:
    """Python and the packages that matter; optional ones may be absent."""
    found = installed(PACKAGES)
    packages = [Finding(name, found.get(name, "not installed")) for name in PACKAGES]
    return [Finding("python", sys.version.split()[0]), *packages]


def devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("accelerator", f"none; CPU with {os.cpu_count()} cores, torch {torch.__version__}")]
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        Finding("accelerator", f"cuda:{i} {device.name}, {device.total_memory / 2**30:.1f} GiB")
        for i, device in enumerate(found)
    ]


def backends() -> list[Finding]:
    """What `auto` would choose here, and why."""
    import torch

    from versatune_ds.config.model import Model
    from versatune_ds.engine.model.attention import choose_attention
    from versatune_ds.engine.model.packed_lm import liger_problem
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
    free_gb = shutil.disk_usage(folder).free / 1e9
    is_low = free_gb < LOW_DISK_GB
    why = f": less than {LOW_DISK_GB:.0f} GB; a checkpoint of 1B parameters takes 16" if is_low else ""
    return Finding("disk", f"{free_gb:.0f} GB free at {folder}{why}", is_low)


def jit_locks(folder: Path) -> list[Finding]:
    """Locks of extension builds. One left by a killed process would make later runs wait without a word."""
    cure = "if no build is running, delete it: runs wait for it for ever"
    ages = {lock: (time.time() - lock.stat().st_mtime) / 60 for lock in locks(folder)}
    found = [Finding("jit lock", f"{lock} is {age:.0f} min old; {cure}", True) for lock, age in ages.items()]
    return found or [Finding("jit lock", f"none in {folder}")]


def leftover_shared_memory(folder: Path) -> list[Finding]:
    """DeepSpeed's CPU all-reduce buffers that no process maps any more."""
    unused = unused_buffers(folder)
    if not unused:
        return [Finding("shared memory", "no leftovers of killed runs")]
    used_mib = sum(path.stat().st_blocks * 512 for path in unused) / 2**20
    text = f"{len(unused)} buffers of killed runs use {used_mib:.0f} MiB; delete {folder / BUFFERS}"
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
