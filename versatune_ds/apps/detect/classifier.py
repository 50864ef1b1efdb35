"""The embedded judge: a linear text classifier, trained on the user's own prepared domains.

    features      word 1- and 2-grams and character 2- to 5-grams, hashed (no vocabulary to keep), tf-idf
    classifier    linear SVM, one against the rest
    calibration   a sigmoid per domain, fitted on folds that the SVM has not seen, then scaled to sum 1

Domains weigh the same in training, however much data they have, so that the corpus' own mixture does not
become the judge's expectation. Its accuracy and confusion table are measured on the run's held-out data, or
on a fifth of the training data where a domain has no held-out data.

What is not covered: texts unlike anything in the training data. The classifier knows no "none of these": such
a text gets the probabilities that its words suggest. Give odd texts a domain (`other`) with data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.calibration import CalibratedClassifierCV
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline, make_union
from sklearn.svm import LinearSVC

from versatune_ds.apps.detect.judge import Judgement
from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.foundations.errors import DataError
from versatune_ds.foundations.files import canonical_hash
from versatune_ds.foundations.log import get_logger
from versatune_ds.foundations.text import in_columns

log = get_logger(__name__)

NUM_FEATURES = 1 << 18
"""Buckets of each of the two hashes."""
MAX_TRAINING_SAMPLES = 5000
"""Per domain, drawn at random: beyond this a linear classifier gains little and takes minutes."""
MAX_HELD_OUT_SAMPLES = 1000
HELD_OUT_SHARE = 0.2
FOLDS = 5
MIN_SAMPLES = 10
"""Per domain: below this there is nothing to calibrate on."""
WEAK_ACCURACY = 0.7
VERSION = 1
"""Raised when features or classifier change: judgements of different versions are not mixed."""


class LabelledTexts(NamedTuple):
    """Texts with their domain ids."""

    texts: list[str]
    domains: npt.NDArray[np.int64]


class ClassifierJudge:
    """See the module docstring.

    Args:
        names: domain names, in table order.
        train, held_out: caches of each domain; None where there is no data.
        tokenizer: that made the caches.
        seed: of the choice of samples and folds.
        max_chars: characters of a sample to learn from.

    Raises:
        DataError: a domain has no data, or too little.
    """

    texts_at_once = 256
    on_every_rank = False

    def __init__(
        self,
        names: Sequence[str],
        train: Sequence[TokenCache | None],
        held_out: Sequence[TokenCache | None],
        tokenizer: Any,
        seed: int,
        max_chars: int,
    ) -> None:
        require_data(names, train)
        self.names = tuple(names)
        self.train, self.held_out = train, held_out
        self.tokenizer = tokenizer
        self.seed = seed
        self.max_chars = max_chars
        self.held_out_from = "held-out data"
        self.num_training_samples = 0
        self.confusion = np.zeros((len(names), len(names)), dtype=np.int64)
        """int64[k, k]: held-out samples by (true domain, most probable domain)."""
        self.model: Any = None

    def open(self) -> None:
        """Train and measure; logs accuracy and confusion table."""
        generator = np.random.default_rng(self.seed)
        samples = decode_samples(self.train, self.tokenizer, MAX_TRAINING_SAMPLES, self.max_chars, generator)
        if all(cache is not None for cache in self.held_out):
            test = decode_samples(
                self.held_out, self.tokenizer, MAX_HELD_OUT_SAMPLES, self.max_chars, generator
            )
        else:
            self.held_out_from = f"{HELD_OUT_SHARE:.0%} of the training data"
            samples, test = split(samples, self.seed)
        self.num_training_samples = len(samples.texts)
        self.model = fit(samples, self.seed)
        judged = self.model.predict_proba(test.texts).argmax(axis=1)
        self.confusion = confusion_matrix(test.domains, judged, labels=range(len(self.names)))
        self._introduce()

    @property
    def accuracy(self) -> float:
        """Held-out accuracy, the mean over domains (each counts the same)."""
        return float((np.diag(self.confusion) / self.confusion.sum(axis=1)).mean())

    def identity(self) -> dict[str, Any]:
        """See `DomainJudge`."""
        sources = [None if c is None else c.fingerprint for c in (*self.train, *self.held_out)]
        return {"kind": "classifier", "version": VERSION, "data": canonical_hash(sources), "seed": self.seed}

    def facts(self) -> dict[str, Any]:
        """See `DomainJudge`."""
        return {
            "training_samples": self.num_training_samples,
            "held_out_from": self.held_out_from,
            "held_out_samples": int(self.confusion.sum()),
            "held_out_accuracy": self.accuracy,
            "confusion": {
                true: dict(zip(self.names, map(int, row), strict=True))
                for true, row in zip(self.names, self.confusion, strict=True)
            },
        }

    def _introduce(self) -> None:
        log.info(
            "classifier: trained on %d samples; accuracy %.1f %% on %d of %s",
            self.num_training_samples,
            100 * self.accuracy,
            self.confusion.sum(),
            self.held_out_from,
        )
        log.info("%s", confusion_table(self.names, self.confusion))
        if self.accuracy < WEAK_ACCURACY:
            log.warning(
                "the classifier tells domains with an accuracy of %.0f %% only: the knowledge distribution "
                "will be as vague; give it more data, or use judge.kind endpoint or model",
                100 * self.accuracy,
            )

    def judge(self, texts: Sequence[tuple[int, str]]) -> Iterator[Judgement]:
        """See `DomainJudge`."""
        given = self.model.predict_proba([text for _, text in texts])
        for (index, _), row in zip(texts, given, strict=True):
            yield Judgement(index, row / row.sum())

    def close(self) -> None:
        """Nothing to release."""


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


def decode_samples(
    caches: Sequence[TokenCache | None],
    tokenizer: Any,
    most: int,
    max_chars: int,
    generator: np.random.Generator,
) -> LabelledTexts:
    """At most `most` samples of each domain, chosen at random, as text without special tokens."""
    texts: list[str] = []
    domains: list[int] = []
    for domain, cache in enumerate(caches):
        assert cache is not None
        chosen = np.sort(generator.permutation(len(cache))[:most])
        ids = [cache.sample(int(i))[0].tolist() for i in chosen]
        texts += [
            text[:max_chars]
            for text in tokenizer.batch_decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        ]
        domains += [domain] * len(chosen)
    return LabelledTexts(texts, np.array(domains))


def split(samples: LabelledTexts, seed: int) -> tuple[LabelledTexts, LabelledTexts]:
    """(training, held out): `HELD_OUT_SHARE` of each domain is held out."""
    texts, held_out, domains, held_out_domains = train_test_split(
        *samples, test_size=HELD_OUT_SHARE, stratify=samples.domains, random_state=seed
    )
    return LabelledTexts(texts, domains), LabelledTexts(held_out, held_out_domains)


def fit(samples: LabelledTexts, seed: int) -> Any:
    """The calibrated classifier: texts -> probabilities float64[n, k]."""
    features = make_union(
        HashingVectorizer(n_features=NUM_FEATURES, ngram_range=(1, 2), alternate_sign=False),
        HashingVectorizer(
            n_features=NUM_FEATURES, analyzer="char_wb", ngram_range=(2, 5), alternate_sign=False
        ),
    )
    encoder = make_pipeline(features, TfidfTransformer(sublinear_tf=True))
    counts = np.bincount(samples.domains)
    weights = (len(samples.domains) / (len(counts) * counts))[samples.domains]
    classifier = CalibratedClassifierCV(LinearSVC(random_state=seed), method="sigmoid", cv=FOLDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convergence: the held-out accuracy tells what came of it
        classifier.fit(encoder.fit_transform(samples.texts), samples.domains, sample_weight=weights)
    return make_pipeline(encoder, classifier)


def confusion_table(names: Sequence[str], table: npt.NDArray[np.int64]) -> str:
    """The table as text: a row per true domain, a column per answer."""
    rows = [[name, *map(str, row)] for name, row in zip(names, table, strict=True)]
    return "\n".join(in_columns([["true \\ judged", *names], *rows]))
