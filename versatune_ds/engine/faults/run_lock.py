"""One run per run folder: rank 0 holds a lock for as long as the run lives.

The lock is the operating system's (`filelock`, flock), so it is gone the moment its process is, however that
ended; shared file systems that pass flock on (NFSv4, Lustre with `-o flock`, GPFS) guard across nodes too.
Beside it lies a file that names the holder, for the error text. A clean end removes it: one that is found
without a lock belongs to a run that was killed, and that is said.

What is not covered: file systems whose locks end at the node (NFS with `local_lock`); there the warning about
a holder on another host is all there is.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from versatune_ds.foundations import constants, distributed
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import read_json_object, remove_temporaries, write_json_atomic
from versatune_ds.foundations.log import get_logger

log = get_logger(__name__)


class RunLock:
    """The lock of a run folder, as a context manager; every rank enters and leaves.

    Args:
        folder: the run folder; made if it is not there.

    Raises:
        StateError: on entering, on all ranks: another process holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._holder = folder / constants.RUN_HOLDER_FILE
        self._lock = FileLock(folder / constants.RUN_LOCK_FILE)

    def __enter__(self) -> RunLock:
        distributed.on_main(self._take)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _take(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise StateError(
                f"{self.folder} is in use by {_describe(read_json_object(self._holder))}; wait for it, stop "
                "it, or choose another run.dir"
            ) from None
        except OSError as error:
            raise unwritable(self.folder, error) from None
        if self._holder.exists():
            log.warning(
                "%s was in use by %s, which was killed; this run takes over",
                self.folder,
                _describe(read_json_object(self._holder)),
            )
        try:
            for name in (constants.RUN_HOLDER_FILE, constants.RUN_INFO_FILE, constants.RESOLVED_CONFIG_FILE):
                remove_temporaries(self.folder / name)
            write_json_atomic(
                self._holder,
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                },
            )
        except OSError as error:
            self._lock.release()
            raise unwritable(self.folder, error) from None


def unwritable(folder: Path, error: OSError) -> StateError:
    """The error for a run folder that cannot be written."""
    return StateError(f"run.dir {folder} cannot be written ({error.strerror}); choose another one")


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (started {holder.get('started_at')})"
