"""What the launch scripts start, with stand-ins for SLURM, pdsh and DeepSpeed: no cluster is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import REPOSITORY

RECORD = f"""#!{sys.executable}
import json, os, signal, sys, time
name = os.path.basename(sys.argv[0])
if name == "scontrol" and sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
    sys.exit()
names = os.environ["WATCHED"].split()
files = {{}}
for path in [*sys.argv, os.environ.get("DS_ENV_FILE", "")]:
    if os.path.isfile(path) and path.startswith(os.environ["TMPDIR"]):
        files[path] = open(path).read()
with open(os.environ["RECORD"], "a") as file:
    seen = {{key: os.environ[key] for key in names if key in os.environ}}
    ignored = [s.name for s in (signal.SIGUSR1, signal.SIGTERM) if signal.getsignal(s) == signal.SIG_IGN]
    line = {{"argv": [name, *sys.argv[1:]], "env": seen, "files": files, "ignored": ignored}}
    file.write(json.dumps(line) + "\\n")
if name == "srun":
    exec(os.environ.get("SRUN_DOES", ""))
"""
TOOLS = ("deepspeed", "pdsh", "srun", "scontrol", "python")
SLURM = {
    "SLURM_JOB_ID": "20007",
    "SLURM_JOB_NODELIST": "a,b",
    "SLURM_STEP_NODELIST": "a,b",
    "SLURM_SUBMIT_DIR": str(REPOSITORY),
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_GPUS_PER_NODE": "a100:4",
    "SLURM_NTASKS_PER_NODE": "4",
}
SAVE = 'open(os.environ["VERSATUNE_STOP_FILE"], "w").write("-")'
WHEN_WARNED = """
def leave(*_):
    {}
    sys.exit(0)
signal.signal(signal.SIGUSR1, leave)
open(os.environ["RECORD"] + ".ready", "w")
time.sleep(60)
"""


class Stage:
    """A PATH of stand-ins that write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        (folder / "bin").mkdir()
        (folder / "tmp").mkdir()
        (folder / "home").mkdir()
        for tool in TOOLS:
            path = folder / "bin" / tool
            path.write_text(RECORD)
            path.chmod(0o755)

    def environment(self, watched: str = "", **extra: str) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "RECORD": str(self.record),
            "WATCHED": watched,
            **extra,
        }

    def start(self, script: str, *arguments: str, watched: str = "", **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(REPOSITORY / script), *arguments],
            cwd=self.folder,
            env=self.environment(watched, **extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, watched: str = "", **extra: str):
        """(exit code, standard error, recorded calls)."""
        process = self.start(script, *arguments, watched=watched, **extra)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors, self.calls()

    def calls(self) -> list[dict]:
        return (
            [json.loads(line) for line in self.record.read_text().splitlines()]
            if self.record.exists()
            else []
        )


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


