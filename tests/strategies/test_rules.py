"""Every strategy with numbers worked by hand, and what no input may break.

The numbers are chosen so that a swapped sign, a missing normalisation or the wrong domain changes them.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from versatune_ds.config.weights import ScheduledWeights, Weights
from versatune_ds.strategies.rules import (
    NEEDED,
    STRATEGIES,
    UpdateInputs,
    expansion_gate,
    forgetting_degree,
    learnable_potential,
    settings_of_others,
)

LN2 = math.log(2)
GIVEN = {
    "reference": {"a": 1.0},
    "target": "a",
    "schedule": [ScheduledWeights(step=1, weights={"a": 1.0})],
}
"""What the schema wants to see; the rules do not read it."""


def settings_of(strategy: str, **more) -> Weights:
    """Settings that the schema accepts."""
    needed = {name: GIVEN[name] for name in STRATEGIES[strategy].requires}
    return Weights(strategy=strategy, **(needed | more))


def inputs_of(weights, **vectors) -> UpdateInputs:
    k = len(weights)
    filled = dict.fromkeys(("losses", "reference", "gamma", "phi"), np.zeros(k))
    filled |= {"measured": np.ones(k, bool), "scheduled": np.array(weights, float)}
    filled |= {name: np.array(value) for name, value in vectors.items()}
    return UpdateInputs(weights=np.array(weights, float), target=0, **filled)


def proposal(settings: Weights, weights, **vectors) -> np.ndarray:
    return STRATEGIES[settings.strategy].propose(inputs_of(weights, **vectors), settings)


QUARTER = [0.25, 0.25, 0.5]

# strategy, settings, weights before, vectors, weights after
TABLE = [
    ("uniform", {}, QUARTER, {"losses": [3.0, 2.0, 1.0]}, QUARTER),
    ("inverse", {}, QUARTER, {"losses": [3.0, 2.0, 1.0]}, QUARTER),
    ("constant", {}, QUARTER, {"losses": [3.0, 2.0, 1.0]}, QUARTER),
    ("manual", {}, QUARTER, {"scheduled": [0.1, 0.2, 0.7]}, [0.1, 0.2, 0.7]),
    # factors 1 + 2 gamma = 2, 1, 1.5: products 0.5, 0.25, 0.75, sum 1.5
    ("fostering", {"sigma": 2.0}, QUARTER, {"gamma": [0.5, 0.0, 0.25]}, [1 / 3, 1 / 6, 1 / 2]),
    # sigma 1: factors 1.5, 1, 1.25: products 0.375, 0.25, 0.625, sum 1.25
    ("fostering", {}, QUARTER, {"gamma": [0.5, 0.0, 0.25]}, [0.3, 0.2, 0.5]),
    # factors exp(2 * ln2 / 2) = 2, 1, exp(2 ln2) = 4: products 0.5, 0.25, 2, sum 2.75
    ("fostering", {"form": "exponential", "sigma": 2.0}, QUARTER, {"gamma": [LN2 / 2, 0.0, LN2]},
     [2 / 11, 1 / 11, 8 / 11]),
    # open (phi 0): 0.2 + 0.05 = 0.25; the others times 0.75 / 0.8
    ("expansion", {}, [0.2, 0.3, 0.5], {"gamma": [0.4, 0.1, 0.1]}, [0.25, 0.28125, 0.46875]),
    # open, growth ends at 1
    ("expansion", {"delta": 0.5}, [0.8, 0.1, 0.1], {"gamma": [0.4, 0.1, 0.1]}, [1.0, 0.0, 0.0]),
    # closed (mean phi 0.45 > 0.4): target stays; 0.8 shared as 0.3 * 1.5 : 0.5 * 1.1 = 0.45 : 0.55
    ("expansion", {}, [0.2, 0.3, 0.5], {"gamma": [0.4, 0.5, 0.1], "phi": [9.0, 0.9, 0.0]}, [0.2, 0.36, 0.44]),
    # closed, exponential: 0.3 * exp(ln 2) = 0.6 against 0.5; 0.8 * 6 / 11 and 0.8 * 5 / 11
    ("expansion", {"form": "exponential"}, [0.2, 0.3, 0.5],
     {"gamma": [0.1, LN2, 0.0], "phi": [0.0, 0.9, 0.0]}, [0.2, 4.8 / 11, 4 / 11]),
    # gates: phi of the others 0.3 and 0.1, gamma of the target 0.25. mean 0.2 <= 0.25: relative is open
    ("expansion", {"gate": "relative"}, [0.2, 0.3, 0.5], {"gamma": [0.25, 0.5, 0.1], "phi": [0.0, 0.3, 0.1]},
     [0.25, 0.28125, 0.46875]),
    # largest 0.3 > 0.25: worst is closed; 0.8 shared as 0.45 : 0.55
    ("expansion", {"gate": "worst"}, [0.2, 0.3, 0.5], {"gamma": [0.25, 0.5, 0.1], "phi": [0.0, 0.3, 0.1]},
     [0.2, 0.36, 0.44]),
    # mean 0.2 > 0.15, whatever gamma is: absolute is closed
    ("expansion", {"gate": "absolute", "epsilon": 0.15}, [0.2, 0.3, 0.5],
     {"gamma": [0.25, 0.5, 0.1], "phi": [0.0, 0.3, 0.1]}, [0.2, 0.36, 0.44]),
    # excess ln 2, 0 (loss below its reference), 0: products 0.5, 0.25, 0.5, sum 1.25 -> 0.4, 0.2, 0.4;
    # mixed 0.7 : 0.3 with 1/3 each: 0.28 + 0.1, 0.14 + 0.1, 0.28 + 0.1
    ("doremi", {"smoothing": 0.3}, QUARTER, {"losses": [1 + LN2, 0.5, 2.0], "reference": [1.0, 1.5, 2.0]},
     [0.38, 0.24, 0.38]),
    # eta 2 doubles the exponent: factors 4, 1, 1: products 1, 0.25, 0.5
    ("doremi", {"smoothing": 0.0, "eta": 2.0}, QUARTER, {"losses": [1 + LN2, 0.5, 2.0],
     "reference": [1.0, 1.5, 2.0]}, [4 / 7, 1 / 7, 2 / 7]),
    # factors exp(ln 4), exp(ln 2), exp(0): products 1, 0.5, 0.5
    ("raw_loss", {}, QUARTER, {"losses": [2 * LN2, LN2, 0.0]}, [0.5, 0.25, 0.25]),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "options", "before", "vectors", "after"), TABLE)
def test_rule_by_hand(strategy, options, before, vectors, after):
    found = proposal(settings_of(strategy, **options), before, **vectors)
    np.testing.assert_allclose(found, after, rtol=1e-14, atol=0)


def test_table_covers_every_strategy():
    accepted = Weights.model_fields["strategy"].annotation.__args__
    assert {row[0] for row in TABLE} == set(STRATEGIES) == set(accepted)


def test_what_a_strategy_reads_and_requires_are_settings():
    for strategy in STRATEGIES.values():
        assert strategy.own_settings <= set(Weights.model_fields)
        assert set(strategy.requires) <= set(NEEDED)
        assert strategy.revives_by is None or strategy.revives_by in strategy.own_settings


READS = {
    "constant": set(),
    "raw_loss": set(),
    "manual": {"schedule"},
    "fostering": {"form", "sigma"},
    "expansion": {"form", "sigma", "target", "delta", "gate", "epsilon"},
    "doremi": {"eta", "smoothing"},
}


@pytest.mark.parametrize("strategy", READS)
def test_settings_that_only_other_strategies_read_have_no_effect(strategy):
    assert STRATEGIES[strategy].own_settings == READS[strategy]
    without_effect = settings_of_others(strategy)
    assert without_effect >= set().union(*READS.values()) - READS[strategy]
    assert without_effect.isdisjoint(READS[strategy]) and "reference" not in without_effect


def test_starts_by_hand():
    prior = np.array([0.6, 0.3, 0.1])
    np.testing.assert_allclose(STRATEGIES["uniform"].start(prior), [1 / 3] * 3, rtol=1e-15)
    # (1 - p) = 0.4, 0.7, 0.9, sum 2
    np.testing.assert_allclose(STRATEGIES["inverse"].start(prior), [0.2, 0.35, 0.45], rtol=1e-15)
    for strategy in set(STRATEGIES) - {"uniform", "inverse"}:
        np.testing.assert_array_equal(STRATEGIES[strategy].start(prior), prior)
    for strategy in STRATEGIES.values():
        np.testing.assert_array_equal(strategy.start(np.ones(1)), [1.0])


def test_gamma_by_hand():
    # (4 - 3) / 4 = 0.25; a loss below its reference gives 0
    gamma = learnable_potential(np.array([4.0, 2.0]), np.array([3.0, 2.5]))
    np.testing.assert_array_equal(gamma, [0.25, 0.0])
    # se = sqrt(0.3^2 + 0.4^2) = 0.5; (4 - 3 - 1.2 * 0.5) / 4 = 0.1
    gamma = learnable_potential(np.array([4.0]), np.array([3.0]), stderr=np.array([0.3]),
                                reference_stderr=np.array([0.4]), noise_z=1.2)  # fmt: skip
    assert gamma[0] == pytest.approx(0.1, rel=1e-12)


def test_phi_by_hand():
    # (2.5 - 2) / 2 = 0.25: relative to the EARLIER loss; a falling loss is no forgetting
    phi = forgetting_degree(np.array([2.5, 2.0]), np.array([2.0, 2.5]))
    np.testing.assert_array_equal(phi, [0.25, 0.0])
    # se = 0.5 as above; (2.5 - 2 - 0.6 * 0.5) / 2 = 0.1; three standard errors hide the change
    errors = {"stderr": np.array([0.3]), "previous_stderr": np.array([0.4])}
    phi = forgetting_degree(np.array([2.5]), np.array([2.0]), **errors, noise_z=0.6)
    assert phi[0] == pytest.approx(0.1, rel=1e-12)
    assert forgetting_degree(np.array([2.5]), np.array([2.0]), **errors, noise_z=3.0)[0] == 0.0


def test_a_loss_of_zero_divides_nothing():
    assert np.isfinite(learnable_potential(np.zeros(1), np.ones(1))).all()
    assert np.isfinite(forgetting_degree(np.ones(1), np.zeros(1))).all()
    assert forgetting_degree(np.zeros(1), np.zeros(1))[0] == 0.0


@pytest.mark.parametrize(
    ("gate", "epsilon", "is_open", "forgetting", "limit"),
    [
        # gamma of the target 0.2; phi of the others 0.1 and 0.3: mean 0.2, largest 0.3
        ("relative", 1.0, True, 0.2, 0.2),  # equal is open
        ("relative", 0.9, False, 0.2, 0.18),
        ("absolute", 0.2, True, 0.2, 0.2),
        ("absolute", 0.19, False, 0.2, 0.19),
        ("worst", 1.0, False, 0.3, 0.2),
        ("worst", 1.6, True, 0.3, 0.32),
    ],
)
def test_gates(gate, epsilon, is_open, forgetting, limit):
    # the target's own phi (9) must not count
    inputs = inputs_of(QUARTER, gamma=[0.2, 0.9, 0.9], phi=[9.0, 0.1, 0.3])
    decision = expansion_gate(inputs, gate=gate, epsilon=epsilon)
    assert decision.is_open is is_open
    assert (decision.forgetting, decision.limit) == pytest.approx((forgetting, limit))
    assert (
        STRATEGIES["expansion"].decide(inputs, settings_of("expansion", gate=gate, epsilon=epsilon))
        == decision
    )


def test_one_domain_keeps_weight_one():
    for strategy in STRATEGIES:
        after = proposal(settings_of(strategy), [1.0], losses=[2.0], gamma=[0.5], phi=[0.1])
        np.testing.assert_array_equal(after, [1.0])


@pytest.mark.parametrize("strategy", ["fostering", "raw_loss"])
def test_an_unmeasured_domain_keeps_its_weight(strategy):
    after = proposal(settings_of(strategy), QUARTER, losses=[3.0, 0.0, 1.0], gamma=[0.5, 0.0, 0.1],
                     measured=[True, False, True])  # fmt: skip
    assert after[1] == 0.25 and after[0] > 0.25 and after.sum() == pytest.approx(1)


def test_closed_expansion_moves_neither_target_nor_unmeasured_domains():
    after = proposal(settings_of("expansion"), [0.2, 0.3, 0.4, 0.1], gamma=[0.0, 0.0, 0.0, 0.5],
                     phi=[0.0, 0.0, 0.1, 0.0], measured=[True, False, True, True])  # fmt: skip
    # 0.5 shared as 0.4 : 0.1 * 1.5, sum 0.55
    np.testing.assert_allclose(after, [0.2, 0.3, 0.2 / 0.55, 0.075 / 0.55], rtol=1e-14)


@pytest.mark.parametrize("phi", [0.0, 9.0])
def test_expansion_at_weight_one_stays(phi):
    after = proposal(settings_of("expansion"), [1.0, 0.0, 0.0], phi=[0.0, phi, phi])
    np.testing.assert_array_equal(after, [1.0, 0.0, 0.0])


nats = st.floats(0, 1e12)


@hypothesis_settings(deadline=None)
@given(
    strategy=st.sampled_from(list(STRATEGIES)),
    form=st.sampled_from(["linear", "exponential"]),
    gate=st.sampled_from(["relative", "absolute", "worst"]),
    strength=st.floats(0, 1e200),
    raw=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    losses=st.lists(nats, min_size=3, max_size=3),
    reference=st.lists(nats, min_size=3, max_size=3),
    measured=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_no_finite_input_leaves_the_simplex(strategy, form, gate, strength, raw, losses, reference, measured):
    weights = np.array(raw) + (sum(raw) == 0)
    weights = weights / math.fsum(weights)
    losses, reference = np.array(losses), np.array(reference)
    settings = settings_of(strategy, form=form, gate=gate, sigma=strength, eta=strength)
    after = proposal(
        settings,
        weights,
        losses=losses,
        reference=reference,
        measured=measured,
        gamma=learnable_potential(losses, reference),
        phi=forgetting_degree(losses, reference),
    )
    assert np.isfinite(after).all() and (after >= 0).all()
    assert math.fsum(after) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("strategy", "options"), [
    ("fostering", {"form": "exponential", "sigma": 50.0}), ("fostering", {"sigma": 50.0}), ("doremi", {}),
    ("raw_loss", {}), ("expansion", {"form": "exponential", "epsilon": 0.0}),
])  # fmt: skip
def test_thousands_of_updates_never_overflow(strategy, options):
    settings = settings_of(strategy, **options)
    vectors = {
        "losses": [9.0, 5.0, 1.0],
        "reference": [1.0] * 3,
        "gamma": [0.9, 0.5, 0.1],
        "phi": [0.0, 0.1, 0.0],
    }
    weights = np.full(3, 1 / 3)
    for _ in range(5000):
        weights = proposal(settings, weights, **vectors)
    assert np.isfinite(weights).all() and math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    if strategy != "expansion":
        assert weights.argmax() == 0


def test_inputs_are_free_of_nan_by_construction():
    with pytest.raises(ValueError, match="losses is not finite"):
        inputs_of(QUARTER, losses=[np.nan, 1.0, 1.0])
    with pytest.raises(ValueError, match="phi has shape"):
        inputs_of(QUARTER, phi=[1.0])
