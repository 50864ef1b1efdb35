"""Which ranks share out the packs of a step, and which share one pack.

Packs and held-out samples go over the data-parallel ranks; the rows of a pack go over the ranks of a
sequence group (`batch.sequence_parallel`), which are neighbours: on one node where its ranks are a multiple.
Parameters, gradients and the tokens that a loss is divided by go over all ranks.

What is not covered: what a sequence group does with its pack (`engine/model/sequence.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.text import divisors


class Group(NamedTuple):
    """This rank's place among the ranks of one kind."""

    rank: int
    size: int


class Ranks(NamedTuple):
    """This rank's two groups. Ranks with the same `dp.rank` compute the same packs."""

    dp: Group
    """Ranks that have different packs."""
    sp: Group
    """Ranks that share a pack."""

    @property
    def size(self) -> int:
        """All ranks, over which gradients are averaged."""
        return self.dp.size * self.sp.size

    @classmethod
    def of_world(cls, sharing: int = 1) -> Ranks:
        """All ranks of the launch; each `sharing` neighbours share a pack.

        Raises:
            ConfigError: their number is no multiple.
        """
        rank, groups = distributed.rank(), count_groups(distributed.world_size(), sharing)
        return cls(Group(rank // sharing, groups), Group(rank % sharing, sharing))


def count_groups(ranks: int, sharing: int) -> int:
    """Groups of `sharing` ranks, of which each has packs of its own; ConfigError: no multiple."""
    if ranks % sharing:
        raise ConfigError(
            f"batch.sequence_parallel is {sharing}, and {ranks} ranks are no multiple of it; use one of "
            f"{divisors(ranks)}, or other ranks"
        )
    return ranks // sharing