@pytest.fixture
def hostfile(tmp_path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# first line is no node\nnode-a slots=8\nnode-b slots=8\n")
    return str(path)


TRAIN = str(REPOSITORY / "launch" / "train.py")


# --- launch/multinode.sh ------------------------------------------------------------------------------------


def test_over_ssh(stage, hostfile):
    (stage.folder / "home" / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=WARN\n")
    code, errors, (call,) = stage.run(
        "launch/multinode.sh",
        *("--hostfile", hostfile, "--interface", "ib0", "--", "--config", "a b.yaml", "run.seed=1"),
        watched="PDSH_SSH_ARGS_APPEND OMP_NUM_THREADS",
        NCCL_IB_HCA="mlx5",
        WANDB_API_KEY="secret",
        PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=3",
    )
    assert code == 0, errors
    assert call["argv"] == [
        "deepspeed",
        *("--hostfile", hostfile, "--master_addr", "node-a", "--master_port", "29500"),
        *(TRAIN, "--config", "a b.yaml", "run.seed=1"),
    ]
    options = call["env"]["PDSH_SSH_ARGS_APPEND"]
    # ssh takes the first of two: the user's own wins
    assert options.startswith("-o ServerAliveInterval=3 ") and "ServerAliveCountMax=4" in options
    passed = next(text for path, text in call["files"].items() if path != hostfile).splitlines()
    for line in ("OMP_NUM_THREADS=1", "NCCL_IB_HCA=mlx5", "NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0"):
        assert line in passed
    assert passed[-1] == "NCCL_DEBUG=WARN"
    assert all("=" in line for line in passed)  # DeepSpeed fails on any other line
    assert not any("secret" in line or line.startswith("HOME=") for line in passed)
    assert not list((stage.folder / "tmp").iterdir())


def test_without_ssh_takes_the_place_of_this_host(stage, tmp_path):
    hostfile = tmp_path / "hosts"
    name = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    hostfile.write_text(f"other slots=2\n{name} slots=2\n")
    code, errors, (call,) = stage.run(
        "launch/multinode.sh", "--hostfile", str(hostfile), "--no-ssh", "--", "--config", "c.yaml"
    )
    assert code == 0, errors
    assert call["argv"] == [
        "deepspeed",
        *("--hostfile", str(hostfile), "--master_addr", "other", "--master_port", "29500"),
        *("--no_ssh", "--node_rank", "1", TRAIN, "--config", "c.yaml"),
    ]


def test_options_of_the_meeting_place(stage, hostfile):
    options = ("--master-addr", "10.0.0.9", "--master-port", "31000", "--node-rank", "0")
    more = ("--program", "launch/bench.py", "--no-ssh", "--", "--shape", "tiny")
    code, errors, (call,) = stage.run("launch/multinode.sh", "--hostfile", hostfile, *options, *more)
    assert code == 0, errors
    assert call["argv"][3:] == [
        *("--master_addr", "10.0.0.9", "--master_port", "31000", "--no_ssh", "--node_rank", "0"),
        *("launch/bench.py", "--shape", "tiny"),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--hostfile FILE"),
        (["--hostfile", "nowhere"], "no hostfile nowhere"),
        (["--hostfile", os.devnull], "no hostfile"),
        (["--config", "c.yaml"], "unknown option --config"),
    ],
)
def test_mistakes_are_named(stage, arguments, said):
    code, errors, calls = stage.run("launch/multinode.sh", *arguments)
    assert code == 2 and said in errors and not calls


def test_a_host_that_is_not_in_the_file_and_a_missing_pdsh(stage, hostfile):
    code, errors, _ = stage.run("launch/multinode.sh", "--hostfile", hostfile, "--no-ssh")
    assert code == 2 and "does not stand in" in errors and "node-a node-b" in errors
    (stage.folder / "bin" / "pdsh").unlink()
    path = f"{stage.folder / 'bin'}:{without('pdsh', stage.folder)}"
    code, errors, _ = stage.run("launch/multinode.sh", "--hostfile", hostfile, PATH=path)
    assert code == 2 and "pdsh is not installed" in errors


def without(tool: str, folder: Path) -> Path:
    """A folder with the system's tools except one."""
    tools = folder / "tools"
    tools.mkdir()
    for source in (Path("/usr/bin"), Path("/bin")):
        for path in source.iterdir():
            if path.name != tool and not (tools / path.name).exists():
                (tools / path.name).symlink_to(path)
    return tools


def test_help_needs_nothing(stage):
    process = stage.start("launch/multinode.sh", "--help")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "--master-port PORT" in out and "set -euo" not in out


# --- launch/slurm -------------------------------------------------------------------------------------------


def test_one_launcher_per_node(stage):
    code, errors, (call,) = stage.run(
        "launch/slurm/train.sbatch", "--config", "a b.yaml", watched="MASTER_ADDR MASTER_PORT", **SLURM
    )
    assert code == 0, errors
    assert call["argv"] == [
        *("srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpu-bind=none"),
        *("launch/slurm/node.sh", "launch/train.py", "--config", "a b.yaml"),
    ]
    assert call["env"] == {"MASTER_ADDR": "a", "MASTER_PORT": "20007"}


@pytest.mark.parametrize(
    ("extra", "slots"),
    [({}, 4), ({"VERSATUNE_RANKS_PER_NODE": "3"}, 3), ({"SLURM_GPUS_ON_NODE": ""}, 1)],
)
def test_a_node_starts_its_launcher(stage, extra, slots):
    place = {"SLURM_NODEID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "20007"}
    code, errors, (call,) = stage.run(
        "launch/slurm/node.sh", "launch/train.py", "--config", "c.yaml", **SLURM | place | extra
    )
    assert code == 0, errors
    ((path, content),) = call["files"].items()
    assert content == f"a slots={slots}\nb slots={slots}\n"
    assert call["argv"] == [
        *("deepspeed", "--hostfile", path, "--master_addr", "a", "--master_port", "20007"),
        *("--no_ssh", "--node_rank", "1", "launch/train.py", "--config", "c.yaml"),
    ]
    assert call["ignored"] == ["SIGUSR1", "SIGTERM"]  # or the launcher dies before the ranks have saved
    assert not Path(path).exists()


def test_one_task_per_gpu(stage):
    code, errors, (call,) = stage.run("launch/slurm/train_srun.sbatch", "--config", "c.yaml", **SLURM)
    assert code == 0, errors
    assert call["argv"] == [
        *("srun", "--kill-on-bad-exit=1", "--cpu-bind=none", "launch/slurm/rank.sh"),
        *("python", "-u", "launch/train.py", "--config", "c.yaml"),
    ]


def test_tasks_must_be_gpus(stage):
    code, errors, calls = stage.run(
        "launch/slurm/train_srun.sbatch", **SLURM | {"SLURM_NTASKS_PER_NODE": "8"}
    )
    assert code == 2 and "8 tasks and 4 GPUs per node" in errors and not calls


def test_a_task_becomes_a_rank(stage):
    numbers = {
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "2",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NUM_NODES": "2",
    }
    meeting = {"MASTER_ADDR": "a", "MASTER_PORT": "20007"}
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE CROSS_RANK CROSS_SIZE"
    code, errors, (call,) = stage.run(
        "launch/slurm/rank.sh", "python", "x.py", watched=names, **numbers, **meeting
    )
    assert code == 0, errors
    assert call["argv"] == ["python", "x.py"] and call["ignored"] == ["SIGUSR1"]
    assert call["env"] == dict(zip(names.split(), ["6", "2", "8", "4", "1", "2"], strict=True))
    uneven = numbers | {"SLURM_STEP_NUM_TASKS": "7"}
    code, errors, _ = stage.run("launch/slurm/rank.sh", "python", **uneven, **meeting)
    assert code == 2 and "7 tasks on 2 nodes" in errors
    code, errors, _ = stage.run("launch/slurm/rank.sh", "python", **numbers)
    assert code != 0 and "name the node where the ranks meet" in errors


def test_bench(stage):
    code, errors, (call,) = stage.run("launch/slurm/bench.sbatch", "--shape", "tiny", **SLURM)
    assert code == 0, errors
    assert call["argv"][-4:] == ["launch/slurm/node.sh", "launch/bench.py", "--shape", "tiny"]


def test_array(stage):
    place = {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "4"}
    place["SLURM_ARRAY_TASK_COUNT"] = "5"
    command = ("versatune-ds", "study", "run.seed={index}", "{index}/{count}", "a b")
    code, errors, (call,) = stage.run("launch/slurm/study_array.sbatch", *command, **SLURM | place)
    assert code == 0, errors
    assert call["argv"][-6:] == ["element", "versatune-ds", "study", "run.seed=2", "2/5", "a b"]


def test_submitted_from_elsewhere(stage):
    elsewhere = SLURM | {"SLURM_SUBMIT_DIR": "/"}
    code, errors, calls = stage.run("launch/slurm/train.sbatch", **elsewhere)
    assert code == 2 and "submit from the root of the repository" in errors and not calls


def warn(stage: Stage, does: str) -> tuple[int, str, list[list[str]]]:
    """A batch script that gets SLURM's warning while its step runs: (exit code, output, calls)."""
    process = stage.start("launch/slurm/train.sbatch", **SLURM, SRUN_DOES=does)
    ready = Path(f"{stage.record}.ready")
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out + errors, [call["argv"] for call in stage.calls()]


def test_a_step_that_saved_when_warned_is_requeued(stage):
    code, text, calls = warn(stage, WHEN_WARNED.format(SAVE))
    assert code == 0 and "saved; requeueing job 20007" in text
    assert calls[1:] == [["scontrol", "requeue", "20007"]]
    assert not list((stage.folder / "tmp").iterdir())


def test_a_step_that_finished_when_warned_is_not(stage):
    code, _, calls = warn(stage, WHEN_WARNED.format("pass"))
    assert code == 0 and len(calls) == 1


def test_a_step_that_failed_passes_its_code_on(stage):
    does = "sys.exit(5)"
    code, _, calls = stage.run("launch/slurm/train.sbatch", **SLURM, SRUN_DOES=does)
    assert code == 5 and len(calls) == 1


def test_a_step_that_saved_unasked_is_not_requeued(stage):
    """Somebody stopped it (scancel, a signal to a rank): it stays stopped."""
    code, _, calls = stage.run("launch/slurm/train.sbatch", **SLURM, SRUN_DOES=SAVE)
    assert code == 0 and len(calls) == 1
    assert not list((stage.folder / "tmp").iterdir())
