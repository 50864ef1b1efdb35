"""How much more memory this process may take on its host, control groups included.

A container or a batch job may use less than the machine has; psutil does not know. The kernel's files do:
cgroup v2 (`memory.max`, `memory.current`) and v1 (`memory.limit_in_bytes`, `memory.usage_in_bytes`), each for
the process's own group and all groups above it. Pages of files that the kernel can drop (`inactive_file`)
count as free, as Kubernetes counts them.

What is not covered: swap, limits per NUMA node, and what other processes take in the next moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_bytes() -> int:
    """Bytes that this process can still take without swapping or being killed for it."""
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:  # not Linux
        groups = ""
    return min([int(psutil.virtual_memory().available), *cgroup_rooms(groups, Path("/sys/fs/cgroup"))])


def cgroup_rooms(groups: str, root: Path) -> Iterator[int]:
    """Bytes left in each memory control group that has a limit.

    Args:
        groups: text of /proc/self/cgroup, lines of `id:controllers:path`.
        root: where the control groups are mounted.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = mount / path.strip("/")
        for folder in (own, *own.parents):
            room = _room(folder, *names)
            if room is not None:
                yield room
            if folder == mount:
                break


def _room(folder: Path, limit_file: str, usage_file: str, droppable: str) -> int | None:
    """Limit less use of one group; None without a limit, or where the group is not to be seen from here."""
    try:
        limit = (folder / limit_file).read_text(encoding="utf-8").strip()
        usage = int((folder / usage_file).read_text(encoding="utf-8"))
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    stat = dict(line.split(" ", 1) for line in lines)
    return max(0, int(limit) - usage + int(stat.get(droppable, 0)))
