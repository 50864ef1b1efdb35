"""Files that are whole or absent: atomic writes, folder syncs, content hashes.

A file is written beside its target, synced, and renamed over it; a crash leaves the old file or the new
one, never half of one, and perhaps the temporary file. Renames are atomic on one file system only, so the
temporary file lies in the target's own folder.

What is not covered: locks between processes (the token cache uses `filelock`) and remote object stores.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from versatune_ds.foundations.errors import StateError

HASH_BLOCK_BYTES = 1 << 22


def fsync_dir(path: Path) -> None:
    """Make renames and new names inside the folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make all files directly inside `folder` durable, and their names."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_dir(folder)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, durably, so that readers see all of it or none."""
    path = Path(os.path.realpath(path))  # of a link, the file that it leads to
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600; give what open() would have given
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


@contextlib.contextmanager
def writing(path: Path, cure: str) -> Iterator[None]:
    """What the system refuses inside becomes a StateError: `path` cannot be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        raise StateError(f"{path} cannot be written ({error.strerror}); {cure}") from error


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` for JSON with indentation; NaN is refused (it is not JSON)."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file, or one that holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def require_own(folder: Path, signs: Mapping[str, str], cure: str = "give another place with --out") -> None:
    """Refuse to replace files that this program did not write, before the work that they would be for.

    Args:
        signs: name of each file that will be written -> text that such a file holds in its first 64 KiB.
        cure: what else to do.

    Raises:
        StateError: files of these names are there and hold something else.
    """
    foreign = [name for name, sign in signs.items() if not _has(folder / name, sign.encode())]
    if foreign:
        raise StateError(
            f"{folder} holds {', '.join(foreign)}, which this program did not write and would replace; move "
            f"that away, or {cure}"
        )


def _has(path: Path, sign: bytes) -> bool:
    """Whether a file holds a text near its beginning, or nothing; or is not there."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return not head or sign in head


def remove_temporaries(path: Path) -> None:
    """Remove what killed processes left of atomic writes of `path`; only while no other process writes it."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        if re.fullmatch(r"[a-z0-9_]{8}", leftover.name[len(path.name) + 2 :]):  # not an editor's .NAME.swp
            leftover.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        return sha256_stream(file)


def sha256_stream(file: BinaryIO) -> str:
    """Hex SHA-256 of the rest of an opened file, read in blocks."""
    digest = hashlib.sha256()
    while block := file.read(HASH_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def canonical_hash(value: Any) -> str:
    """Hex SHA-256 of `value` as JSON with sorted keys: equal values give equal hashes on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def expanded(path: str) -> str:
    """A path with `~`, `~USER`, `$NAME` and `${NAME}` filled in.

    Raises:
        ValueError: no such user or variable, and no file of that very name.
    """
    full = os.path.expandvars(os.path.expanduser(path))
    if os.path.lexists(full):
        return full
    if full.startswith("~"):
        raise ValueError(f"{path}: there is no user {full.split('/', 1)[0][1:]!r}")
    if unset := re.search(r"\$(\w+|\{[^}]*\})", full):
        raise ValueError(f"{path}: the environment has no {unset[1].strip('{}')}")
    return full


def folder_name(name: str) -> str:
    """A folder name for any name. Names with odd characters get a hash, so that no two fall together, and so
    do names that end like a file of ours that may lie beside them (unit.json)."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:60].lstrip(".")
    odd = safe != name or Path(name).suffix in (".json", ".jsonl", ".lock")
    return f"{safe}-{canonical_hash(name)[:8]}" if odd else safe
