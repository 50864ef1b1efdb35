"""Packing: which samples share a pack of `pack_len` tokens. Pure functions of lengths.

A training step has a fixed number of packs and more samples than fit. `fill_packs` places them and returns
what is left:

0. new samples are held back, longest first, as far as the rest still fills the packs: this leaves few
   samples over where leaving out the shortest ones would leave many;
1. samples carried over from earlier steps, oldest first, by best fit, so that none waits long;
2. long new samples (at least pack_len / `SPREAD_FRACTION`), longest first, each into the pack with the
   smallest sum of squared lengths that has room: attention cost is spread evenly, which no order of
   finished packs can do when there is one pack per rank;
3. the other new samples, longest first, by best fit, which closes the gaps.

`pack_all` packs a whole set (evaluation) into as many packs as best-fit decreasing needs. Best-fit
decreasing uses at most 11/9 of the optimal number of packs + 1 (Johnson 1974); with many short samples it
is near optimal.

Equal choices are decided by index, so the result is a function of the lengths alone.

What is not covered: which samples come (planner), and which rank gets which pack (balance).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SPREAD_FRACTION = 64
"""Samples of at least pack_len / 64 tokens are spread by attention cost. Measured in docs/planning.md:
smaller samples are too cheap to matter and better used to close gaps."""
MAX_TRIES = 8
"""Packs in which spreading looks for room before it leaves the rest to best fit."""

_BIN_BITS = 24
_BIN_MASK = (1 << _BIN_BITS) - 1


@dataclass(frozen=True, eq=False)
class Pack:
    """Samples that share one pack, S of them, in the order in which they lie in it.

    Attributes:
        domains: int32[S], domain id of each sample.
        samples: int64[S], index of each sample inside its domain.
        lengths: int32[S], tokens of each sample.
    """

    domains: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]

    @property
    def length(self) -> int:
        """Real tokens, without padding."""
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.samples)


class _BestFit:
    """Free space of packs, sorted; the fullest pack that still has room is found by bisection.

    A pack is one integer, free tokens above the pack's number, so that the list sorts by free tokens and
    then by number. With n packs a placement costs O(log n) comparisons and one memory move of 8n bytes at
    most (64 packs: one cache line in eight; packs with less room than the shortest sample are dropped).
    """

    def __init__(self, shortest: int) -> None:
        self._shortest = shortest
        self._slots: list[int] = []

    def add(self, pack: int, free: int) -> None:
        """Offer the pack with `free` tokens of room."""
        if free >= self._shortest:
            insort(self._slots, free << _BIN_BITS | pack)

    def place(self, length: int) -> int:
        """Put `length` tokens into the fullest pack with room and return its number, or -1."""
        at = bisect_left(self._slots, length << _BIN_BITS)
        if at == len(self._slots):
            return -1
        slot = self._slots.pop(at)
        pack = slot & _BIN_MASK
        self.add(pack, (slot >> _BIN_BITS) - length)
        return pack

    def free_by_pack(self) -> dict[int, int]:
        """Room of every pack on offer."""
        return {slot & _BIN_MASK: slot >> _BIN_BITS for slot in self._slots}


def fill_packs(
    lengths: Sequence[int], num_carried: int, num_packs: int, pack_len: int
) -> tuple[list[list[int]], list[int]]:
    """Fill exactly `num_packs` packs from more samples than fit.

    Args:
        lengths: tokens of each sample, 1..pack_len; the first `num_carried` are carried over, and they
            stand in the order in which they are to be placed (oldest first).
        num_carried: samples to place before all others.

    Returns:
        (packs, rest): the indices into `lengths` in each pack (some packs may be empty when there are too
        few samples), and the indices that did not fit, in rising order.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    if not lengths:
        return packs, []
    new = sorted(range(num_carried, len(lengths)), key=lengths.__getitem__, reverse=True)
    new, rest = _hold_back(new, lengths, excess=sum(lengths) - num_packs * pack_len)
    threshold = -(-pack_len // SPREAD_FRACTION)
    num_long = next((i for i, s in enumerate(new) if lengths[s] < threshold), len(new))
    shortest = min(lengths)

    fit = _BestFit(shortest)
    for number in range(num_packs):
        fit.add(number, pack_len)
    _place_best_fit(range(num_carried), lengths, fit, packs, rest)
    free = fit.free_by_pack()
    num_spread = _place_spread(new[:num_long], lengths, free, packs)
    fit = _BestFit(shortest)
    for number, room in free.items():
        fit.add(number, room)
    _place_best_fit(new[num_spread:], lengths, fit, packs, rest)
    rest.sort()
    return packs, rest


def _hold_back(order: Sequence[int], lengths: Sequence[int], excess: int) -> tuple[list[int], list[int]]:
    """Split `order` into (kept, held): held samples have together at most `excess` tokens."""
    kept, held = [], []
    for sample in order:
        if lengths[sample] <= excess:
            excess -= lengths[sample]
            held.append(sample)
        else:
            kept.append(sample)
    return kept, held


def _place_best_fit(
    order: Sequence[int], lengths: Sequence[int], fit: _BestFit, packs: list[list[int]], rest: list[int]
) -> None:
    """Place samples in `order`, each into the fullest pack that has room; appends to packs and rest."""
    for sample in order:
        number = fit.place(lengths[sample])
        if number < 0:
            rest.append(sample)
        else:
            packs[number].append(sample)


def _place_spread(
    order: Sequence[int], lengths: Sequence[int], free: dict[int, int], packs: list[list[int]]
) -> int:
    """Place samples in `order`, each into the pack of lowest sum of squared lengths that has room.

    `free` holds the room of each pack and is updated. A pack too full for a sample is set aside for that
    sample only: the next one is shorter and may fit. When the cheapest packs are full the long samples
    alone fill the step; cost can no longer be chosen, and the search ends.

    Returns:
        the number of samples placed: all of `order`, or those before the search ended.
    """
    heap = [(sum(lengths[s] ** 2 for s in packs[number]), number) for number in free]
    heapq.heapify(heap)
    for placed, sample in enumerate(order):
        length = lengths[sample]
        aside: list[tuple[int, int]] = []
        while heap and free[heap[0][1]] < length and len(aside) < MAX_TRIES:
            aside.append(heapq.heappop(heap))
        if not heap or len(aside) == MAX_TRIES:
            return placed
        cost, number = heap[0]
        heapq.heapreplace(heap, (cost + length * length, number))
        free[number] -= length
        packs[number].append(sample)
        for entry in aside:
            heapq.heappush(heap, entry)
    return len(order)


def pack_all(lengths: Sequence[int] | npt.NDArray[np.int32], pack_len: int) -> list[npt.NDArray[np.int64]]:
    """Pack every sample by best-fit decreasing, opening packs as needed.

    Args:
        lengths: tokens of each sample, 1..pack_len.

    Returns:
        for each pack the int64 indices into `lengths`; none is empty, each sample is in exactly one.

    Raises:
        ValueError: a sample is longer than a pack.
    """
    sizes = [int(n) for n in lengths]
    if not sizes:
        return []
    longest = max(sizes)
    if longest > pack_len:
        raise ValueError(f"sample {sizes.index(longest)} has {longest} tokens; a pack holds {pack_len}")
    packs: list[list[int]] = []
    fit = _BestFit(min(sizes))
    for sample in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        number = fit.place(sizes[sample])
        if number < 0:
            number = len(packs)
            packs.append([])
            fit.add(number, pack_len - sizes[sample])
        packs[number].append(sample)
    return [np.array(pack, dtype=np.int64) for pack in packs]
