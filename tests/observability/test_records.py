"""Records become JSON lines without NaN; rates and means are derived from the counts."""

import json
import math

import numpy as np
import pytest
from launching import REPOSITORY

from versatune_ds.observability.records import EvalRecord, by_domain, clean, json_line


def test_step_line_reads_back_and_holds_derived_rates(make_step):
    line = make_step(7).to_json()
    assert json.loads(json_line(line)) == line
    assert line["step"] == 7
    assert line["real_tokens_per_s"] == 500  # 1000 tokens / 2 s
    assert line["slot_tokens_per_s"] == 512  # 1024 / 2
    assert line["supervised_tokens_per_s"] == 250  # 500 / 2
    assert line["packing_efficiency"] == 1000 / 1024


def test_every_key_of_a_line_is_documented(make_step):
    held_out = EvalRecord(step=1, domain_loss={}, domain_supervised_tokens={}, eval_s=1.0)
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [k for record in (make_step(1), held_out) for k in record.to_json() if f"`{k}`" not in text] == []


def test_no_nan_reaches_json(make_step):
    record = make_step(
        1,
        loss=math.nan,
        grad_norm=math.inf,
        skipped=True,
        step_s=0.0,
        domain_loss={"law": np.float64("nan"), "code": np.float32(2.5)},
    )
    line = json.loads(json_line(record.to_json()), parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None
    assert line["domain_loss"] == {"law": None, "code": 2.5}
    assert line["real_tokens_per_s"] is None  # no time passed: no rate
    assert line["skipped"] is True


def test_floats_read_back_bit_for_bit():
    value = 0.1 + 0.2
    assert json.loads(json_line({"w": value}))["w"].hex() == value.hex()


def test_clean_turns_numpy_into_plain_numbers():
    assert clean({"a": np.array([1.0, np.nan]), "n": np.int64(3), "b": np.bool_(True)}) == {
        "a": [1.0, None],
        "n": 3,
        "b": True,
    }


def test_eval_loss_divides_sums_once():
    record = EvalRecord(
        step=0,
        domain_loss={"law": 2.0, "code": 4.0, "none": None},
        domain_supervised_tokens={"law": 300, "code": 100, "none": 0},
        eval_s=1.0,
    )
    line = record.to_json()
    assert line["loss"] == 2.5  # (2 x 300 + 4 x 100) / 400, not the mean of means 3.0
    assert line["domain_perplexity"]["law"] == pytest.approx(math.e**2)
    assert line["domain_perplexity"]["none"] is None


def test_perplexity_of_a_huge_loss_is_null():
    record = EvalRecord(step=0, domain_loss={"law": 1e4}, domain_supervised_tokens={"law": 1}, eval_s=1.0)
    assert record.to_json()["domain_perplexity"] == {"law": None}


def test_by_domain_takes_arrays_and_mappings():
    assert by_domain(["law", "code"], np.array([1.0, np.nan])) == {"law": 1.0, "code": None}
    assert by_domain(["law", "code"], {"code": 2}) == {"law": None, "code": 2.0}
    with pytest.raises(ValueError, match="3 values for 2 domains"):
        by_domain(["law", "code"], [1, 2, 3])
