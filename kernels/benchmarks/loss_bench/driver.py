"""The driver: one worker process per candidate, turns in rotation, results as they come.

For each case every worker makes the same inputs and passes the gate. Then rounds: in each round
every variant of every candidate has a turn, and each round begins one further along, so that a
drift of the machine (clock, temperature, other load) meets all of them alike. A worker that dies or
does not answer in time is reported and started anew for the next case.

What is not covered: what a turn does (`worker`) and what is made of the times (`results`).
"""

from __future__ import annotations

import json
import select
import statistics
import subprocess
import sys
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

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer, or a status of its own when the process died or was too slow."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except (BrokenPipeError, ValueError):
            return {"status": "error", "reason": "the worker's process is gone"}
        ready, _, _ = select.select([stdout], [], [], self._timeout_s)
        if not ready:
            self.close()
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
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
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
) -> list[dict[str, Any]]:
    """Raw results of all variants of a case.

    Args:
        too_slow: (candidate, variant) -> why it is left out.

    Returns:
        One dict per variant: candidate, variant, status, reason, gate, chunk, s, cpu_s, peak_bytes, dx_bytes,
        dw_bytes. Lists hold one number per measured run.
    """
    entries, active = [], []
    for name in candidates:
        prepared = workers.of(name).ask(do="prepare", case=case.__dict__)
        for variant in CANDIDATES[name].variants:
            if device_type not in variant.on:
                continue
            entry: dict[str, Any] = {"candidate": name, "variant": variant.name, **prepared}
            entries.append(entry)
            if (name, variant.name) in too_slow:
                entry.update(status="too slow", reason=too_slow[name, variant.name])
            elif prepared["status"] == "ok":
                say(f"{case.describe()}: gate of {name}, {variant.name}")
                entry.update(workers.of(name).ask(do="gate", variant=variant.name))
            if entry["status"] == "ok" and entry["gate"]["verdict"] != "wrong":
                entry.update(s=[], cpu_s=[], peak_bytes=[])
                active.append(entry)
    for number in range(protocol.rounds):
        say(f"{case.describe()}: round {number + 1} of {protocol.rounds}, {len(active)} variants")
        shift = number % len(active) if active else 0
        for entry in active[shift:] + active[:shift]:
            if entry["status"] == "ok" and not _is_slow(entry, number, protocol):
                _turn(entry, workers.of(entry["candidate"]), protocol)
    for name in candidates:
        if workers.of(name).alive:
            workers.of(name).ask(do="release")
    return entries


def _is_slow(entry: dict[str, Any], turns: int, protocol: Protocol) -> bool:
    """Whether a variant has had its turns: a slow one gets fewer."""
    return turns >= SLOW_TURNS and statistics.median(entry["s"]) > protocol.slow_s


def _turn(entry: dict[str, Any], worker: WorkerProcess, protocol: Protocol) -> None:
    """One turn of a variant; its numbers are added to `entry`."""
    reply = worker.ask(do="turn", variant=entry["variant"], warmups=protocol.warmups, runs=protocol.runs)
    if reply["status"] != "ok":
        entry.update(reply)
        return
    entry["s"] += reply["s"]
    entry["cpu_s"] += reply["cpu_s"]
    entry["peak_bytes"].append(reply["peak_bytes"])
    entry.update(dx_bytes=reply["dx_bytes"], dw_bytes=reply["dw_bytes"])
