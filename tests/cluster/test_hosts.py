"""Training on two hosts without a batch system: equal to one host, and what faults of a node do.

The hosts are real to the programs: own address, host name, processes and sshd (see hosts.sh).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hosts import tail, wait_until
from launching import REPOSITORY, free_port, rank_environment

from versatune_ds.config.load import load_config
from versatune_ds.data.cache.prepare import prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MULTINODE = "launch/multinode.sh"
RANK = "--local_rank="
"""Stands in the command line of a rank only."""
ANYTHING = r"launch/train\.py"
"""Stands in the command line of ranks and launchers."""
ENDS_WITHIN_S = 60


@pytest.fixture
def hostfile(hosts, tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two nodes\nn1 slots=1\n\nn2 slots=1\n")
    return str(path)


def nothing_runs(hosts) -> bool:
    return not any(hosts.processes(host, ANYTHING) for host in ("n1", "n2", "ctl"))


def run_without_ssh(hosts, hostfile, arguments, output) -> list[int]:
    """Start every node's ranks there, as a person with two terminals would."""
    nodes = [
        hosts.start(node, MULTINODE, "--hostfile", hostfile, "--no-ssh", "--", *arguments, output=output)
        for node in ("n1", "n2")
    ]
    return [node.wait(300) for node in nodes]


def start_over_ssh(hosts, hostfile, arguments, output, **environment):
    """Start all nodes' ranks from ctl."""
    return hosts.start(
        "ctl", MULTINODE, "--hostfile", hostfile, "--", *arguments, output=output, **environment
    )


def test_two_hosts_train_like_one(hosts, hostfile, job, tmp_path):
    output = tmp_path / "output"
    codes = run_without_ssh(hosts, hostfile, job.arguments("two_hosts"), output)
    assert codes == [0, 0], tail(output)
    assert "on 2 rank(s); ZeRO stage 3" in output.read_text()
    assert job.losses_of("two_hosts") == job.losses  # sums of two terms: equal to the last bit
    assert nothing_runs(hosts)


def test_a_killed_rank_and_a_cut_link_end_all_hosts_and_the_run_goes_on(hosts, hostfile, job, tmp_path):
    name = "faults"
    killed, cut, resumed = (tmp_path / fault for fault in ("killed", "cut", "resumed"))

    # kill -9 of the rank on n2: the other host's launcher and rank end too
    launcher = start_over_ssh(hosts, hostfile, job.arguments(name), killed)
    wait_until(lambda: len(job.losses_of(name)) >= 2, "two steps", killed)
    (rank,) = hosts.processes("n2", RANK)
    hosts.run("n2", "kill", "-9", rank)
    assert launcher.wait(ENDS_WITHIN_S) != 0
    wait_until(lambda: nothing_runs(hosts), "the end of all processes", seconds=ENDS_WITHIN_S)
    assert "rank 1 (process" in killed.read_text() and "is gone: " in killed.read_text(), tail(killed)

    # the network to n2 is cut: no process notices, except by the timeout; ssh notices by its own
    before = len(job.losses_of(name))
    assert 2 <= before < len(job.losses)
    launcher = start_over_ssh(
        hosts,
        hostfile,
        job.arguments(name, "run.collective_timeout_s=15"),
        cut,
        PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=2 -o ServerAliveCountMax=5",
    )
    wait_until(lambda: "resuming from" in cut.read_text(), "a resumed run", cut)
    wait_until(lambda: "step " in cut.read_text().split("resuming from")[1], "a step", cut)
    hosts.run("n2", "ip", "link", "set", "eth0", "down")
    try:
        assert launcher.wait(ENDS_WITHIN_S) != 0
        wait_until(lambda: nothing_runs(hosts), "the end of all processes", seconds=ENDS_WITHIN_S)
    finally:
        hosts.run("n2", "ip", "link", "set", "eth0", "up")
    assert "is gone: it gives no sign of life" in cut.read_text(), tail(cut)

    # and the next start goes on to the end as if nothing had happened
    assert len(job.losses_of(name)) < len(job.losses)
    assert run_without_ssh(hosts, hostfile, job.arguments(name), resumed) == [0, 0], tail(resumed)
    assert "resuming from" in resumed.read_text()
    assert job.losses_of(name) == job.losses


