"""Made-up samples for benchmarks: long-tailed lengths, and samples in memory in the shape of a token cache.

What is not covered: text; what the tokens are is the maker's choice (`random_samples`, `apps/evidence`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RANDOM_SAMPLES = 4096
LONGEST = 32768


def long_tailed_lengths(
    rng: np.random.Generator, median_log: float, size: int, longest: int = LONGEST
) -> npt.NDArray[np.int32]:
    """int32[size] tokens, 8 .. longest: log-normal about exp(median_log), one in seven from a long tail."""
    body, tail = rng.lognormal(median_log, 0.8, size), rng.lognormal(7.5, 1.2, size)
    return np.where(rng.random(size) < 1 / 7, tail, body).clip(8, longest).astype(np.int32)


def domain_lengths(domain: int, size: int, longest: int = LONGEST) -> npt.NDArray[np.int32]:
    """Lengths of one of several domains, whose medians are 150 to 600 tokens; the same on every rank."""
    return long_tailed_lengths(np.random.default_rng(domain), 5.0 + 0.25 * domain, size, longest)


class MemorySamples:
    """One domain's samples, held in memory, all of weight 1.

    Args:
        name: where they come from.
        tokens: uint32[n] of each sample.
        masks: bool[n] of each: whether the token has a label.
    """

    def __init__(
        self, name: str, tokens: Sequence[npt.NDArray[np.uint32]], masks: Sequence[npt.NDArray[np.bool_]]
    ) -> None:
        self._name, self._tokens, self._masks = name, tokens, masks
        self.lengths = np.array([len(sample) for sample in tokens], np.int32)
        self.supervised = np.array([mask.sum() for mask in masks], np.int32)
        self.weight_sums = None
        self.fingerprint = f"{name} {len(self.lengths)} {int(self.lengths.sum())}"

    def sample(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Tokens uint32[n] and mask bool[n] of the tokens to be predicted."""
        return self._tokens[index], self._masks[index]

    def source_of(self, index: int) -> tuple[str, int]:
        """Where a sample comes from, for messages about losses that are not finite."""
        return self._name, index + 1


def random_samples(domain: int, vocab_size: int, pack_len: int, supervised: float) -> MemorySamples:
    """A domain of random tokens; the last `supervised` share of each sample has labels."""
    lengths = domain_lengths(domain, RANDOM_SAMPLES, pack_len)
    labelled = np.round(lengths * supervised).clip(1, lengths - 1).astype(np.int32)
    rng = np.random.default_rng((domain, vocab_size))
    tokens = np.split(rng.integers(0, vocab_size, lengths.sum(), np.uint32), lengths.cumsum()[:-1])
    masks = [np.arange(n) >= n - last for n, last in zip(lengths, labelled, strict=True)]
    return MemorySamples(f"synthetic {domain} {vocab_size} {pack_len} {supervised}", tokens, masks)
