"""The embedded judge: small models on words and hidden states, trained on the user's own prepared domains.

It is measured twice: in-source, on held-out data (or a fifth of the training data), and with whole sources
left out, on samples of files or groups of samples that it has not seen (`sources.py`). A generated text is
of no source, so the second number is the one to look at; where the two part, a warning says so. From the
left- out texts come also the trust in each kind of feature (`learning.py`), the table that corrects the
mixture for the judge's own mistakes (`domain/knowledge.py`), and the limit beyond which a text is unlike
all that it has learned from: such a text is judged "unknown" and feeds no domain.

A long text is judged by windows, whose mean counts.

What is not covered: what no source of the training data is like. Groups of one corpus are more alike than
two corpora are: expect less on foreign texts than on left-out ones (docs/detect.md has a measurement).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split

from versatune_ds.apps.detect import learning
from versatune_ds.apps.detect.embedding import Embedder
from versatune_ds.apps.detect.judge import UNKNOWN, Judgement
from versatune_ds.apps.detect.sources import LabelledTexts, read_samples, windows
from versatune_ds.apps.detect.topics import topics_of
from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.files import canonical_hash
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.text import in_columns

log = get_logger(__name__)

MAX_TRAINING_SAMPLES = 2000
"""Per domain, drawn at random, without a model; with one `probe_texts`."""
MAX_HELD_OUT_SAMPLES = 100
HELD_OUT_SHARE = 0.2
MIN_SAMPLES = 10
"""Per domain: below this there is nothing to learn from."""
WEAK_ACCURACY = 0.7
WIDE_GAP = 0.1
VERSION = 3
"""Raised when features or classifier change: judgements of different versions are not mixed."""

Table = npt.NDArray[np.int64]


class ClassifierJudge:
    """See the module docstring.

    Args:
        train, held_out: caches of each domain; None where there is no data.
        embedders: models whose vectors it uses; none: words only.
        texts: samples of a domain to learn from.
        topics: of domains by name, in place of the known ones.
        folder: for the vectors of the training texts, so that they are made once.
    """

    texts_at_once = 64
    on_every_rank = False

    def __init__(
        self,
        names: Sequence[str],
        train: Sequence[TokenCache | None],
        held_out: Sequence[TokenCache | None],
        tokenizer: Any,
        seed: int,
        max_chars: int,
        *,
        embedders: Sequence[Embedder] = (),
        texts: int = MAX_TRAINING_SAMPLES,
        topics: Mapping[str, Sequence[str]] | None = None,
        folder: Path | None = None,
    ) -> None:
        require_data(names, train)
        self.names = tuple(names)
        self.train, self.held_out = train, held_out
        self.tokenizer, self.seed, self.max_chars = tokenizer, seed, max_chars
        self.embedders, self.most, self.folder = list(embedders), texts, folder
        listed = topics_of(names, topics or {})
        self.topics = [topic for each in listed for topic in each]
        self.topic_domains = np.repeat(np.arange(len(names)), [len(each) for each in listed])
        self.held_out_from = "held-out data"
        self.num_training_samples = 0
        k = len(names)
        self.confusion: Table = np.zeros((k, k), dtype=np.int64)
        """int64[k, k]: held-out samples by (true domain, most probable domain)."""
        self.left_out: Table = np.zeros((k, k), dtype=np.int64)
        """The same with their sources left out."""
        self.by_source: dict[int, list[learning.Array]] = {}
        self.kinds: dict[str, Table] = {}
        """Kind of features -> what it alone says of left-out texts."""
        self.trust: learning.Array = np.ones(0)
        self.limit: float | None = None
        """Strangeness of texts that are unknown beyond it; None without an embedder."""
        self._models: dict[str, Any] = {}
        self._words: Any = None
        self._scales: dict[str, learning.Standard] = {}
        self._known: Any = None

    def open(self) -> None:
        """Train and measure; logs accuracies and confusion tables."""
        samples, test = self._read()
        self.num_training_samples = len(samples.texts)
        features = self._learn_features([*samples.texts, *self.topics])
        n, k = len(samples.texts), len(self.names)
        given = {
            kind: (values[:n], samples, values[n:], self.topic_domains) for kind, values in features.items()
        }
        unseen = {kind: learning.left_out(kind, *args, k) for kind, args in given.items()}
        logs = np.stack(list(unseen.values()), axis=1)
        self.trust = learning.trust(logs, samples.domains)
        self._models = {kind: learning.fit(kind, *args) for kind, args in given.items()}
        told = softmax(np.einsum("nck,c->nk", logs, self.trust), axis=1)
        self.left_out = self._table(samples.domains, told)
        self.kinds = {kind: self._table(samples.domains, values) for kind, values in unseen.items()}
        self.by_source = learning.table_by_source(told, samples)
        if self.embedders:
            self._known = features[self.embedders[0].kind][:n]
            same = (samples.domains[:, None] == samples.domains) & (
                samples.sources[:, None] == samples.sources
            )
            strange = learning.strangeness(self._known, self._known, same)
            self.limit = float(np.quantile(strange, learning.STRANGE))
        self.confusion = self._table(test.domains, self._probabilities(test.texts)[0])
        self._introduce()

    def _read(self) -> tuple[LabelledTexts, LabelledTexts]:
        """(training, held out)."""
        generator = np.random.default_rng(self.seed)
        samples = read_samples(self.train, self.tokenizer, self.most, self.max_chars, generator)
        if all(cache is not None for cache in self.held_out):
            most = MAX_HELD_OUT_SAMPLES
            return samples, read_samples(self.held_out, self.tokenizer, most, self.max_chars, generator)
        self.held_out_from = f"{HELD_OUT_SHARE:.0%} of the training data"
        kept, out = train_test_split(
            np.arange(len(samples.texts)),
            test_size=HELD_OUT_SHARE,
            stratify=samples.domains,
            random_state=self.seed,
        )
        return samples.take(kept), samples.take(out)

    def _learn_features(self, texts: list[str]) -> dict[str, Any]:
        """Kind -> features [n, d] of the texts to learn from."""
        self._words = learning.word_features()
        features = {"words": self._words.fit_transform(texts)}
        for embedder in self.embedders:
            vectors = embedder.embed_once(texts, self.folder)
            self._scales[embedder.kind] = learning.Standard.of(vectors)
            features[embedder.kind] = self._scales[embedder.kind](vectors)
        return features

    def _probabilities(self, texts: Sequence[str]) -> tuple[learning.Array, learning.Array | None]:
        """(float64[n, k], strangeness float64[n] where it is known) of single windows."""
        features = {"words": self._words.transform(texts)}
        for embedder in self.embedders:
            features[embedder.kind] = self._scales[embedder.kind](embedder.embed(texts))
        k = len(self.names)
        logs = [
            learning.log_probabilities(self._models[kind], values, k) for kind, values in features.items()
        ]
        found = softmax(np.einsum("cnk,c->nk", np.stack(logs), self.trust), axis=1)
        if not self.embedders:
            return found, None
        return found, learning.strangeness(features[self.embedders[0].kind], self._known)

    def _table(self, domains: npt.NDArray[np.int64], told: learning.Array) -> Table:
        table: Table = confusion_matrix(domains, told.argmax(axis=1), labels=range(len(self.names)))
        return table

    @property
    def accuracy(self) -> float:
        """In-source accuracy, the mean over domains (each counts the same)."""
        return mean_accuracy(self.confusion)

    def identity(self) -> dict[str, Any]:
        sources = [None if c is None else c.fingerprint for c in (*self.train, *self.held_out)]
        return {
            "kind": "classifier",
            "version": VERSION,
            "data": canonical_hash(sources),
            "seed": self.seed,
            "texts": self.most,
            "models": {embedder.kind: embedder.fingerprint for embedder in self.embedders},
            "topics": canonical_hash([self.topics, self.topic_domains.tolist()]),
        }

    def facts(self) -> dict[str, Any]:
        return {
            "training_samples": self.num_training_samples,
            "held_out_from": self.held_out_from,
            "held_out_samples": int(self.confusion.sum()),
            "held_out_accuracy": self.accuracy,
            "confusion": self._by_name(self.confusion),
            "left_out_accuracy": mean_accuracy(self.left_out),
            "left_out_by_domain": dict(learning.accuracies(self.names, self.left_out)),
            "left_out_confusion": self._by_name(self.left_out),
            "left_out_by_features": {kind: mean_accuracy(table) for kind, table in self.kinds.items()},
            "left_out_sources": {
                self.names[domain]: [row.tolist() for row in rows] for domain, rows in self.by_source.items()
            },
            "trust": dict(zip(self.kinds, self.trust.tolist(), strict=True)),
            "unknown_beyond": self.limit,
        }

    def _by_name(self, table: Table) -> dict[str, dict[str, int]]:
        return {
            true: dict(zip(self.names, map(int, row), strict=True))
            for true, row in zip(self.names, table, strict=True)
        }

    def _introduce(self) -> None:
        unseen = mean_accuracy(self.left_out)
        log.info(
            "classifier: trained on %d samples; accuracy %.1f %% on %d of %s, %.1f %% with whole sources "
            "left out (%s)",
            self.num_training_samples,
            100 * self.accuracy,
            self.confusion.sum(),
            self.held_out_from,
            100 * unseen,
            ", ".join(f"{kind} alone {100 * mean_accuracy(table):.1f}" for kind, table in self.kinds.items()),
        )
        log.info("with sources left out:\n%s", confusion_table(self.names, self.left_out))
        if self.accuracy - unseen > WIDE_GAP:
            log.warning(
                "the classifier is right in %.0f %% of held-out samples and in %.0f %% of samples whose "
                "source it has not seen: it knows your corpora better than their domains, and generated "
                "texts are of no source. Give each domain data of several sources, or use kind endpoint",
                100 * self.accuracy,
                100 * unseen,
            )
        if unseen < WEAK_ACCURACY:
            log.warning(
                "the classifier tells domains of unseen sources with an accuracy of %.0f %% only: the "
                "knowledge distribution will be as vague; give it more data, or use judge.kind endpoint or "
                "model",
                100 * unseen,
            )

    def judge(self, texts: Sequence[tuple[int, str]]) -> Iterator[Judgement]:
        """See `DomainJudge`; the mean over a text's windows."""
        pieces = [(number, piece) for number, (_, text) in enumerate(texts) for piece in windows(text)]
        owners = np.array([number for number, _ in pieces])
        found, strange = self._probabilities([piece for _, piece in pieces])
        for number, (index, _) in enumerate(texts):
            mine = owners == number
            if strange is not None and self.limit is not None and strange[mine].mean() > self.limit:
                yield Judgement(index, None, UNKNOWN)
            else:
                row = found[mine].mean(axis=0)
                yield Judgement(index, row / row.sum())

    def close(self) -> None:
        """Free the models."""
        for embedder in self.embedders:
            embedder.close()


def require_data(names: Sequence[str], caches: Sequence[TokenCache | None]) -> None:
    """Raise DataError unless every domain has samples to learn from."""
    counts = {name: 0 if c is None else len(c) for name, c in zip(names, caches, strict=True)}
    lacking = [f"{name} ({count})" for name, count in counts.items() if count < MIN_SAMPLES]
    if lacking:
        raise DataError(
            f"the classifier needs at least {MIN_SAMPLES} training samples of every domain; too few in "
            f"{', '.join(lacking)}. Add data to data.train, or use detect.judge.kind endpoint or "
            "model, which need none"
        )
    if len(names) < 2:
        raise DataError("the classifier tells domains apart, and domains.names has one only")


def mean_accuracy(table: Table) -> float:
    """Mean over the domains that have texts of the share of right answers."""
    texts = table.sum(axis=1)
    return float((np.diag(table)[texts > 0] / texts[texts > 0]).mean())


def confusion_table(names: Sequence[str], table: Table) -> str:
    """The table as text: a row per true domain, a column per answer."""
    rows = [[name, *map(str, row)] for name, row in zip(names, table, strict=True)]
    return "\n".join(in_columns([["true \\ judged", *names], *rows]))
