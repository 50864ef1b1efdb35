"""What a killed run left is taken away; what may still be in use stays."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time

import pytest

from versatune_ds.engine.faults import stale_files

OLD_S = 60 * stale_files.STALE_LOCK_MINUTES + 1


def age(path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders for extensions and shared memory, and what was logged."""
    extensions, shared = tmp_path / "extensions" / "op", tmp_path / "shm"
    extensions.mkdir(parents=True)
    shared.mkdir()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(stale_files, "SHARED_MEMORY", shared)
    told = []
    monkeypatch.setattr(stale_files.log, "warning", lambda text, *args: told.append(text % args))
    return extensions / "lock", shared / "deepspeed_allreduce_buffer_0_1", told


def test_a_lock_of_a_killed_build_is_removed(places):
    """torch's own lock, held by a process that is then killed."""
    lock, _, told = places
    code = (
        "import sys, time\n"
        "from torch.utils.file_baton import FileBaton\n"
        "assert FileBaton(sys.argv[1]).try_acquire()\n"
        "print('held', flush=True)\n"
        "time.sleep(100)"
    )
    builder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert builder.stdout.readline() == "held\n"
    try:
        age(lock, OLD_S)
        stale_files.remove_stale_files()  # a build that takes long
        assert lock.exists() and "a process has it open" in told[0]
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
    stale_files.remove_stale_files()
    assert not lock.exists() and f"removed {lock}" in told[1]


def test_a_new_lock_stays(places):
    lock, _, told = places
    lock.touch()
    stale_files.remove_stale_files()
    assert lock.exists() and not told


def test_a_lock_on_a_shared_file_system_stays_and_is_named(places, monkeypatch):
    lock, _, told = places
    lock.touch()
    age(lock, OLD_S)
    monkeypatch.setattr(stale_files, "file_system", lambda path: "nfs4")
    stale_files.remove_stale_files()
    assert lock.exists() and "another host may hold it" in told[0] and str(lock) in told[0]


def test_the_file_system_of_a_folder_is_known(tmp_path):
    assert stale_files.file_system(tmp_path) in stale_files.LOCAL_FILE_SYSTEMS


def test_unused_shared_memory_is_removed(places):
    _, buffer, told = places
    buffer.write_bytes(b"x" * 4096)
    stale_files.remove_stale_files()
    assert buffer.exists()  # it may belong to a run that is just starting
    age(buffer, 2 * stale_files.NEW_BUFFER_S)
    with open(buffer, "r+b") as file, mmap.mmap(file.fileno(), 0):
        stale_files.remove_stale_files()
        assert buffer.exists() and not told
    stale_files.remove_stale_files()
    assert not buffer.exists() and "removed 1 shared memory buffers" in told[0]
