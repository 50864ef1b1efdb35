"""Several "hosts" on this machine and a real SLURM over them; the work is in tests/support/cluster/*.sh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launching import REPOSITORY

SCRIPTS = REPOSITORY / "tests" / "support" / "cluster"
PATIENCE_S = 180
"""How long a condition that must come true may take on a busy machine."""
END_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def why_no_hosts() -> str | None:
    """Why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "hosts of their own need root"
    for tool in ("unshare", "nsenter", "ip", "pgrep", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    probe = "unshare --net --uts --mount --pid --ipc --fork --mount-proc ip link add br0 type bridge"
    done = subprocess.run(probe.split(), capture_output=True, text=True)
    return None if done.returncode == 0 else f"no namespaces or bridges here: {done.stderr.strip()}"


def why_no_slurm() -> str | None:
    """Why SLURM cannot be started here, or None."""
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(tool) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def wait_until(
    condition: Callable[[], bool], what: str, log: Path | None = None, seconds: float = PATIENCE_S
) -> None:
    """Poll until `condition()`; fails with `what` and the end of `log` otherwise."""
    deadline = time.monotonic() + seconds
    while not condition():
        late = time.monotonic() > deadline
        assert not late, f"not within {seconds:g} s: {what}\n{tail(log) if log else ''}"
        time.sleep(0.1)


class Hosts:
    """Hosts n1, n2 that train and ctl, from where people start things."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._script = str(SCRIPTS / "hosts.sh")
        subprocess.run([self._script, "up", str(folder), "2"], check=True, timeout=60)

    def down(self) -> None:
        """Everything away, whatever still runs there."""
        subprocess.run([self._script, "down", str(self.folder)], check=True, timeout=60)

    def start(self, host: str, *command: str, output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a host, in the repository; both streams are appended to `output`."""
        with open(output, "ab") as stream:
            return subprocess.Popen(
                [self._script, "on", str(self.folder), host, *command],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def run(self, host: str, *command: str, check: bool = True, **environment: str) -> str:
        """Run a command on a host to its end and return what it printed."""
        done = subprocess.run(
            [self._script, "on", str(self.folder), host, *command],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert not check or done.returncode == 0, f"{host}: {command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def processes(self, host: str, pattern: str) -> list[str]:
        """Ids, as the host numbers them, of processes whose command line matches."""
        return self.run(host, "pgrep", "-f", "--", pattern, check=False).split()


class Slurm:
    """SLURM over `hosts`; commands run on ctl, the login node."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.configuration = str(hosts.folder / "slurm" / "slurm.conf")
        subprocess.run([str(SCRIPTS / "slurm.sh"), "up", str(hosts.folder)], check=True, timeout=60)

    def command(self, *command: str) -> str:
        """A SLURM command's output."""
        return self.hosts.run("ctl", *command, SLURM_CONF=self.configuration, PYTHONSAFEPATH="1")

    def submit(self, output: Path, *arguments: str) -> str:
        """Job id of `sbatch ARGUMENTS`."""
        return self.command("sbatch", "--parsable", "--output", str(output), *arguments)

    def job(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        text = self.command("scontrol", "show", "job", "-o", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: str, output: Path) -> dict[str, str]:
        """Wait until the job is over for good; returns what scontrol knows of it."""

        def over() -> bool:
            return self.job(job)["JobState"] in END_STATES

        wait_until(over, f"the end of job {job}", output)
        return self.job(job)


def tail(path: Path, lines: int = 40) -> str:
    """The last lines of a log, for messages."""
    text = path.read_text(errors="replace") if path.exists() else "(no output)"
    return "\n".join(text.splitlines()[-lines:])
