"""Aggregation of judged texts: hand-computed numbers, intervals that cover, files that are refused."""

import json

import numpy as np
import pytest

from versatune_ds.config.weights import Domains
from versatune_ds.domain.knowledge import aggregate, bootstrap_means, corrected, read_knowledge
from versatune_ds.domain.reference import prior_weights
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError

TABLE = DomainTable(["law", "code", "other"])


def test_means_counts_and_rounds_by_hand():
    probabilities = np.array([[0.8, 0.2, 0.0], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    content = aggregate(TABLE, probabilities, np.array([0, 0, 2, 2]), num_rounds=3, seed=0)
    assert content["domains"] == pytest.approx({"law": 0.4, "code": 0.3, "other": 0.3}, rel=1e-15)
    assert content["most_probable"] == {"law": 2, "code": 1, "other": 1}
    assert content["rounds"][0] == {
        "texts": 2,
        "domains": pytest.approx({"law": 0.65, "code": 0.15, "other": 0.2}),
    }
    assert content["rounds"][1] == {"texts": 0, "domains": None}
    # round 0 is (0.25, -0.15, -0.1) off, round 2 (-0.25, 0.15, 0.1): both 0.25 in total variation
    assert content["agreement"] == pytest.approx({"mean_total_variation": 0.25, "max_difference": 0.25})
    for name, mean in content["domains"].items():
        low, high = content["interval_95"][name]
        assert low < mean < high
    json.dumps(content, allow_nan=False)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    generator = np.random.default_rng(3)
    truth, covered = np.array([0.6, 0.3, 0.1]), np.zeros(3)
    for i in range(200):
        texts = generator.dirichlet(2 * truth, size=60)
        low, high = np.percentile(bootstrap_means(texts, seed=i), (2.5, 97.5), axis=0)
        covered += (low <= truth) & (truth <= high)
    assert (covered / 200 > 0.88).all() and (covered / 200 < 0.99).all(), covered / 200


def test_one_text_gives_a_distribution_without_a_spread():
    content = aggregate(TABLE, np.array([[0.0, 1.0, 0.0]]), np.array([0]), num_rounds=1, seed=0)
    assert content["domains"] == {"law": 0.0, "code": 1.0, "other": 0.0}
    assert content["interval_95"] == {"law": [0.0, 0.0], "code": [1.0, 1.0], "other": [0.0, 0.0]}


@pytest.fixture
def write(tmp_path):
    def write_json(value) -> object:
        path = tmp_path / "knowledge.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write_json


def test_what_detect_writes_is_what_train_starts_from(write):
    probabilities = np.random.default_rng(0).dirichlet([1, 2, 3], size=50)
    content = aggregate(TABLE, probabilities, np.zeros(50, dtype=np.int64), num_rounds=1, seed=0)
    path = write({**content, "model": {}, "texts": {}})
    domains = Domains(names=list(TABLE.names), initial=path)
    np.testing.assert_allclose(prior_weights(domains, TABLE), probabilities.mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ({"domains": {"law": 0.5, "code": 0.5}}, ConfigError, "no value for other.*run versatune-ds detect"),
        (
            {"domains": {"law": 0.5, "code": 0.2, "other": 0.2, "maths": 0.1}},
            ConfigError,
            "unknown domain 'maths'.*run versatune-ds detect",
        ),
        ({"domains": {"law": 0.5, "code": 0.2, "othr": 0.3}}, ConfigError, "did you mean 'other'"),
        ({"domains": {"law": 0.5, "code": 0.2, "other": 0.2}}, ConfigError, "sum to 0.9; they must sum to 1"),
        ({"domains": {"law": 1.5, "code": -0.2, "other": -0.3}}, ConfigError, "code has the negative share"),
        ({"domains": {"law": "0.5", "code": 0.2, "other": 0.3}}, DataError, "finite number"),
        ('{"domains": {"law": NaN, "code": 0.5, "other": 0.5}}', DataError, "finite number"),
        ({"losses": {}}, DataError, "no key 'domains'.*detect writes one"),
        (
            {"format": "versatune_ds.reference", "version": 1, "domains": {}},
            DataError,
            "expected format 'versatune",
        ),
        ({"version": 2, "domains": {}}, DataError, "version 2"),
        ('{"domains": {"law": 0.5,', DataError, "not JSON"),
    ],
)
def test_bad_knowledge_files_are_refused(write, content, error, text):
    with pytest.raises(error, match=text) as caught:
        prior_weights(Domains(names=list(TABLE.names), initial=write(content)), TABLE)
    assert "knowledge.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: no such file; domains\.initial names it"):
        read_knowledge(tmp_path / "nowhere.json", "domains.initial")


# --- the judge's own mistakes -------------------------------------------------------------------------------

MISTAKEN = np.array([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.0, 0.3, 0.7]])


def test_shares_are_corrected_for_the_table_by_hand():
    # 0.5 law, 0.3 code, 0.2 other are judged as 0.4 + 0.06, 0.05 + 0.18 + 0.06, 0.05 + 0.06 + 0.14
    truth = np.array([0.5, 0.3, 0.2])
    judged = np.array([0.46, 0.29, 0.25])
    np.testing.assert_allclose(truth @ MISTAKEN, judged, rtol=1e-14)
    np.testing.assert_allclose(corrected(judged, MISTAKEN), truth, atol=1e-6)
    np.testing.assert_allclose(corrected(judged, np.eye(3)), judged, atol=1e-12)
    # more of other than a judge could ever give to it: all is other, and no share is negative
    np.testing.assert_allclose(corrected(np.array([0.0, 0.2, 0.8]), MISTAKEN), [0, 0, 1], atol=1e-6)
    both = corrected(np.stack([judged, judged]), np.stack([MISTAKEN, np.eye(3)]))
    np.testing.assert_allclose(both, [truth, judged], atol=1e-6)


def test_sources_that_are_judged_differently_widen_the_intervals():
    texts = np.repeat(np.eye(3), [46, 29, 25], axis=0)
    alike = [row[None].repeat(5, axis=0) for row in MISTAKEN]
    apart = [rows.copy() for rows in alike]
    apart[0] += np.outer([-0.1, -0.1, 0.0, 0.1, 0.1], [1.0, -1.0, 0.0])
    found = [
        aggregate(TABLE, texts, np.zeros(100, dtype=int), 1, 0, sources=given)
        for given in (None, alike, apart)
    ]
    assert "judged" not in found[0] and found[0]["domains"]["law"] == 0.46
    for content in found[1:]:
        assert content["judged"] == found[0]["domains"]
        assert content["domains"]["law"] == pytest.approx(0.5, abs=1e-3)
    widths = [np.diff(content["interval_95"]["law"])[0] for content in found]
    assert widths[0] < widths[1] < widths[2]
