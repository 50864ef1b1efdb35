"""Copies of a state in host memory, and whether the hosts have room for those of all their ranks.

What is not covered: page-locked memory.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

USABLE = 0.9
"""Of a host's available memory; the rest is for what it does meanwhile (data, buffers of the files)."""


class Need(NamedTuple):
    """What one rank would copy, and the memory it sees."""

    host: str
    copy_bytes: int
    available_bytes: int


def hosts_without_room(needs: Sequence[Need]) -> list[str]:
    """Hosts whose memory cannot take the copies of all their ranks, each with what it lacks, in words."""
    found = []
    for host in sorted({need.host for need in needs}):
        ranks = [need for need in needs if need.host == host]
        wanted, free = sum(n.copy_bytes for n in ranks), min(n.available_bytes for n in ranks)
        if wanted > USABLE * free:
            found.append(
                f"{host} (the copies of {len(ranks)} rank(s) take {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                "are free)"
            )
    return found


def host_bytes(value: Any) -> int:
    """What `host_copy` of a state takes; memory that tensors share counts once."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def host_copy(value: Any) -> Any:
    """Copy a state into host memory, so that training may go on to change it.

    Tensors that share memory share it in the copy too, as `torch.save` would write it.

    Args:
        value: tensors in dictionaries, lists and tuples; anything else is deep-copied.
    """
    storages: dict[int, tuple[Any, Any]] = {}
    # by address: originals, which must not be freed meanwhile, and their copies

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        storage = leaf.untyped_storage()
        if storage._cdata not in storages:
            on_host = storage.clone() if storage.device.type == "cpu" else storage.cpu()
            storages[storage._cdata] = (storage, on_host)
        empty, held = torch.empty(0, dtype=leaf.dtype), storages[storage._cdata][1]
        return empty.set_(held, leaf.storage_offset(), leaf.size(), leaf.stride())

    return tree_map(copied, value)
