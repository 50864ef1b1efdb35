"""Launching ranks from tests, and reading what they leave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RANK_TIMEOUT_S = 300


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Environment of one rank, as a launcher would set it; scripts may import the modules of this folder."""
    python_path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def launch(script: Path, world_size: int, arguments: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run a script on `world_size` ranks to their end; never leaves a process behind."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=rank_environment(rank, world_size, port),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=RANK_TIMEOUT_S)[0] for process in ranks]
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)  # of ranks that were killed
    return [
        subprocess.CompletedProcess(process.args, process.returncode, output)
        for process, output in zip(ranks, outputs, strict=True)
    ]


def launch_soundly(script: Path, world_size: int, arguments: Sequence[str]) -> None:
    """`launch`, failing the test with the ranks' last lines if any rank failed."""
    finished = launch(script, world_size, arguments)
    failed = [
        f"rank {rank} left with {process.returncode}:\n" + "\n".join(process.stdout.splitlines()[-40:])
        for rank, process in enumerate(finished)
        if process.returncode != 0
    ]
    assert not failed, "\n".join(failed)


def read_jsonl(path: Path) -> list[dict]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
