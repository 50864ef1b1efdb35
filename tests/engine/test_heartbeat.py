"""Faults of single ranks under the heartbeat, without a model: who is named, and how the processes end."""

from __future__ import annotations

import datetime
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launching import REPOSITORY, Ranks, start_ranks, wait_for_ranks

from versatune_ds.engine.faults.heartbeat import is_lost_connection

pytestmark = pytest.mark.slow

SCRIPT = REPOSITORY / "tests" / "support" / "heartbeat_cases.py"
TIMEOUT_S = 120


def start(fault: str, victim: int, folder: Path, world_size: int = 2) -> Ranks:
    return start_ranks(SCRIPT, world_size, [fault, str(victim), str(folder)])


def finish(ranks: Ranks) -> tuple[list[int | None], list[str]]:
    """Codes and outputs; no process is left behind."""
    return wait_for_ranks(ranks, TIMEOUT_S), [log.read_text() for log in ranks.logs]


def one_of(ranks: Ranks, rank: int) -> Ranks:
    return Ranks([ranks.pids[rank]], [ranks.logs[rank]], ranks.port)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_others(victim, tmp_path):
    ranks = start("killed", victim, tmp_path, world_size=3)
    codes, outputs = finish(ranks)
    assert codes == [-signal.SIGKILL if rank == victim else 6 for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        assert f"error: rank {victim} (process {ranks.pids[victim]} on " in outputs[rank]
        assert "its process was killed" in outputs[rank]
        assert "Start the same command to go on" in outputs[rank]


@pytest.mark.parametrize(
    ("fault", "victim"), [("nccl killed", 0), ("nccl killed", 2), ("nccl apart killed", 2)]
)
def test_a_killed_rank_is_named_though_the_collective_blocks(fault, victim, tmp_path):
    """As under NCCL. The others are ended without a launcher; rank 0 speaks, or all where it is lost."""
    ranks = start(fault, victim, tmp_path, world_size=3)
    codes, outputs = finish(ranks)
    assert codes == [-signal.SIGKILL if rank == victim else 6 for rank in range(3)]
    for rank in [1, 2] if victim == 0 else [0]:
        assert f"rank {victim} (process {ranks.pids[victim]} on " in outputs[rank]
        assert "its process was killed" in outputs[rank]


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_of_one_rank_is_the_error_of_all(victim, tmp_path):
    ranks = start("fails alone", victim, tmp_path)
    codes, outputs = finish(ranks)
    assert codes == [3, 3]
    assert "error: rows.jsonl:7: this row is bad" in outputs[victim]
    blamed = f"error: rank {victim} (process {ranks.pids[victim]} on "
    assert blamed in outputs[1 - victim] and "failed: rows.jsonl:7: this row is bad" in outputs[1 - victim]


def test_an_unexpected_error_keeps_its_traceback_and_is_named_elsewhere(tmp_path):
    codes, outputs = finish(start("fails alone, unexpectedly", 1, tmp_path))
    assert codes == [1, 1]
    assert "Traceback" in outputs[1] and 'raise ZeroDivisionError("division by zero")' in outputs[1]
    assert "failed: ZeroDivisionError: division by zero" in outputs[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stuck_rank_is_named_with_its_step_and_its_stacks(victim, tmp_path):
    ranks = start("stuck", victim, tmp_path)
    codes, outputs = finish(ranks)
    assert codes == [7, 7]
    assert f"rank {victim} (process {ranks.pids[victim]} on " in outputs[0]
    assert "stands in step 3, waiting for data; the others wait" in outputs[0]
    assert "in sleep_in_the_loader" in outputs[victim]  # Python's stack of the main thread
    assert "in sleep_in_the_loader" not in outputs[1 - victim]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_by_the_others(victim, tmp_path):
    ranks = start("stopped", victim, tmp_path)
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / f"ready_{victim}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(ranks.pids[victim], signal.SIGSTOP)
    (code,), (output,) = finish(one_of(ranks, 1 - victim))
    os.kill(ranks.pids[victim], signal.SIGCONT)  # when it wakes up, it notices that it was left alone
    (late_code,), (late_output,) = finish(one_of(ranks, victim))
    assert code == 7
    assert f"rank {victim} (process {ranks.pids[victim]} on " in output and "no sign of life" in output
    assert "last seen in step 3, waiting for data" in output
    assert late_code in (6, 7) and "error" in late_output


def test_every_collective_that_times_out_with_others_is_a_lost_connection():
    """As ZeRO-3 gathers several parameters at once; rank 1 is there and never answers."""
    store, wait = dist.HashStore(), datetime.timedelta(seconds=1)
    groups: dict[int, dist.ProcessGroup] = {}

    def join(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, 2, wait)

    joining = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in joining:
        thread.start()
    for thread in joining:
        thread.join()
    under_way = [groups[0].allreduce([torch.ones(4)]) for _ in range(3)]
    for work in under_way:
        with pytest.raises(RuntimeError) as broken:
            work.wait()
        assert is_lost_connection(broken.value), broken.value
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
