"""Pre-tokenised samples in a Parquet file, which every trainer of a comparison reads.

Lengths are log-normal with a long tail (median about 250 tokens, one sample in seven from the tail), the
second half of a sample has labels, and tokens follow Zipf's law: how frequent they are is learnt within a few
steps, so that a loss that does not fall shows.

Columns: `input_ids` list<int64>, `labels` list<int64> (-100 where there is none; a label stands at its own
token, as transformers has it), `domain` int32.

What is not covered: text, and anything that a model could learn beyond how frequent tokens are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

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
    ends = lengths.cumsum()
    place = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    labels = np.where(place >= np.repeat(lengths, lengths) // 2, tokens, IGNORE_INDEX)
    offsets = pa.array(np.append(0, ends), pa.int32())
    table = pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens, pa.int64())),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(labels, pa.int64())),
            "domain": pa.array(np.arange(len(lengths)) % num_domains, pa.int32()),
        }
    )
    pq.write_table(table, path)


class ParquetSamples:
    """One domain's rows of such a file, in the shape of a token cache."""

    def __init__(self, path: Path, domain: int) -> None:
        table = pq.read_table(path, filters=[("domain", "=", domain)]).combine_chunks()
        tokens = table["input_ids"].combine_chunks()
        self._tokens = tokens.flatten().to_numpy()
        self._is_label = table["labels"].combine_chunks().flatten().to_numpy() != IGNORE_INDEX
        self._ends = np.asarray(tokens.value_lengths()).astype(np.int64).cumsum()
        starts = np.append(0, self._ends[:-1])
        self.lengths = (self._ends - starts).astype(np.int32)
        self.supervised = np.add.reduceat(self._is_label.astype(np.int32), starts).astype(np.int32)
        self.fingerprint = f"{path.name} {domain} {len(self.lengths)} {int(self._ends[-1])}"

    def sample(self, index: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
        """Tokens uint32[n] and mask bool[n] of the tokens to be predicted."""
        rows = slice(int(self._ends[index] - self.lengths[index]), int(self._ends[index]))
        return self._tokens[rows].astype(np.uint32), self._is_label[rows]

    def source_of(self, index: int) -> tuple[str, int]:
        """Where a sample comes from, for messages about losses that are not finite."""
        return "samples.parquet", index + 1
