"""One run per folder, and what a second one is told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from small_disk import fill, make_read_only, small_disk

from versatune_ds.engine.faults.run_lock import RunLock
from versatune_ds.foundations.errors import StateError

HOLD = """
import sys
from pathlib import Path
from versatune_ds.engine.faults.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run until its input ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_in_use_is_refused_with_its_holder(tmp_path, holder):
    match = f"in use by process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(StateError, match=match), RunLock(tmp_path / "run"):
        pass
    assert json.loads((tmp_path / "run" / "run.lock.json").read_text())["pid"] == holder.pid  # untouched
    holder.stdin.close()
    holder.wait()
    with RunLock(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_run_is_taken_over_and_said(tmp_path, holder, caplog, monkeypatch):
    monkeypatch.setattr("versatune_ds.engine.faults.run_lock.log.propagate", True)
    holder.kill()
    holder.wait()
    for name in ("run.lock.json", "run.json", "resolved.yaml"):
        (tmp_path / "run" / f".{name}.k3_x9a2b").write_text("cut o")
    with caplog.at_level("WARNING"), RunLock(tmp_path / "run"):
        held = json.loads((tmp_path / "run" / "run.lock.json").read_text())
    assert f"process {holder.pid} on" in caplog.text and "takes over" in caplog.text
    assert not list((tmp_path / "run").glob(".*"))
    assert held["pid"] == os.getpid()


def test_a_clean_end_leaves_no_holder_even_after_an_error(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        1 / 0  # noqa: B018
    with caplog.at_level("WARNING"), RunLock(tmp_path):
        pass
    assert not caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot be written"), RunLock(tmp_path / "file" / "run"):
        pass


def test_a_read_only_run_folder_is_named(tmp_path):
    """Root may write where modes forbid it; only a read-only file system refuses it too."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        make_read_only(disk)
        with pytest.raises(StateError, match="Read-only file system"), RunLock(disk / "run"):
            pass


def test_a_full_disk_is_named(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        filler = fill(disk)
        with pytest.raises(StateError, match="No space left on device"), RunLock(disk / "run"):
            pass
        filler.unlink()
        with RunLock(disk / "run"):
            pass
