"""Which ranks share out the packs of a step, and which share one pack.

Two numbers follow from it wherever data is divided: packs, held-out samples and the tokens that a loss is
divided by go over the data-parallel ranks; the tokens of a pack would go over the ranks of a sequence group.

What is not covered: sequence parallelism itself; sequence groups have one rank.
"""

from __future__ import annotations

from typing import NamedTuple

from versatune_ds.foundations import distributed


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

    @classmethod
    def of_world(cls) -> Ranks:
        """All ranks of the launch have packs of their own."""
        return cls(Group(distributed.rank(), distributed.world_size()), Group(0, 1))
