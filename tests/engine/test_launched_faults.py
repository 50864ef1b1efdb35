"""Killed ranks and launchers under DeepSpeed's real launcher: the run ends, says why, and goes on later."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest
from launched_runs import BIN, START_TIMEOUT_S, LaunchedRun, prepare_small_run
from launching import read_jsonl

pytestmark = pytest.mark.slow
END_S = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return prepare_small_run(tmp_path_factory.mktemp("launched"))


def checkpoints(run) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("sharing", [1, 2])
def test_a_killed_rank_ends_the_run_with_its_name_and_the_next_start_goes_on(config, sharing):
    """Also where the others wait for it in the middle of a pack that they share."""
    victim = 0  # it holds the lock and the store
    run, shared = config.parent / f"killed_{sharing}", f"batch.sequence_parallel={sharing}"
    with LaunchedRun(config, run, "checkpoint.every_n_steps=2", shared) as launched:
        launched.await_steps(3)
        pid = launched.ranks[victim].pid
        command = [BIN / "versatune-ds", "train", "--config", config, f"run.dir={run}"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
        assert second.returncode == 4 and f"{run} is in use by process {pid} on " in second.stderr
        launched.ranks[victim].kill()
        code = launched.await_end(END_S)
        output = launched.output
    assert code in (247, 6)  # the launcher passes on what it sees first: the kill (-9) or the survivor's code
    assert f"rank {victim} (process {pid} on " in output and "its process was killed" in output
    assert "Traceback" not in output.split("its process was killed")[0]  # the cause comes first
    done = checkpoints(run)[-1]
    with LaunchedRun(config, run, f"train.max_steps={done + 2}", shared) as again:
        assert again.await_end(START_TIMEOUT_S) == 0
        output = again.output
    assert f"resuming from {run / 'checkpoints'}/step-{done:08d}" in output
    assert "which was killed; this run takes over" in output
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == list(range(1, done + 3))


@pytest.mark.parametrize("how", ["terminate deepspeed", "kill the inner launcher", "ctrl-c"])
def test_without_its_launcher_a_run_saves_and_leaves(config, how):
    run = config.parent / how.replace(" ", "_")
    with LaunchedRun(config, run) as launched:
        launched.await_steps(2)
        if how == "terminate deepspeed":
            launched.launcher.terminate()
        elif how == "kill the inner launcher":
            launched.inner_launcher.kill()
        else:
            launched.interrupt()
        code = launched.await_end(END_S)
        output = launched.output
    assert how == "ctrl-c" or code == (-signal.SIGTERM if how == "terminate deepspeed" else 0)
    (step,) = checkpoints(run)
    assert f"stopped after step {step} as asked" in output
    if how != "ctrl-c":
        assert "is gone; this run saves at the next step boundary" in output
    latest = json.loads((run / "checkpoints" / "latest.json").read_text())
    assert latest["step"] == step == len(read_jsonl(run / "metrics.jsonl"))
