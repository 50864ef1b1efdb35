"""Pre-tokenised samples in a file of NumPy arrays, which every trainer of a comparison reads.

Lengths are log-normal with a long tail (median about 250 tokens, one sample in seven from the tail), the
second half of a sample has labels, and tokens follow Zipf's law: how frequent they are is learnt within a few
steps, so that a loss that does not fall shows.

Arrays: `input_ids` int64[T] and `labels` int64[T] (-100 where there is none; a label stands at its own token,
as transformers has it) of all samples in a row, `lengths` int64[S], `domains` int32[S].

What is not covered: text, and anything that a model could learn beyond how frequent tokens are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from versatune_ds.foundations.constants import IGNORE_INDEX

FIRST_TOKEN = 2
"""Smaller ids are the tokenizer's padding and end of text."""


def write_samples(path: Path, *, num_tokens: int, max_length: int, vocab_size: int, num_domains: int) -> None:
    """Write samples of at least `num_tokens` tokens together; the same file for the same arguments.

    Args:
        max_length: longest sample.
        vocab_size: token ids are below it.
        num_domains: sample i belongs to domain i modulo this.
    """
    rng = np.random.default_rng(0)
    count = num_tokens // 64 + 1
    body, tail = rng.lognormal(5.5, 0.8, count), rng.lognormal(7.5, 1.2, count)
    lengths = np.where(rng.random(count) < 1 / 7, tail, body).clip(8, max_length).astype(np.int64)
    enough = int(np.searchsorted(lengths.cumsum(), num_tokens)) + 1
    lengths = lengths[:enough]
    frequency = 1 / (np.arange(vocab_size - FIRST_TOKEN) + 10.0)
    cumulated = frequency.cumsum() / frequency.sum()
    tokens = FIRST_TOKEN + np.searchsorted(cumulated, rng.random(int(lengths.sum())))
    place = np.arange(len(tokens)) - np.repeat(lengths.cumsum() - lengths, lengths)
    labels = np.where(place >= np.repeat(lengths, lengths) // 2, tokens, IGNORE_INDEX)
    domains = (np.arange(len(lengths)) % num_domains).astype(np.int32)
    with path.open("wb") as file:
        np.savez(file, input_ids=tokens, labels=labels, lengths=lengths, domains=domains)


def read_rows(path: Path) -> tuple[dict[str, list[npt.NDArray[np.int64]]], npt.NDArray[np.int32]]:
    """`input_ids` and `labels` of such a file, int64[n] for each sample; and the domains, int32[S]."""
    with np.load(path, allow_pickle=False) as file:
        starts = file["lengths"].cumsum()[:-1]
        return {name: np.split(file[name], starts) for name in ("input_ids", "labels")}, file["domains"]


def samples_by_domain(path: Path, num_domains: int) -> list[StoredSamples]:
    """The samples of such a file, read once."""
    rows, domains = read_rows(path)
    return [StoredSamples(path.name, rows, domains, domain) for domain in range(num_domains)]


class StoredSamples:
    """One domain's samples of such a file, in the shape of a token cache; without weights.

    Args:
        name: of the file.
        rows, domains: from `read_rows`.
        domain: whose samples.
    """

    def __init__(
        self,
        name: str,
        rows: dict[str, list[npt.NDArray[np.int64]]],
        domains: npt.NDArray[np.int32],
        domain: int,
    ) -> None:
        mine = np.flatnonzero(domains == domain)
        self._tokens = [rows["input_ids"][i].astype(np.uint32) for i in mine]
        self._masks = [rows["labels"][i] != IGNORE_INDEX for i in mine]
        self.lengths = np.array([len(tokens) for tokens in self._tokens], np.int32)
        self.supervised = np.array([mask.sum() for mask in self._masks], np.int32)
        self.weight_sums = None
        self.fingerprint = f"{name} {domain} {len(self.lengths)} {int(self.lengths.sum())}"

    def sample(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Tokens uint32[n] and mask bool[n] of the tokens to be predicted."""
        return self._tokens[index], self._masks[index]

    def source_of(self, index: int) -> tuple[str, int]:
        """Where a sample comes from, for messages about losses that are not finite."""
        return "samples.npz", index + 1
