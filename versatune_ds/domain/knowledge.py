"""The knowledge distribution of a base model: mean domain probabilities of the texts that it writes.

VersaTune (arXiv 2411.11266), phase 1: p_j is the mean, over all generated texts, of the probability that a
judge gives to domain j. Texts without content and texts that the judge could not place take no part; both are
counted. Beside the mean stand

- a 95 % interval per domain: percentiles of the mean over bootstrap resamples of the texts,
- the mean of each round and how far rounds lie apart: the total variation distance, half the sum of absolute
  differences, of each round's mean from the mean of all (0: equal, 1: disjoint),
- counts: for how many texts a domain is the most probable one.

The interval covers the choice of texts, not the judge's mistakes.

Format of knowledge.json (what is read back are `format`, `version` and `domains`):

    {"format": "versatune_ds.knowledge", "version": 1,
     "domains": {"law": 0.06, ...},           mean probability; sum 1
     "interval_95": {"law": [0.05, 0.07], ...},
     "most_probable": {"law": 571, ...},      texts
     "rounds": [{"texts": 2000, "domains": {...}}, ...],
     "agreement": {"mean_total_variation": 0.01, "max_difference": 0.02},
     "texts": {"generated": ..., "blank": ..., "unparsable": ..., "judged": ..., "cut_for_the_judge": ...},
     "model": {...}, "generation": {...}, "judge": {...}, "created_at": "...", "versions": {...}}

What is not covered: generating and judging texts (`versatune_ds.apps.detect`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.domain.json_input import numbers, read_object, require_format
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import DataError
from versatune_ds.strategies.simplex import Vector

KNOWLEDGE_FORMAT = "versatune_ds.knowledge"
KNOWLEDGE_VERSION = 1
NUM_RESAMPLES = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap distribution that bound the 95 % interval."""
RESAMPLES_AT_A_TIME = 50
"""Bounds the memory of the bootstrap: this many counts for each text."""


@dataclass(frozen=True, eq=False)
class Knowledge:
    """An aggregated knowledge distribution; vectors are in table order."""

    mean: Vector
    """float64[k], sum 1."""
    low: Vector
    """float64[k], lower end of the 95 % interval."""
    high: Vector
    """float64[k], its upper end."""
    most_probable: npt.NDArray[np.int64]
    """int64[k], texts with this domain as their most probable one."""
    round_means: npt.NDArray[np.float64]
    """float64[T, k]; a row of NaN for a round without a judged text."""
    round_texts: npt.NDArray[np.int64]
    """int64[T], judged texts of each round."""

    def to_json(self, table: DomainTable) -> dict[str, Any]:
        """The measured part of a knowledge.json; its writer adds where it comes from."""
        judged = self.round_texts > 0
        apart = np.abs(self.round_means[judged] - self.mean)
        return {
            "format": KNOWLEDGE_FORMAT,
            "version": KNOWLEDGE_VERSION,
            "domains": table.by_name(self.mean),
            "interval_95": {
                name: [float(low), float(high)]
                for name, low, high in zip(table.names, self.low, self.high, strict=True)
            },
            "most_probable": {
                name: int(count) for name, count in zip(table.names, self.most_probable, strict=True)
            },
            "rounds": [
                {"texts": int(texts), "domains": table.by_name(mean) if texts else None}
                for texts, mean in zip(self.round_texts, self.round_means, strict=True)
            ],
            "agreement": {
                "mean_total_variation": float(apart.sum(axis=1).mean() / 2),
                "max_difference": float(apart.max()),
            },
        }


def aggregate(
    probabilities: npt.NDArray[np.float64], rounds: npt.NDArray[np.int64], num_rounds: int, seed: int
) -> Knowledge:
    """Mean, intervals, counts and rounds of judged texts.

    Args:
        probabilities: float64[n, k], each row >= 0 with sum 1; n >= 1. Texts that were not judged are left
            out by the caller, never given as zeros.
        rounds: int64[n], the round (from 0) of each text.
        num_rounds: T.
        seed: of the bootstrap.
    """
    n, k = probabilities.shape
    assert n > 0 and len(rounds) == n
    assert (probabilities >= 0).all() and np.allclose(probabilities.sum(axis=1), 1.0)
    mean = probabilities.mean(axis=0)
    means = bootstrap_means(probabilities, seed)
    low, high = np.percentile(means, INTERVAL, axis=0)
    round_texts = np.bincount(rounds, minlength=num_rounds)
    round_means = np.full((num_rounds, k), np.nan)
    for t in np.flatnonzero(round_texts):
        round_means[t] = probabilities[rounds == t].mean(axis=0)
    return Knowledge(
        mean=mean / mean.sum(),
        low=low,
        high=high,
        most_probable=np.bincount(probabilities.argmax(axis=1), minlength=k),
        round_means=round_means,
        round_texts=round_texts,
    )


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
