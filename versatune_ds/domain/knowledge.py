"""The knowledge distribution of a base model: mean domain probabilities of the texts that it writes.

VersaTune (arXiv 2411.11266), phase 1: p_j is the mean, over all generated texts, of the probability that a
judge gives to domain j. Texts without content and texts that the judge could not place take no part; both are
counted. Beside the mean stand

- a 95 % interval per domain: percentiles of the mean over bootstrap resamples of the texts,
- the mean of each round and how far rounds lie apart: the total variation distance, half the sum of absolute
  differences, of each round's mean from the mean of all (0: equal, 1: disjoint),
- counts: for how many texts a domain is the most probable one.

A judge that knows its own mistakes gives a table T: T_ij is the mean probability that it gives to domain j
for texts of domain i. Texts of shares s then get the mean q = T' s, and s is found on the simplex by maximum
likelihood,

    s_i <- s_i sum_j T_ij q_j / (T' s)_j

which is expectation maximisation (Vardi and Lee, J. R. Statist. Soc. B 55, 1993). The table is measured on
the sources of each domain, whose rows differ; the intervals then also resample the sources, and so include
the judge's error. Without a table they cover the choice of texts, not the judge's mistakes.

Format of knowledge.json (what is read back are `format`, `version` and `domains`):

    {"format": "versatune_ds.knowledge", "version": 1,
     "domains": {"law": 0.06, ...},           shares; sum 1
     "judged": {"law": 0.08, ...},            mean probability, before the correction; without a table absent
     "interval_95": {"law": [0.05, 0.07], ...},
     "most_probable": {"law": 571, ...},      texts
     "rounds": [{"texts": 2000, "domains": {...}}, ...],
     "agreement": {"mean_total_variation": 0.01, "max_difference": 0.02},
     "texts": {"generated": ..., "blank": ..., "unparsable": ..., "judged": ..., "cut_for_the_judge": ...},
     "model": {...}, "generation": {...}, "judge": {...}, "created_at": "...", "versions": {...}}

What is not covered: generating and judging texts (`versatune_ds.apps.detect`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.json_input import numbers, read_object, require_format

KNOWLEDGE_FORMAT = "versatune_ds.knowledge"
KNOWLEDGE_VERSION = 1
NUM_RESAMPLES = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap distribution that bound the 95 % interval."""
CORRECTION_STEPS = 1000
RESAMPLES_AT_A_TIME = 50
"""Bounds the memory of the bootstrap: this many counts for each text."""


def aggregate(
    table: DomainTable,
    probabilities: npt.NDArray[np.float64],
    rounds: npt.NDArray[np.int64],
    num_rounds: int,
    seed: int,
    sources: Sequence[npt.NDArray[np.float64]] | None = None,
) -> dict[str, Any]:
    """Mean, intervals, counts and rounds of judged texts: the measured part of a knowledge.json.

    Args:
        probabilities: float64[n, k], each row >= 0 with sum 1; n >= 1. Texts that were not judged are left
            out by the caller, never given as zeros.
        rounds: int64[n], the round (from 0) of each text.
        num_rounds: T; a round without a judged text has no mean.
        sources: of each domain float64[m, k]: mean probabilities that the judge gave to texts of its m
            sources, m >= 1; None: the judge's mistakes are not known.
    """
    n, k = probabilities.shape
    assert n > 0 and len(rounds) == n
    assert (probabilities >= 0).all() and np.allclose(probabilities.sum(axis=1), 1.0)
    mean = probabilities.mean(axis=0)
    mean /= mean.sum()
    shares, resampled = mean, bootstrap_means(probabilities, seed)
    if sources is not None:
        shares = corrected(mean, np.stack([rows.mean(axis=0) for rows in sources]))
        resampled = corrected(resampled, bootstrap_tables(sources, seed))
    bounds = np.percentile(resampled, INTERVAL, axis=0).T  # [k, 2]
    counts = np.bincount(probabilities.argmax(axis=1), minlength=k)
    texts = np.bincount(rounds, minlength=num_rounds)
    means = [probabilities[rounds == t].mean(axis=0) if texts[t] else None for t in range(num_rounds)]
    apart = np.abs(np.array([each for each in means if each is not None]) - mean)
    return {
        "format": KNOWLEDGE_FORMAT,
        "version": KNOWLEDGE_VERSION,
        "domains": table.by_name(shares),
        **({} if sources is None else {"judged": table.by_name(mean)}),
        "interval_95": dict(zip(table.names, bounds.tolist(), strict=True)),
        "most_probable": dict(zip(table.names, counts.tolist(), strict=True)),
        "rounds": [
            {"texts": int(count), "domains": None if each is None else table.by_name(each)}
            for count, each in zip(texts, means, strict=True)
        ],
        "agreement": {
            "mean_total_variation": float(apart.sum(axis=1).mean() / 2),
            "max_difference": float(apart.max()),
        },
    }


def bootstrap_means(probabilities: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    """Means of resamples of the rows with replacement: float64[NUM_RESAMPLES, k]."""
    n = len(probabilities)
    generator = np.random.default_rng(seed)
    shares = np.full(n, 1.0 / n)
    parts = [
        generator.multinomial(n, shares, size=RESAMPLES_AT_A_TIME) @ probabilities / n
        for _ in range(NUM_RESAMPLES // RESAMPLES_AT_A_TIME)
    ]
    return np.concatenate(parts)


def bootstrap_tables(sources: Sequence[npt.NDArray[np.float64]], seed: int) -> npt.NDArray[np.float64]:
    """Tables of resampled sources, those of each domain with replacement: float64[NUM_RESAMPLES, k, k]."""
    generator = np.random.default_rng([seed, 1])
    drawn = [
        generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=NUM_RESAMPLES)
        @ rows
        / len(rows)
        for rows in sources
    ]
    return np.stack(drawn, axis=1)


def corrected(means: npt.NDArray[np.float64], table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Shares whose texts would be judged as `means`; see the module docstring.

    Args:
        means: float64[..., k], each on the simplex.
        table: float64[..., k, k], rows on the simplex: true domain, then what it is judged to be.

    Returns:
        float64[..., k] on the simplex.
    """
    k = means.shape[-1]
    shares = (means + 1.0 / k) / 2  # none of them 0: a product would stay there
    for _ in range(CORRECTION_STEPS):
        expected = np.einsum("...i,...ij->...j", shares, table)
        ratio = np.divide(means, expected, out=np.zeros_like(expected), where=expected > 0)
        shares = shares * np.einsum("...ij,...j->...i", table, ratio)
        shares /= shares.sum(axis=-1, keepdims=True)
    return shares


def read_knowledge(path: Path, setting: str) -> dict[str, Any]:
    """A knowledge.json; `domains` is there and holds finite numbers by name, everything else may be missing.

    Files without `format` (shares written by hand) are accepted.

    Raises:
        DataError: the file is missing, not JSON, or of another format.
    """
    raw = read_object(path, setting)
    if "domains" not in raw:
        raise DataError(
            "no key 'domains'; a knowledge file holds {\"domains\": {name: probability}} "
            "(versatune-ds detect writes one)",
            path=path,
        )
    said = {"format": KNOWLEDGE_FORMAT, "version": KNOWLEDGE_VERSION, **raw}
    require_format(said, KNOWLEDGE_FORMAT, KNOWLEDGE_VERSION, path, "versatune-ds detect writes one")
    return {**raw, "domains": numbers(raw["domains"], "domains", path)}
