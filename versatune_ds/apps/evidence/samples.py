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

from versatune_ds.apps.bench.samples import MemorySamples, long_tailed_lengths
from versatune_ds.foundations.constants import IGNORE_INDEX

FIRST_TOKEN = 2
"""Smaller ids are the tokenizer's padding and end of text."""


def write_samples(path: Path, *, num_tokens: int, max_length: int, vocab_size: int, num_domains: int) -> None:
    """Write samples of at least `num_tokens` tokens together; the same file for the same arguments.

    Args:
        vocab_size: token ids are below it.
        num_domains: sample i belongs to domain i modulo this.
    """
    rng = np.random.default_rng(0)
    count = num_tokens // 64 + 1
    lengths = long_tailed_lengths(rng, 5.5, count, max_length).astype(np.int64)
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


def samples_by_domain(path: Path, num_domains: int) -> list[MemorySamples]:
    """The samples of such a file by domain, in the shape of token caches."""
    rows, domains = read_rows(path)
    tokens = [ids.astype(np.uint32) for ids in rows["input_ids"]]
    masks = [labels != IGNORE_INDEX for labels in rows["labels"]]
    members = [np.flatnonzero(domains == domain) for domain in range(num_domains)]
    return [
        MemorySamples(f"{path.name} {domain}", [tokens[i] for i in mine], [masks[i] for i in mine])
        for domain, mine in enumerate(members)
    ]
