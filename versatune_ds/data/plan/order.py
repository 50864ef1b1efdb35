"""Sample order: a pseudo-random permutation of a domain's samples that is computed, not stored.

A pass over a domain visits its n samples in an order that depends on (seed, domain, pass) only. The
order is a Feistel network over the smallest bit width that holds n, with cycle walking: a value outside
[0, n) is encrypted again until it falls inside, less than twice on average. Any slice of any pass is
computed alone, so the planner's state is one position per domain, and a domain of 10^8 samples needs no
array of 10^8 indices. Small domains, for which the network has too few bits to mix well, are sorted by a
hash of the index.

Sources: Luby & Rackoff 1988 (Feistel rounds give a pseudo-random permutation); Black & Rogaway 2002
(cycle walking); the round function is the finalizer of splitmix64 (Steele et al. 2014).

What is not covered: cryptographic strength, and drawing with replacement.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 8
"""Feistel rounds; even, so that the two halves end where they began."""
MAX_SORTED_SAMPLES = 256
"""Domains up to this size are sorted by a hash of the index."""
BLOCK_SAMPLES = 4096
"""Samples that `lookup` computes at once: about 0.3 ms of work, 32 KiB of indices."""
MAX_CACHED_BLOCKS = 256
"""Blocks kept between steps: at most 8 MiB."""

_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))

Uint64 = npt.NDArray[np.uint64]


class Permutation:
    """Permutation of [0, n) for one pass of one domain.

    Args:
        num_samples: n, at least 1.
        pass_index: 0 for the first pass over the domain's samples.
    """

    def __init__(self, num_samples: int, *, seed: int, domain: int, pass_index: int) -> None:
        if num_samples < 1:
            raise ValueError(f"a permutation needs at least one sample, not {num_samples}")
        self.num_samples = num_samples
        bits = (num_samples - 1).bit_length()
        low_bits = bits // 2
        self._widths = (bits - low_bits, low_bits)
        digest = hashlib.blake2b(
            f"versatune order {seed} {domain} {pass_index}".encode(), digest_size=8 * NUM_ROUNDS // 2
        )
        half = np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)
        self._keys = np.concatenate([half, _mix(half + np.uint64(1))])

    def slice(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Sample indices at positions start..stop-1 of the pass: int64[stop - start].

        Raises:
            ValueError: the range does not lie in [0, n].
        """
        if not 0 <= start <= stop <= self.num_samples:
            raise ValueError(f"positions {start}..{stop} do not lie in 0..{self.num_samples}")
        if self.num_samples <= MAX_SORTED_SAMPLES:
            hashes = _mix(_mix(np.arange(self.num_samples, dtype=np.uint64) + self._keys[0]) ^ self._keys[1])
            return np.argsort(hashes, kind="stable")[start:stop].astype(np.int64)
        limit = np.uint64(self.num_samples)
        values = self._encrypt(np.arange(start, stop, dtype=np.uint64))
        outside = np.flatnonzero(values >= limit)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= limit]
        return values.astype(np.int64)

    def _encrypt(self, values: Uint64) -> Uint64:
        """One pass of the Feistel network over uint64[m]; a bijection of [0, 2^bits)."""
        high_bits, low_bits = self._widths
        high = values >> np.uint64(low_bits)
        low = values & np.uint64((1 << low_bits) - 1)
        # The halves may differ by one bit: each round swaps their widths, an even number restores them.
        high_mask, low_mask = np.uint64((1 << high_bits) - 1), np.uint64((1 << low_bits) - 1)
        for key in self._keys:
            high, low = low, high ^ (_mix(low + key) & high_mask)
            high_mask, low_mask = low_mask, high_mask
        return (high << np.uint64(low_bits)) | low


def _mix(values: Uint64) -> Uint64:
    """splitmix64's finalizer: every input bit changes every output bit with probability 1/2."""
    values = (values ^ (values >> _SHIFTS[0])) * _MULTIPLIER_1
    values = (values ^ (values >> _SHIFTS[1])) * _MULTIPLIER_2
    return values ^ (values >> _SHIFTS[2])


@functools.lru_cache(maxsize=MAX_CACHED_BLOCKS)
def _block(num_samples: int, seed: int, domain: int, pass_index: int, index: int) -> npt.NDArray[np.int64]:
    permutation = Permutation(num_samples, seed=seed, domain=domain, pass_index=pass_index)
    start = index * BLOCK_SAMPLES
    block = permutation.slice(start, min(start + BLOCK_SAMPLES, num_samples))
    block.flags.writeable = False
    return block


def lookup(
    num_samples: int, position: int, *, seed: int, domain: int, pass_index: int
) -> npt.NDArray[np.int64]:
    """Sample indices from `position` of a pass up to the end of its cached block: int64[m], m >= 1.

    The same numbers as `Permutation.slice`; blocks are kept between calls because consecutive steps read
    on where the last one stopped.
    """
    index, offset = divmod(position, BLOCK_SAMPLES)
    return _block(num_samples, seed, domain, pass_index, index)[offset:]