def other_data_on_n2(hosts, job, tmp_path) -> dict[str, list[str]]:
    """Mounts of n2's own, and for each the overrides of a run that meets it."""
    folder = job.folder
    # a cache that n2 does not see, and one of which it has its own copy
    for name in ("unseen", "copied", "copy_of_n2"):
        shutil.copytree(folder / "cache", folder / name)
    hosts.run("n2", "mount", "-t", "tmpfs", "tmpfs", str(folder / "unseen"))
    hosts.run("n2", "mount", "--bind", str(folder / "copy_of_n2"), str(folder / "copied"))
    # a run folder that n2 does not see
    (folder / "run_unshared").mkdir()
    hosts.run("n2", "mount", "-t", "tmpfs", "tmpfs", str(folder / "run_unshared"))
    # other raw files on n2, prepared there
    raw = yaml.safe_load(job.config.read_text())
    law = folder / "law_on_every_node.jsonl"
    rows = Path(raw["data"]["train"][0]["path"]).read_text().splitlines(keepends=True)
    law.write_text("".join(rows))
    (tmp_path / "fewer").write_text("".join(rows[:-3]))
    raw["data"]["train"][0]["path"] = str(law)
    raw["data"]["cache_dir"] = str(folder / "prepared_on_each")
    other = folder / "other.yaml"
    other.write_text(yaml.safe_dump(raw))
    prepare(load_config(other), progress=False)
    hosts.run("n2", "mount", "--bind", str(tmp_path / "fewer"), str(law))
    hosts.run("n2", "mount", "-t", "tmpfs", "tmpfs", str(folder / "prepared_on_each"))
    command = [sys.executable, "-m", "versatune_ds.cli.main", "prepare", "--config", str(other)]
    hosts.run("n2", *command, PYTHONSAFEPATH="1")
    return {
        "unseen": [str(job.config), f"data.cache_dir={folder / 'unseen'}"],
        "copied": [str(job.config), f"data.cache_dir={folder / 'copied'}", "data.cache_shared=false"],
        "unshared": [str(job.config)],
        "prepared_from_others": [str(other), "data.cache_shared=false"],
    }


def test_nodes_that_see_other_data_are_named_before_training(hosts, job, tmp_path):
    """Four runs in one process group over both hosts."""
    settings = other_data_on_n2(hosts, job, tmp_path)
    cases = [
        {
            "config": config,
            "overrides": [f"run.dir={job.folder / f'run_{name}'}", "train.max_steps=2", *overrides],
            "sabotage": None,
        }
        for name, (config, *overrides) in settings.items()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    script = REPOSITORY / "tests" / "support" / "train_cases.py"
    output, port = tmp_path / "output", free_port()
    ranks = [
        hosts.start(
            node,
            sys.executable,
            str(script),
            str(tmp_path / "cases.json"),
            output=output,
            **rank_environment(rank, 2, port)
            | {"MASTER_ADDR": "n1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_RANK": str(rank)},
        )
        for rank, node in enumerate(("n1", "n2"))
    ]
    assert [rank.wait(300) for rank in ranks] == [0, 0], tail(output)

    def outcome(name: str, rank: int = 0) -> dict | None:
        return json.loads((job.folder / f"run_{name}" / f"outcome_rank_{rank}.json").read_text())

    assert outcome("unseen") == outcome("unseen", rank=1)  # all ranks leave with the same words
    unseen = outcome("unseen")["text"]
    assert "on node n2, and not on the other nodes" in unseen and "is not prepared" in unseen
    assert "data.cache_shared is true" in unseen
    others = outcome("prepared_from_others")["text"]
    assert "caches on node n2 differ from those on n1 in train/law." in others
    assert "data.cache_shared is false" in others
    unshared = outcome("unshared")["text"]
    assert "written there on n1 is not seen on node n2" in unshared
    assert outcome("copied") is None and len(job.losses_of("run_copied")) == 2
