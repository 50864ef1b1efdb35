"""What a bug report is asked for: system, drivers, NCCL, flash-attn's ABI, limits, disk speed, clocks.

What is not covered: fixing anything (each finding says how), and the network between hosts.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from versatune_ds.foundations.errors import ConfigError

INFINIBAND = Path("/sys/class/infiniband")
LEAST_FILES = 4096
"""Open files: a rank holds its caches, sockets and libraries open, and safetensors maps every shard."""
LEAST_SHARED_GIB = 1.0
SPEED_MB = 256
LEAST_MB_S = 100.0
CHECKPOINT_GB_OF_1B = 16
CLOCK_TOLERANCE_S = 2.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
SSH_TIMEOUT_S = 15


class Finding(NamedTuple):
    topic: str
    text: str
    is_problem: bool = False


def system() -> list[Finding]:
    """Operating system, driver, CUDA and NCCL; the wrong pair of driver and torch is a problem."""
    import torch

    built = torch.version.cuda or torch.version.hip
    driver, problem = _driver(), ""
    if driver and not built:
        cure = "install torch for CUDA (pytorch.org)"
        problem = f", but torch {torch.__version__} is built for CPUs; {cure}"
    elif driver and not torch.cuda.is_available():
        cure = "update the driver, take a torch for an older CUDA, or see CUDA_VISIBLE_DEVICES"
        problem = f", but torch for CUDA {built} finds no GPU; {cure}"
    has_nccl = bool(built) and torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "none"  # type: ignore[no-untyped-call]
    return [
        Finding("system", f"{platform.platform()}, glibc {platform.libc_ver()[1] or 'unknown'}"),
        Finding("driver", f"{driver or 'no NVIDIA driver'}{problem}", bool(problem)),
        Finding("CUDA of torch", built or "none"),
        Finding("NCCL", version),
    ]


def _driver() -> str | None:
    """Version and GPUs as nvidia-smi says; None without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    lines = sorted(set(done.stdout.strip().splitlines()))
    return "; ".join(lines) if done.returncode == 0 and lines else f"nvidia-smi: {done.stderr.strip()[:200]}"


def flash_attention() -> Finding:
    """Whether flash-attn's library was built for this torch."""
    topic = "flash-attn ABI"
    if importlib.util.find_spec("flash_attn") is None:
        return Finding(topic, "not installed (optional)")
    try:
        importlib.import_module("flash_attn_2_cuda")
    except (ImportError, OSError) as error:
        text = f"built for another torch or CUDA: {' '.join(str(error).split())[:200]}"
        cure = "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir flash-attn"
        return Finding(topic, f"{text}; {cure}", True)
    return Finding(topic, "fits this torch")


def limits() -> list[Finding]:
    """ulimits that end runs late."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    few = files != resource.RLIM_INFINITY and files < LEAST_FILES
    cure = f": fewer than {LEAST_FILES}; ulimit -n 65536" if few else ""
    pinned = locked == resource.RLIM_INFINITY or not INFINIBAND.is_dir()
    advice = "" if pinned else ": InfiniBand pins memory; ulimit -l unlimited"
    return [
        Finding("open files", f"{_limit(files)}{cure}", few),
        Finding("locked memory", f"{_limit(locked)} bytes{advice}", not pinned),
    ]


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def shared_memory_size(folder: Path) -> Finding:
    """Room for the ranks of a node to meet; containers start with 64 MB."""
    gib = shutil.disk_usage(folder).total / 2**30 if folder.is_dir() else 0.0
    text = f"{gib:.2f} GiB at {folder}"
    if gib < LEAST_SHARED_GIB:
        cure = "NCCL and data workers need it; docker run --ipc=host, or --shm-size=8g"
        return Finding("shared memory size", f"{text}: less than {LEAST_SHARED_GIB:g} GiB; {cure}", True)
    return Finding("shared memory size", text)


def disk_speed(folder: Path) -> list[Finding]:
    """MB/s of a synced write and a read past the cache, and how the file system's clock differs from ours."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(SPEED_MB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written_s = time.perf_counter() - started
            ahead_s = os.fstat(file.fileno()).st_mtime - time.time()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(1 << 20):
                pass
            read_s = time.perf_counter() - started
    except OSError as error:
        return [Finding("disk speed", f"{folder} cannot be written: {error.strerror or error}", True)]
    megabytes = SPEED_MB * 1.048576
    rate = megabytes / written_s
    text = f"write {rate:.0f} MB/s, read {megabytes / read_s:.0f} MB/s at {folder}"
    minutes = CHECKPOINT_GB_OF_1B * 1000 / rate / 60
    slow = f": a checkpoint of 1B parameters takes {minutes:.0f} min; see checkpoint.asynchronous"
    is_slow = rate < LEAST_MB_S
    speed = Finding("disk speed", text + (slow if is_slow else ""), is_slow)
    return [speed, _clock(f"the file system of {folder}", ahead_s, 0.0)]


def clocks(hosts: Iterable[str]) -> list[Finding]:
    """How the clocks of other hosts differ from this one's, over ssh."""
    found = []
    for host in hosts:
        command, before = [*SSH, host, "date", "+%s.%N"], time.time()
        how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": SSH_TIMEOUT_S}
        try:
            said = subprocess.run(command, check=True, **how).stdout
            took = time.time() - before
            found.append(_clock(host, float(said) - (before + took / 2), took / 2))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            said = " ".join((getattr(error, "stderr", "") or str(error)).split())[:200]
            found.append(Finding("clock", f"{host} cannot be asked over ssh: {said}", True))
    return found


def _clock(whose: str, ahead_s: float, uncertain_s: float) -> Finding:
    text = f"{whose}: {ahead_s:+.1f} s to this host's" + (f", ± {uncertain_s:.1f} s" if uncertain_s else "")
    if abs(ahead_s) - uncertain_s > CLOCK_TOLERANCE_S:
        return Finding("clock", f"{text}; ages of files and logs of hosts mislead: start NTP (chrony)", True)
    return Finding("clock", text)


def hosts_of(hostfile: Path) -> list[str]:
    """The hosts of a file with a line `NAME slots=RANKS` each; ConfigError where it cannot be read."""
    try:
        text = hostfile.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {hostfile} cannot be read ({error})") from error
    lines = (line.partition("#")[0].split() for line in text.splitlines())
    return [words[0] for words in lines if words]
