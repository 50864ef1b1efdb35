"""Hosts, SLURM and a prepared run, made once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, Slurm, wait_until, why_no_hosts, why_no_slurm
from launching import REPOSITORY, launch_soundly, read_jsonl
from small_runs import prepare_run, sample_settings

STEPS = 10


class Job:
    """A small run: its settings' file, a place for run folders, and the losses it must have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.losses: list[float] = []

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """The program's arguments for a run of its own."""
        return ["--config", str(self.config), f"run.dir={self.folder / name}", *overrides]

    def losses_of(self, name: str) -> list[float]:
        """The losses recorded so far."""
        path = self.folder / name / "metrics.jsonl"
        return [line["loss"] for line in read_jsonl(path)] if path.exists() else []

    def checkpoints_of(self, name: str) -> list[str]:
        """Names of the finished checkpoints, oldest first."""
        return sorted(path.name for path in (self.folder / name / "checkpoints").glob("step-*"))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    yield made
    made.down()


@pytest.fixture(scope="session")
def slurm_of_session(hosts) -> Slurm:
    reason = why_no_slurm()
    if reason is not None:
        pytest.skip(reason)
    return Slurm(hosts)


@pytest.fixture
def slurm(slurm_of_session) -> Iterator[Slurm]:
    """An empty queue before and after: a test that failed leaves its job to nobody."""
    yield slurm_of_session
    slurm_of_session.command("scancel", "--user", "root")
    wait_until(lambda: not slurm_of_session.command("squeue", "--noheader"), "an empty queue")


@pytest.fixture(scope="session")
def job(hosts, tmp_path_factory) -> Job:
    """Prepared data, and the yardstick: the run on two ranks of one host that nothing disturbs."""
    job = Job(tmp_path_factory.mktemp("job"))
    raw = sample_settings(job.folder)
    raw["batch"] = {"pack_len": 192, "packs_per_step": 4}
    raw["weights"]["every_n_steps"] = 4
    raw["train"] = {"max_steps": STEPS}
    raw["checkpoint"] = {"every_n_steps": 1, "keep_last": 2, "export_at_end": False}
    prepare_run(job.folder, raw)
    launch_soundly(REPOSITORY / "launch" / "train.py", 2, job.arguments("yardstick"))
    job.losses = job.losses_of("yardstick")
    assert len(job.losses) == STEPS
    return job
