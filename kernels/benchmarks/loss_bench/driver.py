"""The driver: one worker process per candidate, turns in rotation, results as they come.

For each case every variant passes the gate and has its first turn; the defaults of all candidates
come first. Then rounds: in each round every variant has a turn, and each round begins one further
along, so that a drift of the machine (clock, temperature, other load) meets all of them alike. A
worker that dies or does not answer in time is reported and started anew for its next turn.

A time limit is shared by the cases: each gets its part of what is left, and of that the variants
that are no defaults get no gate in the second half, which belongs to the rounds.

What is not covered: what a turn does (`worker`) and what is made of the times (`results`).
"""

from __future__ import annotations

import json
import math
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loss_bench.candidates import CANDIDATES
from loss_bench.cases import Case

SCRIPT = Path(__file__).resolve().parents[1] / "fused_loss.py"


class Protocol(NamedTuple):
    """How often everything is run."""

    rounds: int
    warmups: int
    """Unmeasured runs at the beginning of each turn."""
    runs: int
    """Measured runs of each turn."""
    slow_s: float
    """A variant whose runs take longer than this gets two turns only."""
    too_slow_s: float
    """A variant whose runs take longer than this is not measured in later cases of this size or larger."""
    timeout_s: float
    """A worker that needs longer for one answer is ended."""


GPU_PROTOCOL = Protocol(rounds=5, warmups=2, runs=6, slow_s=10, too_slow_s=60, timeout_s=600)
"""10 warm-ups and 30 runs of every variant."""
CPU_PROTOCOL = Protocol(rounds=5, warmups=0, runs=1, slow_s=10, too_slow_s=20, timeout_s=900)
"""5 runs; the gate and the choice of a chunk are the warm-up."""


SLOW_TURNS = 2
NO_TIME_LEFT = "no time left"
"""Status of a variant that the time limit left out."""
CUT = "cut"
"""Status of a variant whose request the time limit ended."""
UNDER_LOAD_S = 1.5
"""Seconds of products during which the card is read."""


class WorkerProcess:
    """A candidate's process; `ask` sends a request and waits for the answer."""

    def __init__(self, candidate: str, device_type: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--worker", candidate, "--device", device_type],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(
        self, until: float = math.inf, meanwhile: Callable[[], None] | None = None, **request: Any
    ) -> dict[str, Any]:
        """The answer, or a status of its own when the process died or was too slow.

        Args:
            until: `time.monotonic()` at which the process is ended.
            meanwhile: called while the process works.
            request: see `worker`.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        begun = time.monotonic()
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except (BrokenPipeError, ValueError):
            return {"status": "error", "reason": "the worker's process is gone"}
        if meanwhile is not None:
            meanwhile()
        limit_s = min(self._timeout_s, max(until - time.monotonic(), 0.0))
        ready, _, _ = select.select([stdout], [], [], limit_s)
        if not ready:
            self._process.kill()
            self._process.wait()
            seconds = time.monotonic() - begun
            if limit_s < self._timeout_s:
                return {"status": CUT, "reason": f"by the time limit, {seconds:.0f} s after it was asked"}
            return {"status": "error", "reason": f"no answer within {self._timeout_s:.0f} s"}
        line = stdout.readline()
        if not line:
            code = self._process.wait()
            return {"status": "error", "reason": f"the worker's process ended with {code}"}
        return dict(json.loads(line))

    @property
    def alive(self) -> bool:
        """False after it ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, which ends by itself when its input does and it has no request."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Workers:
    """The processes of all candidates, started when first needed."""

    def __init__(self, device_type: str, timeout_s: float) -> None:
        self._device_type = device_type
        self._timeout_s = timeout_s
        self._running: dict[str, WorkerProcess] = {}

    def of(self, candidate: str) -> WorkerProcess:
        """The candidate's process, a new one if it has died."""
        worker = self._running.get(candidate)
        if worker is None or not worker.alive:
            worker = WorkerProcess(candidate, self._device_type, self._timeout_s)
            self._running[candidate] = worker
        return worker

    def close(self) -> None:
        """End all processes."""
        for worker in self._running.values():
            worker.close()
        self._running.clear()


