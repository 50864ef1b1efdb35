"""All ranks run the same code with the same settings on the same data, or the run does not start.

Each rank hashes what it sees; one gather compares. On nodes with their own copies of an environment, a
configuration, a model or a cache, a stale copy would otherwise train something that nobody asked for, or
hang where the ranks' ways part.

What is not covered: the token caches (`shared_files.py`), the weights' content (their files are compared by
name and size; reading a large model twice costs minutes), and packages beyond those that compute.
"""

from __future__ import annotations

import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import versatune_ds
import versatune_kernels
from versatune_ds.config.schema import Config
from versatune_ds.engine.provenance import describe_versions
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import canonical_hash, sha256_file
from versatune_ds.foundations.text import listed

HASHED_BYTES = 1 << 20
"""Larger files of a model folder (weights) count by name and size."""
RANKS_SHOWN = 8


def require_consistency(what: str, mine: Mapping[str, str]) -> None:
    """Compare every rank's fingerprints; a collective.

    Args:
        what: what may differ, for the error text.

    Raises:
        StateError: on all ranks, naming the parts that differ and the ranks that differ from most.
    """
    everyone = distributed.gather_objects((socket.gethostname(), dict(mine)))
    found = differences([host for host, _ in everyone], [parts for _, parts in everyone])
    if found:
        raise StateError(
            f"the ranks do not have the same {what}: {'; '.join(found)}. Bring these nodes up to date, then "
            "start again"
        )


def differences(hosts: Sequence[str], parts: Sequence[Mapping[str, str]]) -> list[str]:
    """For each part that is not the same everywhere: its name and the ranks outside the largest group.

    Args:
        hosts, parts: by rank.
    """
    found = []
    for name in sorted({name for own in parts for name in own}):
        values = [own.get(name, "nothing") for own in parts]
        usual, _ = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            named = [f"rank {rank} on {hosts[rank]} has {values[rank]}" for rank in odd]
            found.append(f"{name} ({listed(named, RANKS_SHOWN)}; the others have {usual})")
    return found


def code_and_settings(config: Config) -> dict[str, str]:
    """Fingerprints of what can be compared before any data is opened."""
    return {
        "code of versatune_ds": folder_hash(_package(versatune_ds), ".py"),
        "code of versatune_kernels": folder_hash(_package(versatune_kernels), ".py"),
        "configuration": short(canonical_hash(config.model_dump(mode="json"))),
        "model folder": folder_fingerprint(config.model.source),
        "tokenizer folder": folder_fingerprint(config.model.tokenizer or config.model.source),
        **{f"version of {name}": version for name, version in describe_versions().items()},
        "version of Python": platform.python_version(),
    }


def folder_hash(folder: Path, ending: str) -> str:
    """Hash over the names and contents of all files below `folder` that end in `ending`."""
    files = sorted(folder.rglob(f"*{ending}"))
    return short(canonical_hash({str(path.relative_to(folder)): sha256_file(path) for path in files}))


def folder_fingerprint(source: str) -> str:
    """Hash over a model folder: contents of small files, sizes of large ones; a hub name is itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    entries = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "."):
        size = path.stat().st_size
        entries[path.name] = sha256_file(path) if size <= HASHED_BYTES else str(size)
    return short(canonical_hash(entries))


def short(digest: str) -> str:
    """Enough of a hash to tell two things apart."""
    return digest[:12]


def _package(module: object) -> Path:
    return Path(str(getattr(module, "__file__", ""))).parent
