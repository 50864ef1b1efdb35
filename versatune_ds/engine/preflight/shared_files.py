"""Several nodes: they must see one run folder and the same data.

Both checks run before a model is built, on all ranks. Each rank says what it sees, all get all answers, and
all raise the same error, which names the nodes. A rank that raised alone would leave the others waiting.

What is not covered: different code or settings on the nodes (`consistency.py`), and ranks that are lost or
late during the run (`engine/faults/heartbeat.py`).
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from versatune_ds.config.schema import Config
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import StateError, VersaTuneError
from versatune_ds.foundations.text import listed

SEEN_WITHIN_S = 10.0
"""Network file systems may show a new file to other nodes a little later."""


class CacheView(NamedTuple):
    """What one rank sees of the token caches."""

    host: str
    problem: VersaTuneError | None
    fingerprints: dict[str, str]
    """`split/domain` -> content hash."""


def check_shared_folder(folder: Path) -> None:
    """Refuse a run folder that is not one and the same on all nodes; a collective.

    Rank 0 writes a file of a new name there and the others look for it.

    Raises:
        StateError: ranks do not see rank 0's file; names their nodes.
    """
    if distributed.world_size() == 1:
        return
    name: str = distributed.gather_objects(f".seen-by-all-{uuid.uuid4().hex}")[0]
    probe = folder / name
    if distributed.is_main():
        probe.touch()
    try:
        distributed.barrier()
        seen = [(socket.gethostname(), _appears(probe))]
        answers = [answer for found in distributed.gather_objects(seen) for answer in found]
    finally:
        if distributed.is_main():
            probe.unlink(missing_ok=True)
    blind = _unique(host for host, found in answers if not found)
    if blind:
        raise StateError(
            f"run.dir {folder} is not one folder on all nodes: a file written there on {answers[0][0]} is "
            f"not seen on {_listed(blind)}. Checkpoints need a run folder that all nodes share; put run.dir "
            "on a shared file system that is mounted at the same path everywhere"
        )


def open_caches_on_all_nodes(config: Config) -> dict[str, list[Any]]:
    """The verified caches, and proof that every node has caches with the same content; a collective.

    Raises:
        VersaTuneError: what `open_caches` raises, when it fails on all nodes.
        StateError: some nodes cannot open the caches, or hold others; names these nodes.
    """
    caches: dict[str, list[Any]] = {}
    problem: VersaTuneError | None = None
    try:
        caches = preflight.open_verified_caches(config)
    except VersaTuneError as error:
        problem = error
    fingerprints = {
        f"{split}/{name}": cache.fingerprint
        for split, of_split in caches.items()
        for name, cache in zip(config.domains.names, of_split, strict=True)
        if cache is not None
    }
    mine = CacheView(socket.gethostname(), problem, fingerprints)
    compare_caches(distributed.gather_objects(mine), config.data.cache_shared)
    return caches


def compare_caches(views: list[CacheView], cache_shared: bool) -> None:
    """Raise what is wrong with the caches, if anything is; the same on every rank, given the same views.

    Args:
        views: one per rank, in rank order.
        cache_shared: `data.cache_shared`, which decides what to do about a node that differs.
    """
    failed = [view for view in views if view.problem is not None]
    hosts = _unique(view.host for view in failed)
    if failed and failed[0].problem is not None and hosts == _unique(view.host for view in views):
        raise failed[0].problem
    if failed:
        where = _listed(hosts)
        raise StateError(
            f"on {where}, and not on the other nodes: {failed[0].problem}\n{_cure(cache_shared)}"
        )
    first = views[0]
    others = [view for view in views if view.fingerprints != first.fingerprints]
    if others:
        theirs, ours = others[0].fingerprints, first.fingerprints
        parts = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise StateError(
            f"the token caches on {_listed(_unique(view.host for view in others))} differ from those on "
            f"{first.host} in {', '.join(parts)}. " + _cure(cache_shared)
        )


def _cure(cache_shared: bool) -> str:
    if cache_shared:
        return (
            "data.cache_shared is true: all nodes must see one data.cache_dir (is it mounted there?). If "
            "every node keeps its own, set data.cache_shared: false and run prepare once on each node"
        )
    return (
        "data.cache_shared is false: run prepare once on each node, from the same raw files, tokenizer "
        "and settings"
    )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _unique(hosts: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(hosts))


def _listed(hosts: list[str]) -> str:
    return f"node{'s' if len(hosts) > 1 else ''} {listed(hosts, 8)}"
