"""Joining the process group: what a user reads when it fails."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from launching import free_port, rank_environment

JOIN = """
from versatune_ds.engine.backend.process_group import start_process_group
from versatune_ds.foundations.errors import VersaTuneError
try:
    start_process_group(timeout_s=3)
except VersaTuneError as error:
    print(error)
"""


def test_a_taken_port_is_named_with_the_cure():
    with socket.socket() as other_run:
        other_run.bind(("0.0.0.0", 0))
        other_run.listen()
        port = other_run.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", JOIN],
            env=rank_environment(0, 1, port),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert f"cannot meet at 127.0.0.1:{port}" in done.stdout and "--master_port" in done.stdout, done


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_in_vain_says_so(rank):
    port = free_port()
    done = subprocess.run(
        [sys.executable, "-c", JOIN],
        env=rank_environment(rank, 2, port),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert f"not all ranks came to 127.0.0.1:{port} within 3 s" in done.stdout, done
    assert "Were all nodes started" in done.stdout