def measure_case(
    case: Case,
    candidates: Sequence[str],
    device_type: str,
    protocol: Protocol,
    workers: Workers,
    say: Callable[[str], None],
    too_slow: Mapping[tuple[str, str], str],
    changed: Callable[[list[dict[str, Any]]], None],
    until: float = math.inf,
) -> tuple[list[dict[str, Any]], bool]:
    """Raw results of all variants of a case, and whether there was time for all of it.

    Args:
        too_slow: (candidate, variant) -> why it is left out.
        changed: called with the results so far after every number.
        until: `time.monotonic()` at which the case ends.

    Returns:
        One dict per variant: candidate, variant, status, reason, gate, chunk, s, cpu_s, host_s (on a GPU),
        peak_bytes, dx_bytes, dw_bytes. Lists hold one number per measured run, peak_bytes per turn.
    """
    entries, is_default = [], []
    for name in candidates:
        variants = [v for v in CANDIDATES[name].variants if device_type in v.on]
        entries += [{"candidate": name, "variant": v.name, "status": "not yet"} for v in variants]
        is_default += [v is variants[0] for v in variants]
        workers.of(name)  # all processes import at once
    defaults = [entry for entry, first in zip(entries, is_default, strict=True) if first]
    others = [entry for entry, first in zip(entries, is_default, strict=True) if not first]
    half = (time.monotonic() + until) / 2
    with tempfile.TemporaryDirectory(prefix="fused_loss_") as folder:
        answers = str(Path(folder) / "answers.pt")
        for entry in defaults + others:
            name, variant = entry["candidate"], entry["variant"]
            if (name, variant) in too_slow:
                entry.update(status="too slow", reason=too_slow[name, variant])
            elif time.monotonic() >= (until if entry in defaults else half):
                entry.update(status=NO_TIME_LEFT)
            else:
                say(f"{case.describe()}: {name}, {variant}")
                asked = {"do": "gate", "case": case.__dict__, "variant": variant, "answers": answers}
                entry.update(workers.of(name).ask(until, **asked))
                if entry["status"] == "ok" and entry["gate"]["verdict"] != "wrong":
                    _turn(entry, case, workers, protocol, until)
            changed(entries)
    active = [entry for entry in defaults + others if entry.get("s")]
    for number in range(1, protocol.rounds):
        say(f"{case.describe()}: round {number + 1} of {protocol.rounds}, {len(active)} variants")
        shift = number % len(active) if active else 0
        for entry in active[shift:] + active[:shift]:
            if time.monotonic() >= until:
                return entries, False
            if entry["status"] == "ok" and not _is_slow(entry, number, protocol):
                _turn(entry, case, workers, protocol, until)
                changed(entries)
    return entries, not any(entry["status"] in (NO_TIME_LEFT, CUT) for entry in entries)


def _is_slow(entry: dict[str, Any], turns: int, protocol: Protocol) -> bool:
    """Whether a variant has had its turns: a slow one gets fewer."""
    return turns >= SLOW_TURNS and statistics.median(entry["s"]) > protocol.slow_s


def _turn(entry: dict[str, Any], case: Case, workers: Workers, protocol: Protocol, until: float) -> None:
    """One turn of a variant; its numbers are added to `entry`. One cut by the time limit changes nothing
    where there are earlier ones."""
    reply = workers.of(entry["candidate"]).ask(
        until,
        do="turn",
        case=case.__dict__,
        variant=entry["variant"],
        chunk=entry["chunk"],
        warmups=protocol.warmups,
        runs=protocol.runs,
    )
    if reply["status"] == CUT and entry.get("s"):
        return
    if reply["status"] != "ok":
        entry.update(reply)
        return
    for key in ("s", "cpu_s", "host_s"):
        if key in reply:
            entry.setdefault(key, []).extend(reply[key])
    entry.setdefault("peak_bytes", []).append(reply["peak_bytes"])
    entry.update(dx_bytes=reply["dx_bytes"], dw_bytes=reply["dw_bytes"])


def read_under_load(
    case: Case,
    ceiling: Mapping[str, Any],
    workers: Workers,
    read: Callable[[], dict[str, str]],
    until: float = math.inf,
) -> dict[str, str]:
    """The card's state while the ceiling's products run, in a turn that is not counted.

    Args:
        ceiling: the ceiling's entry, measured.
        read: gives the state.
    """
    state: dict[str, str] = {}

    def meanwhile() -> None:
        time.sleep(UNDER_LOAD_S / 2)
        state.update(read())

    runs = max(1, round(UNDER_LOAD_S / statistics.median(ceiling["s"])))
    turn = {"variant": ceiling["variant"], "chunk": ceiling["chunk"], "warmups": 0, "runs": min(runs, 500)}
    workers.of(ceiling["candidate"]).ask(until, meanwhile, do="turn", case=case.__dict__, **turn)
    return state
