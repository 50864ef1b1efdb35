"""Ranks that another launcher than DeepSpeed's or torch's has started: seen, and used or refused.

DeepSpeed and torchrun number their ranks in RANK, WORLD_SIZE and LOCAL_RANK. mpirun and a plain srun have
names of their own; a rank that did not know them would think that it is alone, and all of them would write
one run. `join` gives torch's names to what such a launcher says.

What is not covered: launchers that say nothing (pdsh, a loop over ssh), and ranks in uneven numbers per node.
"""

from __future__ import annotations

import zlib
from collections.abc import MutableMapping
from typing import NamedTuple

from versatune_ds.foundations.errors import ConfigError


class Numbering(NamedTuple):
    """A launcher, and its variables for what torch calls RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE."""

    launcher: str
    rank: str
    size: str
    local_rank: str
    local_size: str


NUMBERINGS = (
    *(
        Numbering(name, *(f"{prefix}_COMM_WORLD_{x}" for x in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
        for name, prefix in (("mpirun (Open MPI)", "OMPI"), ("mpirun (MVAPICH)", "MV2"))
    ),
    Numbering("mpiexec (PMI)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Numbering("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
)
"""Nearest first: what mpirun starts inside of a SLURM job sees the variables of both."""
JOB_NAMES = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
FIRST_PORT, PORTS = 20000, 20000
RANKED = ("train", "bench", "detect", "evaluate", "reference")
"""Verbs that work on many ranks."""
HARMLESS = ("sample", "import-config", "prepare", "inspect", "plan", "doctor")
"""Verbs that any number of processes may run at once."""


def join(verb: str, environment: MutableMapping[str, str]) -> str | None:
    """Number this process as torch does, if a launcher of another kind started it among others.

    Args:
        environment: of the process; RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT are
            added for a verb that works on ranks.

    Returns:
        What was found, in words; None without such a launcher.

    Raises:
        ConfigError: a verb for one process, or ranks that do not know where to meet.
    """
    others = (n for n in NUMBERINGS if n.rank in environment and int(environment.get(n.size, "1")) > 1)
    found = None if "RANK" in environment else next(others, None)
    size = int(environment.get(found.size if found else "WORLD_SIZE", "1"))
    launcher = found.launcher if found else "the launcher"
    if size > 1 and verb not in (*RANKED, *HARMLESS):
        environment.setdefault("RANK", environment[found.rank] if found else "0")
        raise ConfigError(f"{verb} is for one process, and {launcher} started {size}; start it alone")
    if found is None or verb not in RANKED:
        return None
    rank = environment["RANK"] = environment[found.rank]
    environment["WORLD_SIZE"] = str(size)
    per_node = size // int(environment.get("SLURM_STEP_NUM_NODES", "1")) if found.launcher == "srun" else 1
    local_size = int(environment.get(found.local_size, per_node))
    environment["LOCAL_RANK"], environment["LOCAL_SIZE"] = (
        environment.get(found.local_rank, rank),
        str(local_size),
    )
    if local_size < size and "MASTER_ADDR" not in environment:
        raise ConfigError(
            f"{launcher} started {size} processes on several nodes, and they do not know where to meet; set "
            "MASTER_ADDR to the name of the first one's node for all of them (mpirun -x MASTER_ADDR=...), or "
            "start by deepspeed, torchrun or launch/slurm/*.sbatch"
        )
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    job = next((environment[name] for name in JOB_NAMES if name in environment), "")
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS))
    return f"started by {launcher}: rank {rank} of {size}"
