"""Preparation in processes of its own: killed, imported again, and two at once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared import content, data_config, pairs, write_jsonl

from versatune_ds.config.load import write_resolved
from versatune_ds.config.schema import Config
from versatune_ds.data.cache import prepare as prepare_module
from versatune_ds.data.cache import units
from versatune_ds.data.cache.prepare import prepare
from versatune_ds.data.rows import blocks
from versatune_ds.foundations.errors import ConfigError

DRIVER = """
import multiprocessing, os, signal, sys
from versatune_ds.config.load import load_config
from versatune_ds.data.cache import prepare as module
from versatune_ds.data.cache import unit_writer
from versatune_ds.data.rows import blocks
from versatune_ds.foundations.log import setup_logging

if __name__ == "__main__":
    setup_logging()
    module.INLINE_BYTES = 0
    unit_writer.JOURNAL_EVERY_S = 0
    blocks.BLOCK_ROWS = 10
    kill_after, add, done = int(sys.argv[2]), unit_writer.UnitWriter.add, []

    def counted(self, *args):
        if len(done) == kill_after:
            unit_writer.JOURNAL_EVERY_S = 1e9  # this block is appended, but not journalled
            add(self, *args)
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, *args)
        done.append(args)

    unit_writer.UnitWriter.add = counted
    prepared = module.prepare(load_config(sys.argv[1]))
    print("reused" if prepared.reused else f"made {len(done)}")
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a preparation of a configuration in a process of its own."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)

    def start(config: Config, kill_after: int = -1) -> subprocess.Popen[str]:
        settings = tmp_path / "config.yaml"
        write_resolved(config, settings)
        root = Path(prepare_module.__file__).parents[3]
        environment = os.environ | {
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, str(driver), str(settings), str(kill_after)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def test_after_a_kill_the_work_goes_on_and_ends_the_same(
    tmp_path: Path, tokenizer: Path, start: Any, monkeypatch: pytest.MonkeyPatch, encoded_blocks: list[Any],
    messages: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 10)
    rows: list[Any] = pairs(200)
    rows[15] = rows[150] = {"prompt": "no answer"}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = data_config(tmp_path, tokenizer, path, on_bad_row="skip", num_workers=2)

    process = start(config, kill_after=8)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == -9, errors
    (partial,) = (tmp_path / "cache").glob("*.partial")
    assert not (tmp_path / "cache" / partial.stem).exists()
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    assert_workers_are_gone(pids)

    prepare(config)
    assert len(encoded_blocks) == 20 - 8, "the blocks that were journalled before the kill are not redone"
    assert "going on with law after 79 samples" in messages.text
    undisturbed = data_config(
        tmp_path, tokenizer, path, on_bad_row="skip", num_workers=2, cache_dir=str(tmp_path / "undisturbed")
    )
    prepare(undisturbed)
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")


def assert_workers_are_gone(pids: list[int]) -> None:
    """Workers leave by themselves when their parent is killed."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"workers outlived their parent: {pids}")


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # a zombie waits for init only


UNGUARDED = """
import sys
from versatune_ds.config.load import load_config
from versatune_ds.data.cache import prepare as module
from versatune_ds.foundations.errors import ConfigError

module.INLINE_BYTES = 0
try:
    print(len(module.prepare(load_config(sys.argv[1])).reports))
except ConfigError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_script_without_a_main_guard_is_told_and_does_not_hang(
    tmp_path: Path, tokenizer: Path, start: Any, num_workers: int
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(20))
    (tmp_path / "driver.py").write_text(UNGUARDED)
    process = start(data_config(tmp_path, tokenizer, path, num_workers=num_workers))
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors, errors
    if num_workers == 1:  # needs no workers, so nothing is imported again
        assert output == "1\n"
        return
    (line,) = output.splitlines()
    assert line.startswith(f"refused: {tmp_path / 'driver.py'} prepares data when it is imported")
    assert "if __name__" in line and "data.num_workers to 1" in line


def test_a_foreign_process_that_only_imports_a_script_is_told(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = data_config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", pairs(2)))
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ConfigError, match="prepares data when it is imported"):
        prepare(config)


def test_two_processes_at_once_do_the_work_once(tmp_path: Path, tokenizer: Path, start: Any) -> None:
    config = data_config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", pairs(300)), num_workers=2)
    processes = [start(config), start(config)]
    outputs = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(out.strip() for out, _ in outputs) == ["made 30", "reused"]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_second_process_waits_and_says_so(
    tmp_path: Path, tokenizer: Path, messages: pytest.LogCaptureFixture
) -> None:
    import threading

    from filelock import FileLock

    config = data_config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", pairs(3)))
    prepare(config)
    (lock_file,) = (p for p in (tmp_path / "cache").glob("*.lock") if units.HASHES_FILE not in p.name)
    lock = FileLock(lock_file, thread_local=False)
    lock.acquire()
    release = threading.Timer(0.5, lock.release)
    release.start()
    assert prepare(config).reused
    release.join()
    assert "another process prepares this data; waiting for it" in messages.text
