"""Strategy `marginal`: gains by hand, their pooling and noise, the weights that follow, and exact resume."""

import json
import math

import numpy as np
import pytest

from versatune_ds.config.weights import Domains, Weights
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.probes.gains import MarginalGains
from versatune_ds.domain.probes.samples import SampleLosses
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import StateError

NAMES = ["law", "code"]
HALF = np.array([0.5, 0.5])
TOKENS = [np.array([10.0, 10.0])] * 2


def probe(law, code) -> SampleLosses:
    """Two samples a domain, of 10 tokens each; given are their summed losses."""
    return SampleLosses([np.array(values, dtype=float) for values in (law, code)], TOKENS)


FIRST = probe((40, 40), (40, 40))
# law: d = -8, -4: r = -0.6, residuals -2, 2: se = sqrt(2 * 8) / 20 = 0.2; code: d = -3, -1: r -0.2, se 0.1
SECOND = probe((32, 36), (37, 39))


def test_gains_by_hand():
    gains = MarginalGains(np.array([0.25, 0.75]))
    gains.observe(FIRST, np.array([100.0, 100.0]))
    assert gains.gains.tolist() == [0.0, 0.0] and np.isinf(gains.stderr).all()
    # law 0.25 * 0.6 / 300, code 0.75 * 0.2 / 100, a tokens of each
    gains.observe(SECOND, np.array([300.0, 100.0]))
    np.testing.assert_allclose(gains.gains, [0.0005, 0.0015], rtol=1e-12)
    np.testing.assert_allclose(gains.stderr, [0.25 * 0.2 / 300, 0.75 * 0.1 / 100], rtol=1e-12)
    assert "law 500 +- 1.7e+02, code 1500 +- 7.5e+02" in gains.sentence(NAMES)


def test_windows_are_pooled_by_precision_and_fade():
    gains = MarginalGains(np.ones(2))
    gains.observe(FIRST, HALF)
    gains.observe(SECOND, np.array([100.0, 100.0]))  # law: 0.006, error 0.002: P = 250,000
    # law once more: d = 0, 4: r = 0.2, se 0.2; on 100 tokens -0.002, error 0.002: P = 125,000 + 250,000,
    # G = (125,000 * 0.006 - 250,000 * 0.002) / 375,000 = 2 / 3000; code has no tokens: it fades
    gains.observe(probe((32, 40), (30, 30)), np.array([100.0, 0.0]))
    np.testing.assert_allclose(gains.precision, [375_000, 500_000], rtol=1e-12)
    np.testing.assert_allclose(gains.gains, [2 / 3000, 0.002], rtol=1e-12)


def test_the_advantage_is_over_the_mixture_and_not_within_noise():
    gains = MarginalGains(np.ones(2))
    gains.observe(FIRST, HALF)
    gains.observe(SECOND, np.array([100.0, 100.0]))  # gains 0.006 and 0.002, errors 0.002 and 0.001
    # at 1/4 and 3/4 the mean is 0.003: 1 after 0.003 / 0.003, and -0.001 / 0.003
    np.testing.assert_allclose(gains.advantage(np.array([0.25, 0.75]), 0.0), [1.0, -1 / 3], rtol=1e-12)
    # at a half each: 0.002 from the mean of 0.004, its error sqrt(0.002^2 + 0.001^2) / 2 = 0.00112: 1.79
    np.testing.assert_allclose(gains.advantage(HALF, 1.78), [0.5, -0.5], rtol=1e-12)
    assert gains.advantage(HALF, 1.80).tolist() == [0.0, 0.0]
    assert MarginalGains(np.ones(2)).advantage(HALF, 0.0).tolist() == [0.0, 0.0]


def controller_of(**options) -> WeightController:
    weights = Weights(strategy="marginal", every_n_steps=10, eta=math.log(2), **options)
    return WeightController(DomainTable(NAMES), Domains(names=NAMES), weights)


def trained(controller: WeightController) -> WeightController:
    """100 supervised tokens of each domain."""
    controller.observe(DomainSums.from_samples([0, 0, 1, 1], [100.0] * 4, [50] * 4, 2))
    return controller


def test_weights_move_towards_the_domain_whose_tokens_help():
    controller = trained(controller_of())
    assert controller.needs_probe and controller.needs_samples
    assert controller.update(10, FIRST).after == {"law": 0.5, "code": 0.5}
    # advantages +-0.5: factors 2^0.5 and 2^-0.5, so 2 : 1
    record = trained(controller).update(20, SECOND)
    np.testing.assert_allclose(controller.weights, [2 / 3, 1 / 3], rtol=1e-12)
    assert any(reason.startswith("gain in 1e-6 nats") for reason in record.reasons)
    # for an objective of code alone, law's tokens gain nothing
    for_code = trained(controller_of(objective={"law": 0.0, "code": 1.0}))
    for_code.update(10, FIRST)
    trained(for_code).update(20, SECOND)
    # code gains 0.002, the mean is 0.001: advantages 1 and -1, so 4 : 1
    np.testing.assert_allclose(for_code.weights, [0.2, 0.8], rtol=1e-12)
    noisy = trained(controller_of(noise_z=2.0))
    noisy.update(10, FIRST)
    trained(noisy).update(20, SECOND)
    assert noisy.weights.tolist() == [0.5, 0.5]


def test_a_resumed_run_goes_on_exactly():
    whole, first = controller_of(), controller_of()
    for step, given in ((10, FIRST), (20, SECOND), (30, probe((30, 31), (37, 38)))):
        expected = trained(whole).update(step, given).to_json()
        resumed = controller_of()
        resumed.load_state(json.loads(json.dumps(first.state())))
        assert trained(resumed).update(step, given).to_json() == expected
        first = resumed
    assert expected["before"] != expected["after"] and first.state() == whole.state()


def test_a_state_that_is_refused_changes_nothing():
    controller = trained(controller_of(guard={}))
    controller.update(10, FIRST)
    before, damaged = controller_of(guard={}), controller.state() | {"gains": {}}
    with pytest.raises(StateError, match="strategy marginal is damaged"):
        before.load_state(damaged)
    assert before.state() == controller_of(guard={}).state()


def test_damaged_state_and_other_samples_are_refused():
    gains = MarginalGains(np.ones(2))
    for damage in ({}, {"previous": None, "precision": [0.0], "pooled": [0.0]}):
        with pytest.raises(StateError, match="strategy marginal"):
            gains.load_state(damage)
    gains.observe(FIRST, HALF)
    with pytest.raises(StateError, match="3 held-out samples after one of 2"):
        gains.observe(SampleLosses([np.ones(3)] * 2, [np.ones(3)] * 2), HALF)


def test_update_z_and_bad_objectives_are_refused():
    with pytest.raises(ValueError, match="noise_z is its limit"):
        Weights(strategy="marginal", update_z=1.0)
    with pytest.raises(ValueError, match="objective: shares sum to"):
        Weights(strategy="marginal", objective={"law": 0.2})
