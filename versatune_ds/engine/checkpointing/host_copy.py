"""Copies of a state in host memory, and whether the hosts have room for those of all their ranks.

What is not covered: page-locked memory.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

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


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that `host_copy` copies."""
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (dict, OrderedDict):
        for item in value.values():
            yield from _tensors(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from _tensors(item)


def host_bytes(value: Any) -> int:
    """What `host_copy` of a state takes; memory that tensors share counts once."""
    storages = (tensor.untyped_storage() for tensor in _tensors(value))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def host_copy(value: Any, storages: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """Copy a state into host memory, so that training may go on to change it.

    Tensors that share memory share it in the copy too, as `torch.save` would write it.

    Args:
        value: tensors in dictionaries, lists and tuples; anything else is deep-copied.
        storages: copies made so far, by address, with their originals, which must not be freed meanwhile.
    """
    storages = {} if storages is None else storages
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = (
                storage,
                storage.clone() if storage.device.type == "cpu" else storage.cpu(),
            )
        empty = torch.empty(0, dtype=value.dtype)
        held = storages[storage._cdata][1]
        return empty.set_(held, value.storage_offset(), value.size(), value.stride())
    if type(value) in (dict, OrderedDict):
        return type(value)((key, host_copy(item, storages)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(host_copy(item, storages) for item in value)
    return copy.deepcopy(value)
