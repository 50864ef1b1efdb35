"""Reference losses and initial weights: what is accepted, and what is refused with which reason."""

import json

import numpy as np
import pytest

from versatune_ds.config.weights import Domains, Weights
from versatune_ds.domain.reference import Fingerprints, initial_weights, load_reference, prior_weights
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError

TABLE = DomainTable(["law", "code"])
LOSSES = {"law": 1.9, "code": 0.7}
FILE = {
    "format": "versatune_ds.reference",
    "version": 1,
    "losses": {"code": 0.7, "law": 1.9},
    "stderr": {"code": 0.02, "law": 0.01},
    "fingerprints": {"tokenizer": "t1", "data": "d1"},
}


@pytest.fixture
def write(tmp_path):
    def write_json(value) -> object:
        path = tmp_path / "file.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write_json


def test_reference_from_a_dict_has_no_fingerprints():
    reference = load_reference(LOSSES, TABLE, Fingerprints(tokenizer="t1"))
    np.testing.assert_array_equal(reference.losses, [1.9, 0.7])
    np.testing.assert_array_equal(reference.stderr, [0.0, 0.0])
    assert load_reference(None, TABLE) is None


def test_reference_file_is_read_by_name_and_round_trips(write):
    reference = load_reference(write(FILE), TABLE, Fingerprints(tokenizer="t1", model="not in the file"))
    np.testing.assert_array_equal(reference.losses, [1.9, 0.7])
    np.testing.assert_array_equal(reference.stderr, [0.01, 0.02])
    again = load_reference(write(reference.to_json(TABLE)), TABLE)
    assert again.losses.tobytes() == reference.losses.tobytes()
    assert again.fingerprints == reference.fingerprints == Fingerprints(tokenizer="t1", data="d1")


@pytest.mark.parametrize("kind", ["tokenizer", "data"])
def test_reference_of_another_run_is_refused(write, kind):
    with pytest.raises(ConfigError, match=f"another {kind}.*cannot be compared"):
        load_reference(write(FILE), TABLE, Fingerprints(**{kind: "another"}))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"losses": {"law": 1.9}, "stderr": {}}, ConfigError, "no value for code"),
        ({"losses": {**LOSSES, "math": 1.0}}, ConfigError, "unknown domain 'math'"),
        ({"losses": {"law": 1.9, "code": 0.0}}, ConfigError, "code is 0.0; it must be > 0"),
        (
            {"losses": {"law": 1.9, "code": "0.7"}},
            DataError,
            "losses of code is '0.7'; expected a finite number",
        ),
        ({"losses": {"law": 1.9, "code": float("nan")}}, DataError, "losses of code is nan"),
        ({"losses": None}, DataError, "'losses' must be an object"),
        ({"stderr": {"law": -1.0, "code": 0.0}}, ConfigError, "standard error of law"),
        ({"version": 2}, DataError, "version 2; expected"),
        ({"format": "x"}, DataError, "format 'x'"),
        ({"loses": {}}, DataError, "did you mean 'losses'"),
        ({"fingerprints": {"tokeniser": "t"}}, DataError, "did you mean 'tokenizer'"),
        ({"fingerprints": {"tokenizer": 3}}, DataError, "fingerprints must be texts"),
    ],
)
def test_bad_reference_file_is_refused(write, change, error, text):
    with pytest.raises(error, match=text):
        load_reference(write({**FILE, **change}), TABLE)


