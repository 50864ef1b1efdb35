"""Which processes count as launchers, and what happens when one is gone; launchers here are short scripts."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from versatune_ds.engine.faults.launcher import is_launcher

RANK = """
import signal, sys, time
from versatune_ds.engine.faults import launcher
launcher.POLL_S, launcher.GRACE_S = 0.05, float(sys.argv[2])
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
launcher.leave_with_launcher()
print("watching", flush=True)
time.sleep(300)
"""
SCRIPT = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python /env/bin/deepspeed --num_gpus 2 train.py", True),
        ("/env/bin/torchrun train.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("bash run.sh deepspeed", False),
        ("python -m pytest deepspeed.launcher.launch", False),
        ("slurmstepd: [1.0]", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_command(command, expected):
    assert is_launcher(command.split()) == expected


@pytest.fixture
def start(tmp_path):
    """Start a rank below two scripts of the given names; returns (outer, inner, rank)."""
    started = []

    def start(names: tuple[str, str], mode: str = "polite", grace_s: float = 100) -> list[psutil.Process]:
        scripts = [tmp_path / name for name in names]
        for script in scripts:
            script.write_text(SCRIPT)
        command = [sys.executable, *map(str, scripts), "-c", RANK, mode, str(grace_s)]
        outer = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(outer)
        assert outer.stdout.readline() == "watching\n"
        started.extend(outer.children(recursive=True))
        return started

    yield start
    for process in started:
        if process.is_running():
            process.kill()
    started[0].communicate()


def ends(process: psutil.Process, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("victim", ["outer", "inner"])
def test_a_rank_is_asked_to_leave_when_a_launcher_above_it_is_killed(start, victim):
    outer, inner, rank = start(("deepspeed", "torchrun"))
    assert not ends(rank, 0.5)
    (outer if victim == "outer" else inner).kill()
    assert ends(rank, 10)


def test_a_rank_that_cannot_leave_is_ended(start):
    """It ignores SIGTERM, as one that waits in a collective does."""
    _, inner, rank = start(("deepspeed", "torchrun"), "deaf", 1.0)
    inner.kill()
    assert not ends(rank, 0.5)
    assert ends(rank, 10)


def test_other_parents_may_end(start):
    """nohup, or a shell that starts a run and goes away."""
    outer, inner, rank = start(("run.py", "shell.py"))
    inner.kill()
    outer.kill()
    assert not ends(rank, 1.0)
