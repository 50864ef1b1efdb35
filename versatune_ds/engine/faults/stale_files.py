"""What killed runs leave on a machine, told apart from what living ones use, and taken away.

- torch builds DeepSpeed's extensions on first use and holds a file `lock` meanwhile; one left by a killed
  process makes every later run wait for it without a word. Its owner keeps the file open, so a lock of ours
  that no process here has open, older than any build, belongs to nobody - on a local file system. On a shared
  one another host may be building: there it is only reported.
- DeepSpeed's CPU all-reduce keeps a buffer (66 MiB a rank) in shared memory and never removes it. The name is
  needed only while a run starts, so a buffer that no process here maps and that is not new is of no use.

What is not covered: files of other users (only named by `doctor`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

import psutil

from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)

SHARED_MEMORY = Path("/dev/shm")
BUFFERS = "deepspeed_allreduce_buffer_*"
STALE_LOCK_MINUTES = 5.0
"""Building DeepSpeed's extensions takes under a minute; an older lock was left by a killed process."""
NEW_BUFFER_S = 60.0
"""A younger buffer may belong to a run that is just starting."""
LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "apfs")


def remove_stale_files() -> None:
    """Remove stale build locks and unused buffers of this user, and say so; before the ranks meet."""
    for lock in stale_locks(extension_folders()):
        if (reason := remove_lock(lock)) is None:
            log.warning("removed %s: a killed process left it there, and runs would wait for it", lock)
        else:
            log.warning(
                "%s was left by a killed process, it seems, and is not removed (%s); if this run seems to "
                "hang, stop it and delete that file",
                lock,
                reason,
            )
    removed = [buffer for buffer in unused_buffers(SHARED_MEMORY) if _remove_buffer(buffer)]
    if removed:
        log.warning("removed %d shared memory buffers of killed runs from %s", len(removed), SHARED_MEMORY)


def shared_memory_buffer() -> Path:
    """The file of DeepSpeed's CPU all-reduce on this rank (66 MiB), which it never removes itself."""
    parts = (os.getuid(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], distributed.rank())
    return SHARED_MEMORY / ("deepspeed_allreduce_buffer_" + "_".join(map(str, parts)))


def extension_folders() -> Path:
    """Where torch builds extensions just in time."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(cache).expanduser() / "torch_extensions"


def require_extension_folder() -> None:
    """Refuse a home where DeepSpeed's extensions cannot be built.

    Raises:
        StateError: the folder cannot be made or written.
    """
    folder = extension_folders()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StateError(
            f"DeepSpeed's extensions are built in {folder}, which cannot be written ({error.strerror}); name "
            "another folder in the environment: TORCH_EXTENSIONS_DIR"
        ) from None


def locks(folder: Path) -> list[Path]:
    """Locks of extension builds, held or not."""
    return sorted(folder.glob("**/lock")) if folder.is_dir() else []


def stale_locks(folder: Path) -> list[Path]:
    """Locks that are older than any build takes."""
    found = []
    for lock in locks(folder):
        with contextlib.suppress(OSError):  # gone meanwhile
            if time.time() - lock.stat().st_mtime > 60 * STALE_LOCK_MINUTES:
                found.append(lock)
    return found


def remove_lock(lock: Path) -> str | None:
    """Delete a stale lock, or give the reason why it cannot be proved that nobody holds it."""
    try:
        found = lock.stat()
        if found.st_uid != os.getuid():
            return f"it belongs to user {found.st_uid}"
        if (kind := file_system(lock)) not in LOCAL_FILE_SYSTEMS:
            return f"it lies on a {kind} file system, and another host may hold it"
        path = str(lock.resolve())
        for process in psutil.process_iter(["open_files"]):  # None: somebody else's
            if any(file.path == path for file in process.info["open_files"] or ()):
                return "a process has it open"
        now = lock.stat()
        if (now.st_ino, now.st_mtime_ns) != (found.st_ino, found.st_mtime_ns):
            return "it was made anew meanwhile"
        lock.unlink()
    except FileNotFoundError:
        return "it is gone meanwhile"
    except OSError as error:
        return error.strerror or str(error)
    return None


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, as in /proc/mounts."""
    resolved = path.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if resolved.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"


def unused_buffers(folder: Path) -> list[Path]:
    """DeepSpeed's CPU all-reduce buffers that no process maps any more."""
    buffers = sorted(folder.glob(BUFFERS)) if folder.is_dir() else []
    if not buffers:
        return []
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue  # the process ended, or belongs to somebody else
        mapped.update(line.split(maxsplit=5)[5] for line in lines if str(folder) in line)
    return [buffer for buffer in buffers if str(buffer) not in mapped]


def _remove_buffer(buffer: Path) -> bool:
    try:
        found = buffer.stat()
        if found.st_uid != os.getuid() or time.time() - found.st_mtime < NEW_BUFFER_S:
            return False
        buffer.unlink()
    except OSError:
        return False
    return True
