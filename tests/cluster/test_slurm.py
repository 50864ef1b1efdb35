"""The batch scripts on a real SLURM of two nodes: time limit, requeueing, scancel, a killed rank, arrays."""

from __future__ import annotations

import pytest
from hosts import tail, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TWO_NODES = ("--nodes", "2", "--gpus-per-node", "1")


def rank_on(hosts, node: str, run: str) -> str:
    """Process id, as the node numbers it, of a run's rank there: of those that know the run, the youngest."""
    found = hosts.processes(node, rf"launch/train\.py .*run\.dir=\S*/{run}( |$)")
    return max(found, key=int)


def nothing_runs(hosts) -> bool:
    return not any(hosts.processes(node, r"launch/train\.py") for node in ("n1", "n2"))


def test_time_limit_saves_requeues_and_goes_on_by_itself(slurm, hosts, job, tmp_path):
    """One task per rank. The limit is set when training has begun, and a rank held until SLURM has warned."""
    output = tmp_path / "output"
    number = slurm.submit(
        output,
        *("--ntasks-per-node", "1", *TWO_NODES, "--signal", "B:USR1@90"),
        "launch/slurm/train_srun.sbatch",
        *job.arguments("time_limit", "checkpoint.every_n_steps=100"),
    )
    wait_until(lambda: len(job.losses_of("time_limit")) >= 2, "two steps", output)
    rank = rank_on(hosts, "n2", "time_limit")
    hosts.run("n2", "kill", "-STOP", rank)
    held = len(job.losses_of("time_limit"))
    _, minutes, _ = slurm.job(number)["RunTime"].split(":")
    slurm.command("scontrol", "update", f"JobId={number}", f"TimeLimit={int(minutes) + 2}")
    wait_until(lambda: "the time limit is near" in output.read_text(), "SLURM's warning", output)
    hosts.run("n2", "kill", "-CONT", rank)
    wait_until(lambda: "start 2" in output.read_text(), "a second start", output)
    slurm.command("scontrol", "update", f"JobId={number}", "TimeLimit=UNLIMITED")
    ended = slurm.wait(number, output)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), tail(output)
    text = output.read_text()
    assert "saved; requeueing" in text and "resuming from" in text
    assert 2 <= held < len(job.losses)
    assert job.losses_of("time_limit") == job.losses
    assert nothing_runs(hosts)


def test_warning_and_scancel_under_a_launcher(slurm, hosts, job, tmp_path):
    """One launcher per node: a warning has it saved and requeued, scancel saved and ended."""
    output = tmp_path / "output"
    number = slurm.submit(
        output,
        *TWO_NODES,
        "launch/slurm/train.sbatch",
        *job.arguments("cancelled", "checkpoint.every_n_steps=100"),
    )
    wait_until(lambda: len(job.losses_of("cancelled")) >= 2, "two steps", output)
    slurm.command("scancel", "--batch", "--signal", "USR1", number)
    wait_until(lambda: "start 2" in output.read_text(), "a second start", output)
    (first,) = job.checkpoints_of("cancelled")
    wait_until(lambda: "resuming from" in output.read_text(), "a resumed run", output)
    wait_until(lambda: len(job.losses_of("cancelled")) > int(first.removeprefix("step-")), "another step")
    slurm.command("scancel", number)
    assert slurm.wait(number, output)["JobState"] == "CANCELLED"
    wait_until(lambda: nothing_runs(hosts), "the end of all processes")
    second = job.checkpoints_of("cancelled")[-1]
    done = len(job.losses_of("cancelled"))
    assert second > first and second == f"step-{done:08d}" and done < len(job.losses), tail(output)
    assert slurm.job(number)["Restarts"] == "1"

    # whoever submits again goes on from there, here to the end
    output = tmp_path / "again"
    number = slurm.submit(output, *TWO_NODES, "launch/slurm/train.sbatch", *job.arguments("cancelled"))
    ended = slurm.wait(number, output)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), tail(output)
    assert job.losses_of("cancelled") == job.losses


def test_a_killed_rank_fails_the_job_on_all_nodes(slurm, hosts, job, tmp_path):
    output = tmp_path / "output"
    number = slurm.submit(
        output,
        *("--ntasks-per-node", "1", *TWO_NODES),
        "launch/slurm/train_srun.sbatch",
        *job.arguments("killed_task"),
    )
    wait_until(lambda: len(job.losses_of("killed_task")) >= 1, "a step", output)
    hosts.run("n2", "kill", "-9", rank_on(hosts, "n2", "killed_task"))
    ended = slurm.wait(number, output)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), tail(output)
    assert nothing_runs(hosts)
    assert len(job.losses_of("killed_task")) < len(job.losses)


def test_array_elements_get_their_number(slurm, tmp_path):
    command = ["bash", "-c", 'echo "$0 of $1 restarts" > "$2/$0"', "{index}", "{count}", str(tmp_path)]
    output = tmp_path / "%a.out"
    number = slurm.submit(output, "--array", "3-7:2", "launch/slurm/study_array.sbatch", *command)
    wait_until(lambda: all((tmp_path / name).exists() for name in "012"), "three elements")
    assert (tmp_path / "1").read_text() == "1 of 3 restarts\n"
    wait_until(lambda: not slurm.command("squeue", "--noheader", "--jobs", number), "an empty queue")
    assert not (tmp_path / "3").exists()
