"""The domain table: order, ids, fingerprint and errors that name the known domains."""

import numpy as np
import pytest

from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError


def test_ids_are_positions():
    table = DomainTable(["law", "code", "other"])
    assert [table.id_of(name) for name in ("law", "code", "other")] == [0, 1, 2]
    assert len(table) == 3 and table.names == ("law", "code", "other")


def test_fingerprint_depends_on_names_and_order():
    assert DomainTable(["a", "b"]).fingerprint == DomainTable(["a", "b"]).fingerprint
    assert DomainTable(["a", "b"]).fingerprint != DomainTable(["b", "a"]).fingerprint


def test_vector_follows_table_order_and_by_name_inverts_it():
    table = DomainTable(["law", "code"])
    vector = table.vector({"code": 0.25, "law": 0.75}, "x")
    np.testing.assert_array_equal(vector, [0.75, 0.25])
    assert table.by_name(vector) == {"law": 0.75, "code": 0.25}


@pytest.mark.parametrize(
    ("names", "text"), [([], "empty"), (["a", "a"], "repeats a"), (["a", "  "], "blank")]
)
def test_bad_names_are_refused(names, text):
    with pytest.raises(ConfigError, match=text):
        DomainTable(names)


def test_unknown_and_missing_domains_are_named():
    table = DomainTable(["law", "code"])
    with pytest.raises(ConfigError, match=r"did you mean 'law'.*known: law, code"):
        table.id_of("laww")
    with pytest.raises(ConfigError, match=r"weights\.reference: unknown domain 'math'"):
        table.vector({"law": 1, "code": 1, "math": 1}, "weights.reference")
    with pytest.raises(ConfigError, match="no value for code"):
        table.vector({"law": 1}, "weights.reference")
    with pytest.raises(ValueError, match="3 entries"):
        table.by_name([1, 2, 3])
