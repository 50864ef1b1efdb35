"""Texts for the embedded judge: samples as plain text, without the wording of instructions, by source.

A corpus is written in templates ("Answer the question ... Options: (A)"), and what tells its domains apart
best is their templates, which no other text has. Two things are done about it:

    wording    every run of `RUN` words that stands in more than `COMMON` of a domain's samples is cut out
    sources    samples are put into groups that a judge can be tested on without having seen them: the files
               of a domain, or where there is one file (or a great many) groups of similar samples (k-means on
               their words), so that those of one template or one collection lie together

Judging reads windows of a text: at most `WINDOW` characters, since generated texts begin anywhere too.

What is not covered: learning (`classifier.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from versatune_ds.data.cache.cache import TokenCache

RUN = 5
COMMON = 0.01
MIN_COMMON = 3
"""Samples that a run must stand in, however few there are."""
MIN_CHARS = 20
"""Of a sample without its wording; of shorter ones the whole text is kept."""
WINDOW = 600
MAX_WINDOWS = 4
SOURCES = 5
"""Groups of a domain that has one file."""
MAX_FILES = 10
"""More files of a domain are taken for parts of a whole, and divided by similarity."""
MIN_SOURCE = 5
"""Samples of a group, on average."""
DIMENSIONS = 20
WORD = re.compile(r"\w+|[^\w\s]")


class LabelledTexts(NamedTuple):
    """Texts with their domain ids and their sources."""

    texts: list[str]
    domains: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    """Number of the source within the domain, from 0."""

    def take(self, chosen: npt.NDArray[Any]) -> LabelledTexts:
        """Those at these places."""
        places = np.arange(len(self.texts))[chosen]
        return LabelledTexts([self.texts[i] for i in places], self.domains[chosen], self.sources[chosen])


def read_samples(
    caches: Sequence[TokenCache | None],
    tokenizer: Any,
    most: int,
    max_chars: int,
    generator: np.random.Generator,
) -> LabelledTexts:
    """A window of at most `most` samples of each domain, chosen at random, without wording, by source."""
    parts = []
    for domain, cache in enumerate(caches):
        assert cache is not None
        chosen = np.sort(generator.permutation(len(cache))[:most])
        ids = [cache.sample(int(i))[0].tolist() for i in chosen]
        whole = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts = [random_window(text, generator) for text in without_wording([t[:max_chars] for t in whole])]
        files = [cache.source_of(int(i))[0] for i in chosen]
        parts.append(LabelledTexts(texts, np.full(len(texts), domain), group(texts, files)))
    return LabelledTexts(
        [text for part in parts for text in part.texts],
        np.concatenate([part.domains for part in parts]),
        np.concatenate([part.sources for part in parts]),
    )


def without_wording(texts: Sequence[str]) -> list[str]:
    """Texts without the runs of `RUN` words (or signs) that many of them share, whatever their case."""
    spans = [list(WORD.finditer(text)) for text in texts]
    words = [[span.group().lower() for span in found] for found in spans]
    runs = [[tuple(w[i : i + RUN]) for i in range(len(w) - RUN + 1)] for w in words]
    counts = Counter(run for found in runs for run in set(found))
    common = max(MIN_COMMON, COMMON * len(texts))
    return [
        _cut(text, found, [counts[run] >= common for run in mine])
        for text, found, mine in zip(texts, spans, runs, strict=True)
    ]


def _cut(text: str, spans: Sequence[re.Match[str]], is_common: Sequence[bool]) -> str:
    drop = np.zeros(len(spans), dtype=np.bool_)
    for i in np.flatnonzero(is_common):
        drop[i : i + RUN] = True
    pieces, start = [], 0
    for span, gone in zip(spans, drop, strict=True):
        if gone:
            pieces.append(text[start : span.start()])
            start = span.end()
    kept = re.sub(r"[ \t]+", " ", "".join([*pieces, text[start:]])).strip()
    return kept if len(kept) >= MIN_CHARS else text


def random_window(text: str, generator: np.random.Generator) -> str:
    """At most `WINDOW` characters from a random place, whole words."""
    if len(text) <= WINDOW:
        return text
    start = int(generator.integers(len(text) - WINDOW + 1))
    return text[text.find(" ", start - 1) + 1 if start else 0 :][:WINDOW]


def windows(text: str) -> list[str]:
    """At most `MAX_WINDOWS` windows that cover a text, or evenly spaced ones of a long text; at least one."""
    count = min(MAX_WINDOWS, -(-len(text) // WINDOW))
    starts = np.linspace(0, max(0, len(text) - WINDOW), max(1, count)).astype(int)
    return [text[start : start + WINDOW] for start in starts]


def group(texts: Sequence[str], files: Sequence[str]) -> npt.NDArray[np.int64]:
    """Source of each text, numbered by size from 0: its file, or what it is like where there is one file."""
    _, of_file, sizes = np.unique(files, return_inverse=True, return_counts=True)
    is_file = 1 < len(sizes) <= MAX_FILES
    labels = of_file if is_file else _similar(texts, SOURCES)
    _, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    numbers: npt.NDArray[np.int64] = np.argsort(order, kind="stable")[places]
    return numbers


def _similar(texts: Sequence[str], parts: int) -> npt.NDArray[np.int64]:
    parts = min(parts, len(texts) // MIN_SOURCE)
    if parts < 2:
        return np.zeros(len(texts), dtype=np.int64)
    counts = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|[^\w\s]").fit_transform(texts)
    size = min(DIMENSIONS, *(n - 1 for n in counts.shape))
    if size < 1:
        return np.zeros(len(texts), dtype=np.int64)
    points = normalize(TruncatedSVD(size, random_state=0).fit_transform(counts))
    found: npt.NDArray[np.int64] = KMeans(parts, n_init=3, random_state=0).fit_predict(points)
    return found.astype(np.int64)
