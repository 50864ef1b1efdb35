"""Variants of the weight settings for `plan-weights`."""

import pytest
from launching import REPOSITORY

from versatune_ds.config.variants import combinations, make_variants
from versatune_ds.foundations.errors import ConfigError

REFERENCE = "weights.reference={law: 1.0, code: 1.5}"


def test_every_combination_in_the_order_given():
    assert combinations([]) == [[]]
    assert combinations(["weights.sigma=1, 2", "weights.form=linear,exponential"]) == [
        ["weights.sigma=1", "weights.form=linear"],
        ["weights.sigma=1", "weights.form=exponential"],
        ["weights.sigma=2", "weights.form=linear"],
        ["weights.sigma=2", "weights.form=exponential"],
    ]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["weights.sigma"], "write it as section.key=value,value"),
        (["weights.sigma=1,,2"], "write it as"),
        (["optimizer.lr=1,2"], "only domains and weights decide the weights"),
        (["weights.sigma=1,2,3,4,5", "weights.delta=.1,.2,.3,.4,.5"], "asks for 25 variants; at most 24"),
    ],
)
def test_bad_vary_is_refused(vary, message):
    with pytest.raises(ConfigError, match=message):
        combinations(vary)


def test_variants_without_a_file_take_the_domains_of_the_history():
    vary = ["weights.strategy=fostering,uniform"]
    first, second = make_variants(None, ["law", "code"], [REFERENCE, "domains.min_weight=0.1"], vary)
    assert (first.label, second.label) == ("strategy fostering", "strategy uniform")
    assert first.domains.names == ["law", "code"] and first.domains.min_weight == 0.1
    assert first.weights.reference == {"law": 1.0, "code": 1.5}
    assert make_variants(None, ["law"], [], [])[0].label == "constant"


def test_variants_of_a_run_apply_what_they_compute(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    path = REPOSITORY / "configs" / "strategies" / "expansion.yaml"
    overrides = ["weights.shadow=true", "weights.loss_source=probe"]
    [variant] = make_variants(path, ["unused"], overrides, ["weights.delta=0.2"])
    assert variant.weights.strategy == "expansion" and variant.weights.delta == 0.2
    assert not variant.weights.shadow and variant.weights.loss_source == "train"


def test_a_variant_that_is_no_valid_setting_is_refused():
    with pytest.raises(ConfigError, match="weights: strategy fostering compares with reference losses"):
        make_variants(None, ["law", "code"], [], ["weights.strategy=uniform,fostering"])
