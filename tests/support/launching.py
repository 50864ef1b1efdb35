"""Launching ranks from tests, and reading what they leave.

Ranks are forked from a process that has imported what they need (`fork_server.py`). Tests of DeepSpeed's own
launcher are in `launched_runs.py`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_CASES = REPOSITORY / "tests" / "support" / "train_cases.py"
RANK_TIMEOUT_S = 500


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


class Ranks(NamedTuple):
    """Running ranks of one launch."""

    pids: list[int]
    logs: list[Path]
    """What each of them prints."""
    port: int


def start_ranks(script: Path, world_size: int, arguments: Sequence[str]) -> Ranks:
    """Start a script on `world_size` ranks, as a launcher would."""
    folder, port = Path(tempfile.mkdtemp(prefix="ranks-", dir=_server_folder())), free_port()
    logs = [folder / f"rank_{rank}.log" for rank in range(world_size)]
    answer = _ask(
        {
            "script": str(script),
            "arguments": list(arguments),
            "environments": [rank_environment(rank, world_size, port) for rank in range(world_size)],
            "logs": [str(log) for log in logs],
        }
    )
    return Ranks(answer["pids"], logs, port)


def wait_for_ranks(ranks: Ranks, timeout_s: float = RANK_TIMEOUT_S) -> list[int | None]:
    """Exit codes; negative: killed by that signal; None: killed here, still running after the time."""
    codes: list[int | None] = _ask({"pids": ranks.pids, "timeout_s": timeout_s})["codes"]
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{ranks.port}_*"):
        buffer.unlink(missing_ok=True)  # of ranks that were killed
    return codes


def launch(script: Path, world_size: int, arguments: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run a script on `world_size` ranks to their end; never leaves a process behind."""
    ranks = start_ranks(script, world_size, arguments)
    codes = wait_for_ranks(ranks)
    assert None not in codes, "\n".join(tails(ranks, codes))
    return [
        subprocess.CompletedProcess([str(script), *arguments], code, log.read_text())
        for code, log in zip(codes, ranks.logs, strict=True)
    ]


def launch_soundly(script: Path, world_size: int, arguments: Sequence[str]) -> None:
    """`launch`, failing the test with the ranks' last lines if any rank failed."""
    ranks = start_ranks(script, world_size, arguments)
    codes = wait_for_ranks(ranks)
    assert codes == [0] * world_size, "\n".join(tails(ranks, codes))


def run_cases(folder: Path, world_size: int, cases: Sequence[dict[str, Any]]) -> None:
    """Whole training runs, one after the other in one process group (`train_cases.py`)."""
    launch_soundly(TRAIN_CASES, world_size, case_file(folder, cases))


def tails(ranks: Ranks, codes: Sequence[int | None]) -> list[str]:
    """The ranks' exit codes and last lines, for messages."""
    return [
        f"rank {rank} left with {code}:\n" + "\n".join(log.read_text().splitlines()[-40:])
        for rank, (log, code) in enumerate(zip(ranks.logs, codes, strict=True))
    ]


def case_file(folder: Path, cases: Sequence[dict[str, Any]]) -> list[str]:
    """Write cases to a new file in `folder`; returns the argument of `train_cases.py` and its like."""
    handle, path = tempfile.mkstemp(prefix="cases-", suffix=".json", dir=folder)
    with open(handle, "w", encoding="utf-8") as file:
        json.dump(list(cases), file)
    return [path]


@functools.cache
def _server_folder() -> Path:
    """For the ranks' output; it goes when the tests are done."""
    folder = Path(tempfile.mkdtemp(prefix="versatune-ranks-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The one `fork_server.py` of this process. It leaves, with its ranks, when its standard input ends."""
    python_path = os.pathsep.join(filter(None, sys.path))
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
        env={**rank_environment(0, 1, 0), "PYTHONPATH": python_path},
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)
    return server


def _ask(request: dict[str, Any]) -> Any:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    line = server.stdout.readline()
    assert line, "the fork server is gone"
    return json.loads(line)


def run_command(*command: str, cwd: Path = REPOSITORY, timeout_s: int = 900, code: int = 0) -> str:
    """Run a command of the environment to its exit code; returns its output. Launchers get their own port."""
    if command[0] == "deepspeed":
        command = ("deepspeed", "--master_port", str(free_port()), *command[1:])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


def read_jsonl(path: Path) -> list[dict]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
