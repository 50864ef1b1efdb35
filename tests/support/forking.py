"""Ranks that start in a second: forked from one process that has imported everything, nothing else.

Importing torch, DeepSpeed and transformers takes most of the start of a rank. `ForkServer` starts one process
that imports them and loads DeepSpeed's extension, and forks every rank of every launch from it, before any
thread or process group exists. The ranks are processes of their own with their own files, sockets and
signals; only their imports are shared.

Run as a script it is the server: it reads a JSON line per request and answers with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from launching import RANK_TIMEOUT_S, REPOSITORY, free_port, rank_environment


class Ranks(NamedTuple):
    """Running ranks of one launch."""

    pids: list[int]
    logs: list[Path]
    port: int


class ForkServer:
    """Starts ranks of `train_cases.py`; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._launches = 0

    def __enter__(self) -> ForkServer:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env={**rank_environment(0, 1, 0), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()  # the server kills what is still running, and leaves
        self._server.wait(timeout=60)

    def start(self, world_size: int, cases: Sequence[dict[str, Any]]) -> Ranks:
        """Fork the ranks of one launch."""
        self._launches += 1
        stem = self._folder / f"launch_{self._launches}"
        path = stem.with_suffix(".json")
        path.write_text(json.dumps(list(cases)))
        logs = [Path(f"{stem}_rank_{rank}.log") for rank in range(world_size)]
        port = free_port()
        answer = self._ask({"cases": str(path), "logs": [str(log) for log in logs], "port": port})
        return Ranks(answer["pids"], logs, port)

    def wait(self, ranks: Ranks, timeout_s: float = RANK_TIMEOUT_S) -> list[int | None]:
        """Exit codes; negative: killed by that signal; None: killed here, still running after the time."""
        codes: list[int | None] = self._ask({"pids": ranks.pids, "timeout_s": timeout_s})["codes"]
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{ranks.port}_*"):
            buffer.unlink(missing_ok=True)  # of ranks that were killed
        return codes

    def run(self, world_size: int, cases: Sequence[dict[str, Any]]) -> None:
        """A launch to its end; fails the test with the ranks' last lines if any rank failed."""
        ranks = self.start(world_size, cases)
        codes = self.wait(ranks)
        assert codes == [0] * world_size, "\n".join(tails(ranks, codes))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        line = self._server.stdout.readline()
        assert line, "the fork server is gone"
        return json.loads(line)


def tails(ranks: Ranks, codes: Sequence[int | None]) -> list[str]:
    """The ranks' exit codes and last lines, for messages."""
    return [
        f"rank {rank} left with {code}:\n" + "\n".join(log.read_text().splitlines()[-40:])
        for rank, (log, code) in enumerate(zip(ranks.logs, codes, strict=True))
    ]


# --- the server ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports print
    import train_cases  # noqa: F401  the imports that the ranks share
    from deepspeed.comm.torch import build_shm_op

    # the extension too: loading it takes a lock on its folder, which a killed rank would never release
    build_shm_op()

    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "cases" in request:
            pids = [fork_rank(rank, request) for rank in range(len(request["logs"]))]
            running.update(pids)
            answer: dict[str, Any] = {"pids": pids}
        else:
            answer = {"codes": [wait_for(pid, request["timeout_s"]) for pid in request["pids"]]}
            running.difference_update(request["pids"])
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        wait_for(pid, 0)


def fork_rank(rank: int, request: dict[str, Any]) -> int:
    """The pid of a new rank."""
    pid = os.fork()
    if pid != 0:
        return pid
    import train_cases

    code = 1
    try:
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(rank_environment(rank, len(request["logs"]), request["port"]))
        train_cases.main(Path(request["cases"]))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pid: int, timeout_s: float) -> int | None:
    """The exit code of a child; after the time it is killed and the answer is None."""
    deadline = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.02)


if __name__ == "__main__":
    serve()