def test_unreadable_files_are_refused(write, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_reference(tmp_path / "absent.json", TABLE)
    with pytest.raises(DataError, match="not JSON"):
        load_reference(write("{"), TABLE)
    with pytest.raises(DataError, match="holds a list"):
        load_reference(write([]), TABLE)


def domains(initial) -> Domains:
    return Domains(names=["law", "code"], initial=initial)


def test_prior_is_uniform_given_or_read_and_sums_to_one_exactly(write):
    np.testing.assert_array_equal(prior_weights(domains("uniform"), TABLE), [0.5, 0.5])
    # rounded shares sum to 0.9995: each is divided by it
    rounded = {"code": 0.3, "law": 0.6995}
    expected = [0.6995 / 0.9995, 0.3 / 0.9995]
    np.testing.assert_allclose(prior_weights(domains(rounded), TABLE), expected, rtol=1e-15)
    path = write({"domains": rounded, "sequences": 10000})
    np.testing.assert_allclose(prior_weights(domains(path), TABLE), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("uniform", [0.5, 0.5]), ("inverse", [0.2, 0.8]), ("constant", [0.8, 0.2]), ("raw_loss", [0.8, 0.2])],
)
def test_initial_weights_by_strategy(strategy, expected):
    weights = initial_weights(domains({"law": 0.8, "code": 0.2}), Weights(strategy=strategy), TABLE)
    np.testing.assert_allclose(weights, expected, rtol=1e-15)


def test_bad_knowledge_file_is_refused(write):
    for content, error, text in (
        ({"domains": {"law": 0.8, "code": 0.1}}, ConfigError, "sum to 0.9"),
        ({"domains": {"law": 1.2, "code": -0.2}}, ConfigError, "negative"),
        ({"domains": {"law": 1.0}}, ConfigError, "no value for code"),
        ({"law": 0.8, "code": 0.2}, DataError, "no key 'domains'"),
    ):
        with pytest.raises(error, match=text):
            prior_weights(domains(write(content)), TABLE)


def test_bits_per_byte_are_equal_on_both_sides(write):
    """2 nats per token of 4 bytes are 4 nats per token of 8 bytes: 0.7213 bits per byte."""
    sizes = {"code": 4.0, "law": 5.0}
    raw = {**FILE, "losses": {"code": 2.0, "law": 3.0}, "bytes_per_token": sizes}
    ours = np.array([2.5, 8.0])  # law, code
    reference = load_reference(write(raw), TABLE, Fingerprints(tokenizer="another"), ours)
    np.testing.assert_allclose(reference.losses, [1.5, 4.0], rtol=1e-15)
    np.testing.assert_allclose(reference.stderr, [0.005, 0.04], rtol=1e-15)
    bits_per_byte = [2.0 / (4.0 * np.log(2)), 4.0 / (8.0 * np.log(2))]
    assert bits_per_byte[0] == pytest.approx(bits_per_byte[1]) == pytest.approx(0.7213, abs=1e-4)
    with pytest.raises(ConfigError, match="another data"):  # text of other data is still other text
        load_reference(write(raw), TABLE, Fingerprints(tokenizer="another", data="another"), ours)


def test_bytes_need_to_be_known(write):
    with pytest.raises(ConfigError, match=r"no bytes_per_token.*the verb reference"):
        load_reference(write(FILE), TABLE, Fingerprints(), np.array([2.5, 8.0]))
    for sizes, text in (({"law": 4.0}, "no value for code"), ({"law": 4.0, "code": 0.0}, "must be > 0")):
        with pytest.raises(ConfigError, match=text):
            load_reference(write({**FILE, "bytes_per_token": sizes}), TABLE)


def test_refusals_name_the_cure(write):
    with pytest.raises(ConfigError, match=r"weights\.loss_unit: byte"):
        load_reference(write(FILE), TABLE, Fingerprints(tokenizer="another"))
    with pytest.raises(ConfigError, match=r"reference\.model"):
        load_reference(write({**FILE, "fingerprints": {"model": "m1"}}), TABLE, Fingerprints(model="another"))
    whole = json.dumps(FILE)
    with pytest.raises(DataError, match="cut short"):
        load_reference(write(whole[: len(whole) // 2]), TABLE)
    with pytest.raises(DataError, match="measure it again"):
        load_reference(write({"loss": 1}), TABLE)


def test_method_and_provenance_go_through_the_file(write):
    raw = {**FILE, "method": "early_stopping", "provenance": {"model": "m"}, "bytes_per_token": LOSSES}
    reference = load_reference(write(raw), TABLE)
    assert reference.to_json(TABLE) == raw
    with pytest.raises(DataError, match="method must be a text"):
        load_reference(write({**FILE, "method": 3}), TABLE)
