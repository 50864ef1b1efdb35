"""Launchers that number ranks in their own way are seen, and used or refused."""

from __future__ import annotations

import pytest

from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.launch import join

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-host-7@1",
}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
PMI = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_LOCALID": "3",
    "SLURM_JOB_ID": "12",
}
TWO_NODES = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("given", "launcher"),
    [
        (OPEN_MPI, "Open MPI"),
        (MVAPICH, "MVAPICH"),
        (PMI, "PMI"),
        (SRUN, "srun"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI, "Open MPI"),
    ],
)
def test_ranks_are_numbered_as_torch_does(given, launcher):
    environment = dict(given)
    assert launcher in (join("train", environment) or "")
    added = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    assert added == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_SIZE": "4"}
    assert environment["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(environment["MASTER_PORT"]) < 40000
    other = given | {name: "1" for name in given if name.endswith(("RANK", "PROCID"))}
    join("train", other)
    assert other["RANK"] == "1" and other["MASTER_PORT"] == environment["MASTER_PORT"]  # they meet
    before = dict(environment)
    assert join("train", environment) is None and environment == before  # once


def test_where_to_meet_is_taken_from_the_environment():
    environment = OPEN_MPI | TWO_NODES | {"MASTER_ADDR": "n1", "MASTER_PORT": "5"}
    assert join("train", environment) == "started by mpirun (Open MPI): rank 3 of 4"
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("n1", "5")
    assert environment["LOCAL_SIZE"] == "2"


@pytest.mark.parametrize(
    "given",
    [OPEN_MPI | TWO_NODES, {"PMI_RANK": "1", "PMI_SIZE": "2"}, SRUN | {"SLURM_STEP_NUM_NODES": "2"}],
)
def test_ranks_that_do_not_know_where_to_meet_are_refused(given):
    with pytest.raises(ConfigError, match=r"started \d processes on several nodes.*MASTER_ADDR"):
        join("train", dict(given))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | OPEN_MPI,  # torchrun inside of a job
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"},  # a batch script before its srun
        {name: "1" if name.endswith("SIZE") else "0" for name in OPEN_MPI},
    ],
)
def test_nothing_is_changed_without_such_a_launcher(given):
    environment = dict(given)
    assert join("train", environment) is None and environment == given


@pytest.mark.parametrize("given", [OPEN_MPI, SRUN, {"RANK": "1", "WORLD_SIZE": "4"}])
def test_a_verb_for_one_process_is_refused_on_many(given):
    for verb in ("export", "report", "study", "plan-weights", "evidence"):
        with pytest.raises(ConfigError, match=rf"{verb} is for one process, and .* started 4"):
            join(verb, dict(given))
    environment = dict(given)
    assert join("prepare", environment) is None and environment == given
