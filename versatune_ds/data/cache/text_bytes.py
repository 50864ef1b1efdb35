"""How many bytes of text a supervised token stands for: what makes losses of two tokenizers comparable.

Bytes per token of a domain = UTF-8 bytes of its supervised text / its supervised tokens, sums divided once.
Special tokens (the stop token of a turn) have no bytes: both models must learn to stop, and how the stop is
written is not text. The bytes of a supervised stretch are those of the text up to its end less those of the
text up to its beginning, so that a tokenizer that writes a space with the following word counts right.

What is not covered: what is done with the ratio (`domain/reference.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.foundations.errors import DataError

MAX_SAMPLES = 2000
"""Samples looked at in a domain, evenly spread over its cache: decoding 10^8 samples would take hours."""


def bytes_per_token(
    caches: Sequence[TokenCache | None], names: Sequence[str], tokenizer: Any, max_samples: int = MAX_SAMPLES
) -> npt.NDArray[np.float64]:
    """float64[k]: UTF-8 bytes of supervised text per supervised token of each domain.

    Args:
        caches: one per domain; None is an error.
        max_samples: samples to look at in each domain.

    Raises:
        DataError: a domain has no data, or no supervised text.
    """
    ratios = []
    for cache, name in zip(caches, names, strict=True):
        if cache is None:
            raise DataError(f"domain {name} has no prepared data to count bytes per token on; add a source")
        size = len(cache)
        chosen = np.unique(np.linspace(0, size - 1, min(size, max_samples)).astype(int))
        counts = [count_bytes(*cache.sample(int(i)), tokenizer) for i in chosen]
        num_bytes, num_tokens = (sum(column) for column in zip(*counts, strict=True))
        if num_bytes == 0:
            raise DataError(f"domain {name} has no supervised text in {cache.folder}; check its answers")
        ratios.append(num_bytes / num_tokens)
    return np.array(ratios)


def count_bytes(tokens: Any, mask: Any, tokenizer: Any) -> tuple[int, int]:
    """(UTF-8 bytes of supervised text, supervised tokens) of a sample.

    Args:
        tokens: int[n].
        mask: bool[n]; the first token has no predecessor and is never supervised.
    """
    supervised = np.array(mask, dtype=bool)
    supervised[:1] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], supervised, [False]]).astype(np.int8)))
    ids = [int(token) for token in tokens]

    def size(end: int) -> int:
        text = tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8"))

    sizes = [size(int(edge)) for edge in edges]
    return sum(sizes[1::2]) - sum(sizes[::2]), int(supervised.sum())
