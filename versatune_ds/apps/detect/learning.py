"""What the embedded judge learns: one small model a kind of feature, and how much each is to be trusted.

    words      tf-idf of words (single characters of scripts without spaces), logistic regression
    base       hidden states of the examined model, standardised by layer; its known texts vote
    encoder    the same on an embedding model, where one is given

    vote       p_j(x) ~ sum over the known texts i of domain j of w_i exp(cos(x, x_i) / WARMTH)
    together   log p_j(x) = sum_c a_c log p_cj(x) + const        c: kind of features, j: domain

The vote is a density of each domain around its texts: a domain may be many things that have nothing else in
common, as `other` is, where a linear model draws one border around all of them. The a_c >= 0 are fitted
(ridge towards 1) on predictions for sources that the models had not seen: they say how far each kind carries
over. There is no bias by domain: left-out sources do not show which one another text needs. Domains weigh the
same, and so do, half-way, the sources of a domain; its topics together weigh `TOPICS` times as much as its
samples, since each is a source of its own.

What is not covered: where texts and vectors come from (`sources.py`, `embedding.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from versatune_ds.apps.detect.sources import LabelledTexts

Array = npt.NDArray[np.float64]

DOMAIN_WEIGHT = 250.0
"""Of the samples of a domain together: what the ridge of the words is meant for."""
TOPICS = 2.0
WARMTH = {"base": 0.08, "encoder": 0.05}
"""Of the vote: a text whose cosine is less by this has a voice of 1/e."""
LETTERS = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\d_]{3,}"
STACK_RIDGE = 0.01
STACK_STEPS, STACK_RATE = 2000, 0.3
TINY = 1e-9
NEIGHBOURS = 5
STRANGE = 0.99
"""Share of left-out texts that lie nearer to other sources than the limit."""


class Standard(NamedTuple):
    """How vectors are scaled: by layer, to mean 0 and variance 1 of the training texts, then to length 1."""

    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    @classmethod
    def of(cls, vectors: npt.NDArray[np.float32]) -> Standard:
        """From float32[n, layers, width]."""
        return cls(vectors.mean(0), np.maximum(vectors.std(0), 1e-6))

    def __call__(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """float32[n, layers * width]."""
        scaled = (vectors - self.mean) / self.scale
        scaled /= np.maximum(np.linalg.norm(scaled, axis=2, keepdims=True), 1e-6)
        flat: npt.NDArray[np.float32] = scaled.reshape(len(scaled), -1)
        return flat


def word_features() -> Any:
    """A vectoriser of words, to be fitted."""
    return TfidfVectorizer(sublinear_tf=True, stop_words="english", token_pattern=LETTERS)


def sample_weights(samples: LabelledTexts) -> Array:
    """float64[n]: `DOMAIN_WEIGHT` a domain, a source of m samples in proportion to sqrt(m)."""
    weights = np.zeros(len(samples.domains))
    for domain in np.unique(samples.domains):
        mine = samples.domains == domain
        _, places, sizes = np.unique(samples.sources[mine], return_inverse=True, return_counts=True)
        raw = 1.0 / np.sqrt(sizes[places])
        weights[mine] = DOMAIN_WEIGHT * raw / raw.sum()
    return weights


class Vote(NamedTuple):
    """See the module docstring."""

    known: npt.NDArray[np.float32]
    """[n, d], each of length 1."""
    voices: Array
    """float64[n, k]: w_i in the column of the text's domain."""
    classes_: npt.NDArray[np.int64]
    """Domains that have texts: int64[k]."""
    warmth: float

    def predict_proba(self, vectors: npt.NDArray[np.float32]) -> Array:
        """float64[m, k] of float32[m, d]."""
        near = (normalize(vectors) @ self.known.T).astype(np.float64)
        near -= near.max(axis=1, keepdims=True)
        heard: Array = np.exp(near / self.warmth) @ self.voices
        return heard / heard.sum(axis=1, keepdims=True)


