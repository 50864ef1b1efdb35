"""A small prepared run on the shipped sample, and runs of it under DeepSpeed's real launcher, to be hurt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from launching import REPOSITORY, free_port
from small_runs import prepare_run, sample_settings

START_TIMEOUT_S = 180
BIN = Path(sys.executable).parent


def prepare_small_run(folder: Path) -> Path:
    """Sample, caches and settings of an endless run of two packs a step in `folder`; returns the last."""
    raw = sample_settings(folder)
    raw["batch"] = {"pack_len": 192, "packs_per_step": 2}
    raw["weights"] |= {"every_n_steps": 4}
    raw["train"] = {"max_steps": 100_000}
    raw["checkpoint"] = {"export_at_end": False}
    raw["deepspeed"] = {"zero_optimization": {"stage": 1}}
    return prepare_run(folder, raw)


class LaunchedRun:
    """`deepspeed launch/train.py` on two ranks, in a process group of its own; as a context manager it leaves
    no process behind."""

    def __init__(self, config: Path, run: Path, *overrides: str) -> None:
        self.run = run
        self.output_file = run.with_suffix(".out")
        self.port = free_port()
        command = ["deepspeed", "--num_gpus", "2", "--master_port", str(self.port), "launch/train.py"]
        command += ["--config", str(config), f"run.dir={run}", *overrides]
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with open(self.output_file, "w") as output:
            self.launcher = psutil.Popen(
                command,
                cwd=REPOSITORY,
                env=environment | {"PYTHONSAFEPATH": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.inner_launcher: psutil.Process | None = None
        self.ranks: list[psutil.Process] = []

    def __enter__(self) -> LaunchedRun:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in [self.launcher, *filter(None, [self.inner_launcher]), *self.ranks]:
            if process.is_running():
                process.kill()
        self.launcher.wait()
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
            buffer.unlink(missing_ok=True)

    @property
    def output(self) -> str:
        return self.output_file.read_text()

    def await_steps(self, count: int) -> None:
        """Wait until `count` steps have been recorded by this launch; then the processes are known."""
        metrics = self.run / "metrics.jsonl"
        before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self._await(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= before + count)
        self.inner_launcher = self.launcher.children()[0]
        self.ranks = sorted(self.inner_launcher.children(), key=lambda rank: int(rank.environ()["RANK"]))
        assert len(self.ranks) == 2

    def await_end(self, timeout_s: float) -> int:
        """Wait for the launcher and all ranks to end; returns the launcher's code."""
        deadline = time.monotonic() + timeout_s
        code = self.launcher.wait(timeout_s)
        processes = [*filter(None, [self.inner_launcher]), *self.ranks]
        _, alive = psutil.wait_procs(processes, timeout=max(0.1, deadline - time.monotonic()))
        assert not alive, f"{alive} outlived the launcher:\n{self.output[-3000:]}"
        return int(code)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole process group."""
        os.killpg(self.launcher.pid, signal.SIGINT)

    def _await(self, is_there) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_there():
            assert self.launcher.poll() is None, self.output[-3000:]
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.1)
