"""Memory that is left, as control groups see it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from versatune_ds.foundations.host_memory import available_bytes, cgroup_rooms


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def v2(limit: str, usage: int, droppable: int) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {droppable}\nactive_file 7\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{usage}\n", "memory.stat": stat}


def v1(limit: int, usage: int, droppable: int) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{usage}\n",
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {droppable}\n",
    }


def test_every_group_above_counts(tmp_path):
    group(tmp_path / "slurm" / "job", v2("1000", 900, 50))
    group(tmp_path / "slurm" / "job" / "step", v2("max", 900, 50))
    group(tmp_path / "slurm", v2("5000", 4950, 0))
    assert list(cgroup_rooms("0::/slurm/job/step\n", tmp_path)) == [150, 50]


def test_version_1_and_files_of_no_interest(tmp_path):
    group(tmp_path / "memory" / "docker" / "abc", v1(1000, 400, 100))
    group(tmp_path / "memory", v1(2**63 - 4096, 10**9, 0))
    text = "9:name=systemd:/x\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n"
    assert list(cgroup_rooms(text, tmp_path)) == [700, 2**63 - 4096 - 10**9]


def test_within_a_container_the_path_is_not_to_be_seen_and_the_root_is_the_group(tmp_path):
    group(tmp_path, v2("1000", 1200, 100))
    assert list(cgroup_rooms("0::/kubepods/pod7\n", tmp_path)) == [0]
    assert list(cgroup_rooms("", tmp_path)) == []


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="not Linux")
def test_this_process_can_take_something_and_no_more_than_there_is():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes() <= total
