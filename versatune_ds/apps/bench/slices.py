"""Slices of a trainer benchmark, each in a process of its own: one that fails costs no other its numbers.

`run_slices` starts `python -m versatune_ds.apps.bench.slices JOB OUTCOME` for one slice after the other,
on every rank, and hands on all outcomes after each. On rank 0 the process writes what came of it:

    measured        the numbers
    does not fit    refused by the memory model, nothing was started
    out of memory   in the dry run or later, on any rank
    time limit      it took longer than it was given, and was ended
    failed          any other error

A slice's ranks meet on a port of their own, since those of the slice before may still be leaving. A process
whose starter is gone ends itself, so nothing keeps the accelerator.

What is not covered: measuring (`apps/bench/trainer.py`), and trying a failed slice again.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from versatune_ds.apps.bench.fit import Slice
from versatune_ds.apps.bench.settings import BenchSettings
from versatune_ds.apps.programs import ending_with_programs, run_program
from versatune_ds.foundations import distributed
from versatune_ds.foundations.constants import EXIT_FAILURE, EXIT_LAUNCHER_LOST, EXIT_OK
from versatune_ds.foundations.errors import VersaTuneError
from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.log import get_logger, setup_logging

log = get_logger(__name__)

COMMAND = (sys.executable, "-m", "versatune_ds.apps.bench.slices")
WATCH_S = 1.0


# --- the process that starts them ---------------------------------------------------------------------------


def run_slices(
    settings: BenchSettings,
    slices: Sequence[Slice],
    limit_s: float | None,
    write: Callable[[list[dict[str, Any]]], None],
) -> bool:
    """Measure slice after slice; every rank calls it. Returns whether all were measured, as far as it knows.

    Args:
        limit_s: seconds that one slice may take, building included; None: any.
        write: called with all outcomes so far after each slice. An outcome has a `slice` with a `status` and,
            unless it is "measured", a `reason`; on ranks other than 0 nothing else is known.
    """
    outcomes: list[dict[str, Any]] = []
    with ending_with_programs():
        for index, chosen in enumerate(slices):
            log.info("%s, slice %d of %d: %s", settings.shape, index + 1, len(slices), chosen)
            if chosen.verdict == "does not fit":
                outcome = _lost(chosen.verdict, f"{chosen}; {chosen.cure}")
            else:
                outcome = _run_slice(settings, chosen, index, limit_s)
            outcome["slice"] = {**chosen.to_json(), **outcome["slice"]}
            if outcome["slice"]["status"] != "measured":
                log.warning("slice of %d layers: %s", chosen.layers, outcome["slice"]["reason"])
            outcomes.append(outcome)
            write(outcomes)
    return all(outcome["slice"]["status"] == "measured" for outcome in outcomes)


def _run_slice(settings: BenchSettings, chosen: Slice, index: int, limit_s: float | None) -> dict[str, Any]:
    """One process from start to end, and what came of it."""
    job = {
        "settings": settings.with_checkpointing(chosen.checkpointing).model_dump(mode="json"),
        "layers": chosen.layers,
        "starter": os.getpid(),
    }
    with tempfile.TemporaryDirectory(prefix="versatune-bench-") as folder:
        asked, answer = Path(folder, "job.json"), Path(folder, "outcome.json")
        write_json_atomic(asked, job)
        command = [*COMMAND, str(asked), str(answer)]
        ended = run_program(command, math.inf if limit_s is None else limit_s, own_port(index), echo=True)
        if ended.code is None:
            return _lost("time limit", f"ended after {limit_s:g} s (--slice-limit-s)")
        if answer.is_file():
            outcome: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return outcome
        if ended.code == EXIT_OK:
            return {"slice": {"status": "measured"}}  # a rank other than 0
        if ended.code == -signal.SIGKILL:
            return _lost("failed", "killed (SIGKILL); the kernel does that when the host's memory is used up")
        status = "out of memory" if says_out_of_memory(ended.tail) else "failed"
        return _lost(status, f"the process {ended.in_a_line}")


def _lost(status: str, reason: str) -> dict[str, Any]:
    return {"slice": {"status": status, "reason": reason}}


def says_out_of_memory(text: str) -> bool:
    """Whether an error text of torch, CUDA, the kernel or another rank is about memory."""
    text = text.lower()
    return any(words in text for words in ("out of memory", "outofmemoryerror", "can't allocate memory"))


def own_port(index: int) -> dict[str, str]:
    """Variables by which the ranks of a slice meet on a port of their own."""
    if "RANK" not in os.environ:
        return {}
    port = int(os.environ["MASTER_PORT"]) + 1 + index
    return {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}  # torchrun's has the old port


# --- the process of one slice -------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Measure the slice of a job's file and write its outcome, on rank 0; returns the exit code."""
    asked, answer = map(Path, arguments)
    job = json.loads(asked.read_text(encoding="utf-8"))
    setup_logging()
    threading.Thread(target=_leave_with, args=(job["starter"],), name="starter watch", daemon=True).start()
    from versatune_ds.apps.bench import trainer as bench
    from versatune_ds.engine.backend.process_group import leave_process_group

    try:
        outcome = bench.bench_slice(BenchSettings.model_validate(job["settings"]), job["layers"])
        outcome["slice"]["status"] = "measured"
    except Exception as error:
        if not isinstance(error, VersaTuneError):
            traceback.print_exc()
        outcome = describe_error(error)
    if distributed.is_main():
        write_json_atomic(answer, outcome)
    leave_process_group()
    return EXIT_OK if outcome["slice"]["status"] == "measured" else EXIT_FAILURE


def describe_error(error: BaseException) -> dict[str, Any]:
    """The outcome of a slice that raised: out of memory wherever the cause is."""
    first = str(error) if isinstance(error, VersaTuneError) else f"{type(error).__name__}: {error}"
    texts, cause = [first], error.__cause__
    while cause is not None:
        texts.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    is_memory = isinstance(error, MemoryError) or says_out_of_memory("\n".join(texts))
    return _lost("out of memory" if is_memory else "failed", first)


def _leave_with(starter: int) -> None:
    """End this process when the one that started it is gone, however it went."""
    while os.getppid() == starter:
        time.sleep(WATCH_S)
    os._exit(EXIT_LAUNCHER_LOST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
