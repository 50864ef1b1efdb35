"""The process that ranks are forked from; `launching.py` starts it and speaks with it.

Importing torch, DeepSpeed and transformers takes most of the start of a rank. This process imports them once
and loads DeepSpeed's extension; every rank of every launch is forked from it, before any thread or process
group exists. The ranks are processes of their own with their own environment, files, sockets and signals;
only their imports are shared. A rank runs a script as `python SCRIPT` would, up to its exit functions; only
the interpreter is not taken apart.

It reads a JSON line per request from standard input and answers with one:

    {"script": FILE, "arguments": [...], "environments": [{...}, ...], "logs": [FILE, ...]} -> {"pids": [...]}
    {"pids": [...], "timeout_s": SECONDS} -> {"codes": [...]}, null for a rank that had to be killed here

What is not covered: variables that libraries read when they are imported; the server's own count.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import sys
import time
import traceback
from typing import Any


def serve() -> None:
    """Answer requests until standard input ends, then kill what still runs."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports print
    import_everything()
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "script" in request:
            pids = [fork_rank(rank, request) for rank in range(len(request["logs"]))]
            running.update(pids)
            answer: dict[str, Any] = {"pids": pids}
        else:
            answer = {"codes": [wait_for(pid, request["timeout_s"]) for pid in request["pids"]]}
            running.difference_update(request["pids"])
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        wait_for(pid, 0)


def import_everything() -> None:
    """What ranks import, and DeepSpeed's extension: loading it takes a lock that a killed rank would keep."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  with any optimizer; takes a second
    import train_cases  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
    gc.collect()
    gc.freeze()  # ranks share these pages as long as no collection touches them


def fork_rank(rank: int, request: dict[str, Any]) -> int:
    """The pid of a new rank."""
    pid = os.fork()
    if pid != 0:
        return pid
    code = 1
    try:
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.clear()
        os.environ.update(request["environments"][rank])
        code = run_script(request["script"], request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_script(script: str, arguments: list[str]) -> int:
    """The exit code that `python script arguments...` would have."""
    sys.argv = [script, *arguments]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    return code


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
