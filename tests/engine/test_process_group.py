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


def test_a_home_that_cannot_be_written_is_one_sentence(tmp_path):
    """DeepSpeed's extensions are built below it."""
    (tmp_path / "home").write_text("no folder")
    environment = rank_environment(0, 1, free_port()) | {"HOME": str(tmp_path / "home")}
    for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=300
    )
    assert f"built in {tmp_path}/home/.cache/torch_extensions, which cannot be written" in done.stdout, done
    assert "TORCH_EXTENSIONS_DIR" in done.stdout and "Traceback" not in done.stderr


MPIRUN = """
import sys
from versatune_ds.engine.backend.process_group import close_process_group, start_process_group
from versatune_ds.foundations import distributed
start_process_group(timeout_s=60)
print(distributed.gather_objects(distributed.rank()))
close_process_group()
"""


def test_ranks_of_mpirun_meet(tmp_path):
    """Its variables, and none of torch's."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    plain = {name: text for name, text in rank_environment(0, 1, 0).items() if name not in own}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MPIRUN],
            env=plain
            | {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")}
            | {f"OMPI_COMM_WORLD_{name}": str(rank) for name in ("RANK", "LOCAL_RANK")}
            | {"PMIX_NAMESPACE": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=300)[0].splitlines()[-1] for rank in ranks] == ["[0, 1]"] * 2