def fit(kind: str, features: Any, samples: LabelledTexts, topics: Any, topic_domains: Any) -> Any:
    """A model of one kind of features.

    Args:
        features, topics: [n, d] and [m, d] of samples and topics.
        topic_domains: int[m].
    """
    counts = np.bincount(topic_domains, minlength=1)
    weights = np.concatenate([sample_weights(samples), TOPICS * DOMAIN_WEIGHT / counts[topic_domains]])
    domains = np.concatenate([samples.domains, topic_domains])
    if kind in WARMTH:
        classes = np.unique(domains)
        voices = (domains[:, None] == classes) * weights[:, None]
        return Vote(normalize(np.concatenate([features, topics])), voices, classes, WARMTH[kind])
    model = LogisticRegression(max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence: the accuracies tell what came of it
        model.fit(scipy.sparse.vstack([features, topics]), domains, sample_weight=weights)
    return model


def log_probabilities(model: Any, features: Any, num_domains: int) -> Array:
    """float64[n, k]; a domain that the model has not seen gets next to nothing."""
    found = np.full((features.shape[0], num_domains), TINY)
    found[:, model.classes_] = model.predict_proba(features)
    return np.log(np.maximum(found, TINY))


def left_out(
    kind: str, features: Any, samples: LabelledTexts, topics: Any, topic_domains: Any, num_domains: int
) -> Array:
    """float64[n, k]: log-probabilities of each sample from a model that has not seen its source.

    Source number s of every domain is left out together, so there are as many fits as sources.
    """
    found = np.zeros((len(samples.domains), num_domains))
    for source in np.unique(samples.sources):
        out = samples.sources == source
        model = fit(kind, features[~out], samples.take(~out), topics, topic_domains)
        found[out] = log_probabilities(model, features[out], num_domains)
    return found


def trust(logs: Array, domains: npt.NDArray[np.int64]) -> Array:
    """The a_c: float64[c], from log-probabilities float64[n, c, k] of left-out texts."""
    _, num_kinds, k = logs.shape
    truth = np.eye(k)[domains]
    weights = (1.0 / np.bincount(domains, minlength=k)[domains])[:, None] / len(np.unique(domains))
    found = np.ones(num_kinds)
    for _ in range(STACK_STEPS):
        error = (softmax(np.einsum("nck,c->nk", logs, found), axis=1) - truth) * weights
        gradient = np.einsum("nck,nk->c", logs, error) + STACK_RIDGE * (found - 1.0)
        found = np.maximum(found - STACK_RATE * gradient, 0.0)
    return found


def strangeness(
    vectors: npt.NDArray[np.float32],
    known: npt.NDArray[np.float32],
    hidden: npt.NDArray[np.bool_] | None = None,
) -> Array:
    """float64[n]: 1 - mean cosine similarity to the `NEIGHBOURS` nearest of the known texts.

    Args:
        hidden: bool[n, m]: known texts that do not count for a vector.
    """
    similar = normalize(vectors) @ normalize(known).T
    if hidden is not None:
        similar = np.where(hidden, -1.0, similar)
    nearest = np.sort(similar, axis=1)[:, -NEIGHBOURS:]
    return 1.0 - nearest.mean(axis=1, dtype=np.float64)


def table_by_source(probabilities: Array, samples: LabelledTexts) -> dict[int, list[Array]]:
    """Domain -> for each of its sources the mean probabilities float64[k] that its left-out texts got."""
    return {
        int(domain): [
            probabilities[(samples.domains == domain) & (samples.sources == source)].mean(axis=0)
            for source in np.unique(samples.sources[samples.domains == domain])
        ]
        for domain in np.unique(samples.domains)
    }


def accuracies(names: Sequence[str], table: npt.NDArray[np.int64]) -> Mapping[str, float]:
    """Share of right answers by domain, from a confusion table; domains without a text are left out."""
    return {
        name: float(row[i] / row.sum())
        for i, (name, row) in enumerate(zip(names, table, strict=True))
        if row.sum()
    }
