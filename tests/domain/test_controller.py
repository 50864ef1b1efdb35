"""The controller: window, absent domains, limits, shadow, alarms, state. Hand numbers stand in comments."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from versatune_ds.config.weights import Domains, Weights
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.reference import ReferenceLosses, load_reference
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError, StateError
from versatune_ds.strategies.rules import STRATEGIES

NAMES = ["law", "code", "other"]
REFERENCE = {"law": 1.0, "code": 1.0, "other": 1.0}


def controller_of(strategy="fostering", *, limits=None, reference=None, **options) -> WeightController:
    table = DomainTable(NAMES)
    if STRATEGIES[strategy].compares:
        reference = reference or REFERENCE
    weights = Weights(strategy=strategy, reference=reference, **({"every_n_steps": 10} | options))
    domains = Domains(names=NAMES, **(limits or {}))
    return WeightController(table, domains, weights, load_reference(reference, table))


def sums(losses, tokens=(100, 100, 100)) -> DomainSums:
    """Two equal samples a domain with the given mean losses (nats) and supervised tokens."""
    ids = [j for j in range(3) for _ in range(2) if tokens[j]]
    n = [tokens[j] / 2 for j in ids]
    return DomainSums.from_samples(ids, [losses[j] * t for j, t in zip(ids, n, strict=True)], n, 3)


def test_window_pools_steps_and_is_reset_by_the_update():
    controller = controller_of()
    # law: 2 nats on 100 tokens, then 5 on 300: (200 + 1500) / 400 = 4.25; the mean of means would be 3.5
    controller.observe(sums([2.0, 1.0, 1.0]))
    controller.observe(sums([5.0, 1.0, 1.0], tokens=(300, 100, 100)).values)
    record = controller.update(10)
    assert record.losses["law"] == 4.25 and record.tokens["law"] == 400 and record.samples["law"] == 4
    assert controller.window == DomainSums.zeros(3)


def test_fostering_update_by_hand():
    # gamma = (2-1)/2, 0, (4-1)/4 = 0.5, 0, 0.75; factors 1.5, 1, 1.75, sum 4.25
    controller = controller_of()
    controller.observe(sums([2.0, 1.0, 4.0]))
    record = controller.update(10)
    assert record.gamma == {"law": 0.5, "code": 0.0, "other": 0.75}
    assert record.phi == dict.fromkeys(NAMES, 0.0)
    np.testing.assert_allclose(controller.weights, np.array([1.5, 1.0, 1.75]) / 4.25, rtol=1e-14)
    assert list(record.after.values()) == controller.weights.tolist() and record.applied
    assert record.before == dict.fromkeys(NAMES, 1 / 3)
    assert "first loss of law, code, other: phi is 0" in record.reasons


def test_phi_compares_with_the_loss_of_the_update_before():
    # law 2 -> 2.5: 0.5 / 2 = 0.25; code falls: 0
    controller = controller_of()
    for step, losses in ((10, [2.0, 2.0, 2.0]), (20, [2.5, 1.0, 2.0])):
        controller.observe(sums(losses))
        record = controller.update(step)
    assert record.phi == {"law": 0.25, "code": 0.0, "other": 0.0}


def test_absent_domain_keeps_loss_and_gamma_and_has_no_phi():
    controller = controller_of(min_tokens=50)
    controller.observe(sums([2.0, 2.0, 2.0]))
    controller.update(10)
    controller.observe(sums([8.0, 2.0, 2.0], tokens=(48, 100, 100)))
    record = controller.update(20)
    assert (record.losses["law"], record.gamma["law"], record.phi["law"]) == (2.0, 0.5, 0.0)
    assert record.tokens["law"] == 48
    stands = "its last loss and gamma stand, phi is 0"
    assert f"law: absent (48 supervised tokens, min_tokens 50); {stands}" in record.reasons
    # back again: compared with 2.0, the last loss that counted: (3 - 2) / 2
    controller.observe(sums([3.0, 2.0, 2.0]))
    assert controller.update(30).phi["law"] == 0.5


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"noise_z": 2.0}, "noise_z 2"),
        ({"update_z": 1.5}, "update_z 1.5"),
        ({"noise_z": 2.0, "update_z": 1.0}, "noise_z 2, update_z 1"),
    ],
)
def test_a_domain_without_a_standard_error_is_absent_for_the_setting_that_asks_for_one(asked, said):
    controller = controller_of(**asked)
    controller.observe(DomainSums.from_samples([0, 1, 2], [200.0] * 3, [100] * 3, 3))
    reasons = controller.update(10).reasons
    assert any(f"law: absent (1 sample(s) give no standard error, {said});" in reason for reason in reasons)


def test_never_measured_domain_keeps_its_weight():
    controller = controller_of("raw_loss")
    controller.observe(sums([2.0, 0.0, 1.0], tokens=(100, 0, 100)))
    record = controller.update(10)
    assert record.losses["code"] is None and record.stderr["code"] is None
    assert any("min_tokens 1); never measured" in reason for reason in record.reasons)
    assert record.after["code"] == 1 / 3 and record.after["law"] > record.after["other"]


@pytest.mark.parametrize("strategy", ["constant", "fostering", "expansion", "doremi", "raw_loss"])
def test_empty_window_moves_nothing(strategy):
    controller = controller_of(strategy, target="law" if strategy == "expansion" else None)
    controller.observe(sums([2.0, 3.0, 4.0]))
    controller.update(10)
    before = controller.digest()
    record = controller.update(20)
    assert controller.digest() == before and record.before == record.after
    assert "no domain was measured: the weights stand" in record.reasons


def test_noise_needs_a_standard_error():
    # one sample a domain: the loss counts without noise_z and does not with it
    one_sample = DomainSums.from_samples([0, 1, 2], [200.0, 200.0, 200.0], [100, 100, 100], 3)
    for noise_z, loss in ((0.0, 2.0), (2.0, None)):
        controller = controller_of(noise_z=noise_z)
        controller.observe(one_sample)
        record = controller.update(10)
        assert record.losses["law"] == loss and record.stderr["law"] is None


def test_noise_is_subtracted_from_gamma():
    # law: 40 nats on 20 tokens in two samples of 10: l = 2, residuals 10 and -10, n / (n-1) = 2:
    # se = sqrt(2 * 200) / 20 = 1; gamma = (2 - 1 - 0.5 * 1) / 2 = 0.25
    noisy = DomainSums.from_samples([0, 0, 1, 1, 2, 2], [30.0, 10.0, 9.0, 9.0, 9.0, 9.0], [10] * 6, 3)
    controller = controller_of(noise_z=0.5)
    controller.observe(noisy)
    record = controller.update(10)
    assert record.stderr["law"] == pytest.approx(1.0) and record.gamma["law"] == pytest.approx(0.25)


def test_noise_of_the_reference_counts_too():
    # as above, but the reference has an error of 0.75: sqrt(1 + 0.75^2) = 1.25; (2 - 1 - 0.5 * 1.25) / 2
    noisy = DomainSums.from_samples([0, 0, 1, 1, 2, 2], [30.0, 10.0, 9.0, 9.0, 9.0, 9.0], [10] * 6, 3)
    reference = ReferenceLosses(np.ones(3), np.array([0.75, 0.0, 0.0]))
    weights = Weights(strategy="fostering", reference=REFERENCE, every_n_steps=10, noise_z=0.5)
    controller = WeightController(DomainTable(NAMES), Domains(names=NAMES), weights, reference)
    controller.observe(noisy)
    assert controller.update(10).gamma["law"] == pytest.approx(0.1875)


def test_an_absent_domain_keeps_the_standard_error_of_its_loss():
    controller = controller_of(noise_z=0.5)
    noisy = [30.0, 10.0, 9.0, 9.0, 9.0, 9.0]  # law: l = 2, se = 1
    controller.observe(DomainSums.from_samples([0, 0, 1, 1, 2, 2], noisy, [10] * 6, 3))
    gamma = controller.update(10).gamma["law"]
    # one sample of law is too few for a standard error; its loss and what is known of it stand
    controller.observe(DomainSums.from_samples([0, 1, 1, 2, 2], [70.0, *noisy[2:]], [10] * 5, 3))
    record = controller.update(20)
    assert record.losses["law"] == 2.0 and record.stderr["law"] == pytest.approx(1.0)
    assert record.gamma["law"] == gamma == pytest.approx(0.25)
    # l = 4.8, se = 1 against 2, 1: phi = (2.8 - 0.5 sqrt(2)) / 2
    controller.observe(DomainSums.from_samples([0, 0, 1, 1, 2, 2], [58.0, 38.0, *noisy[2:]], [10] * 6, 3))
    assert controller.update(30).phi["law"] == pytest.approx((2.8 - 0.5 * math.sqrt(2)) / 2)


def test_probe_losses_replace_the_window():
    controller = controller_of(loss_source="probe")
    controller.observe(sums([9.0, 9.0, 9.0]))
    assert controller.needs_probe
    with pytest.raises(ValueError, match="probe sums missing"):
        controller.update(10)
    record = controller.update(10, sums([2.0, 1.0, 1.0]))
    assert record.losses["law"] == 2.0 and record.loss_source == "probe"
    with pytest.raises(ValueError, match="unexpected"):
        controller_of().update(10, sums([2.0, 1.0, 1.0]))


def test_shadow_computes_and_does_not_apply():
    shadow, live = controller_of(shadow=True), controller_of()
    for controller in (shadow, live):
        controller.observe(sums([2.0, 1.0, 4.0]))
    record = shadow.update(10)
    assert record.after == live.update(10).after and not record.applied
    np.testing.assert_array_equal(shadow.weights, [1 / 3] * 3)
    shadow.observe(sums([3.0, 1.0, 4.0]))
    assert shadow.update(20).phi["law"] == 0.5  # the losses move on


def test_expansion_gate_is_recorded():
    controller = controller_of("expansion", target="law", delta=0.06)
    controller.observe(sums([2.0, 2.0, 2.0]))
    record = controller.update(10)  # no phi yet: open; 1/3 + 0.06, the others share the rest
    assert record.gate_open is True and record.after["law"] == pytest.approx(1 / 3 + 0.06)
    controller.observe(sums([1.25, 4.0, 2.0]))
    record = controller.update(20)  # gamma of law 0.2; phi 1 and 0, mean 0.5: closed
    assert record.gate_open is False and record.after["law"] == record.before["law"]
    assert "gate closed: mean phi of the others 0.5 > 0.2" in record.reasons


@pytest.mark.parametrize(
    ("noise_z", "phi", "is_open"), [(0.0, 0.2, False), (0.1, 0.1292893, False), (1.0, 0.0, True)]
)
def test_a_rise_within_its_noise_does_not_close_the_gate(noise_z, phi, is_open):
    # code: 40 nats, then 48, on two samples of 10 tokens: l = 2 and 2.4, se = 1 each (as above), of the
    # difference sqrt(2): phi = (0.4 - z sqrt(2)) / 2; mean over code and other phi / 2 against 0.1 * 0.5
    controller = controller_of("expansion", target="law", epsilon=0.1, noise_z=noise_z)
    for step, (first, second) in ((10, (30.0, 10.0)), (20, (34.0, 14.0))):
        nats = [20.0, 20.0, first, second, 20.0, 20.0]
        controller.observe(DomainSums.from_samples([0, 0, 1, 1, 2, 2], nats, [10] * 6, 3))
        record = controller.update(step)
    assert record.gamma["law"] == 0.5 and record.phi["code"] == pytest.approx(phi, abs=1e-6)
    assert record.gate_open is is_open


def test_an_update_within_its_noise_is_refused_and_its_window_goes_on():
    # raw_loss from 1/3 each; losses 2, 1, 1 nats, of law with se = 1 (as above), of the others without error.
    # law becomes e / (e + 2) = 0.576; at 2 +- 1 nats e^2 / (e^2 + 2) = 0.787 and 1/3: moves 0.243, se 0.227
    noisy = DomainSums.from_samples([0, 0, 1, 1, 2, 2], [30.0, 10.0, 10.0, 10.0, 10.0, 10.0], [10] * 6, 3)
    for update_z, after in ((0.0, 0.5761169), (1.05, 0.5761169), (1.1, 1 / 3)):
        controller = controller_of("raw_loss", update_z=update_z)
        controller.observe(noisy)
        record = controller.update(10)
        assert record.after["law"] == controller.weights[0] == pytest.approx(after, abs=1e-6)
        refused = [reason for reason in record.reasons if reason.startswith("refused as noise")]
        assert bool(refused) == (update_z == 1.1)
    # the others lose half of that each: lengths sqrt(1.5) times as large
    assert "the update is 0.2973 long, with a standard error of 0.2778" in refused[0]
    assert controller.window == noisy and controller.state()["losses"] == [None] * 3
    resumed = controller_of("raw_loss", update_z=1.1)
    resumed.load_state(json.loads(json.dumps(controller.state())))
    # twice the samples: se = 1 / sqrt(3), and the update is no longer noise
    for each in (controller, resumed):
        each.observe(noisy)
        assert each.update(20).after["law"] == pytest.approx(0.5761169, abs=1e-6)
        assert each.window == DomainSums.zeros(3) and each.state()["losses"] == [2.0, 1.0, 1.0]
    assert controller.state() == resumed.state()


def test_update_z_is_refused_where_no_losses_move_the_weights():
    with pytest.raises(ValueError, match="update_z has no effect: no losses move constant's"):
        Weights(strategy="constant", update_z=1.0)


def test_a_gate_that_noise_could_turn_is_refused():
    # open without earlier losses, whatever the noise; then code 2 -> 2.4, phi 0.2, mean 0.1 > 0.1 * 0.5:
    # closed, but open at 2.4 - 1: law would be larger by 0.05, and the others move less than that
    controller = controller_of("expansion", target="law", epsilon=0.1, update_z=1.0)
    nats = [20.0, 20.0, 30.0, 10.0, 20.0, 20.0]
    for step, code, opens in ((10, (30.0, 10.0), True), (20, (34.0, 14.0), False)):
        nats[2:4] = code
        controller.observe(DomainSums.from_samples([0, 0, 1, 1, 2, 2], nats, [10] * 6, 3))
        before = controller.weights
        record = controller.update(step)
        assert record.gate_open is opens
        assert (controller.weights != before).any() == opens, record.reasons


def test_limits_hold_and_are_explained():
    controller = controller_of("raw_loss", limits={"min_weight": 0.1, "max_relative_change": 0.5})
    for step in range(10, 100, 10):
        before = controller.weights
        controller.observe(sums([9.0, 1.0, 1.0]))
        record = controller.update(step)
        assert (np.abs(controller.weights - before) <= 0.5 * before * (1 + 1e-12)).all()
        assert any("changed the proposal" in reason for reason in record.reasons)
    np.testing.assert_allclose(controller.weights, [0.8, 0.1, 0.1], rtol=1e-14)
    assert sum(alarm.startswith("weight_at_floor") for alarm in record.alarms) == 2


def test_floor_holds_from_the_first_batch_and_step_zero_says_so():
    limits = {"initial": {"law": 0.9, "code": 0.06, "other": 0.04}, "min_weight": 0.05}
    controller = controller_of("constant", limits=limits)
    record = controller.initial_update()
    assert record.step == 0 and record.applied and record.before["other"] == 0.04
    assert record.after["other"] == 0.05 and list(record.after.values()) == controller.weights.tolist()
    assert any("other 0.04 -> 0.05" in reason for reason in record.reasons)
    controller.observe(sums([2.0, 3.0, 4.0]))
    assert controller.update(10).after == record.after


@pytest.mark.parametrize("strategy", ["uniform", "inverse", "constant"])
def test_static_strategies_record_losses_and_never_move(strategy):
    initial = {"law": 0.7, "code": 0.2, "other": 0.1}
    controller = controller_of(strategy, limits={"initial": initial}, reference=REFERENCE)
    before = controller.digest()
    controller.observe(sums([2.0, 3.0, 4.0]))
    record = controller.update(10)
    assert controller.digest() == before and record.gamma["law"] == 0.5 and record.alarms == []


def test_weights_that_no_losses_move_raise_no_alarms():
    alone = {"law": 1.0, "code": 0.0, "other": 0.0}
    schedule = [{"step": 7, "weights": alone}]
    for controller in (
        controller_of("constant", limits={"initial": alone}),
        controller_of("manual", schedule=schedule),
    ):
        controller.observe(sums([2.0, 3.0, 4.0]))
        record = controller.update(7)
        assert record.after == alone and record.alarms == []


def test_due_is_every_n_steps_and_for_manual_the_schedule():
    controller = controller_of(every_n_steps=4)
    assert [step for step in range(13) if controller.due(step)] == [4, 8, 12]
    manual = controller_of("manual", schedule=SCHEDULE)
    assert [step for step in range(13) if manual.due(step)] == [7]


def test_a_skipped_step_moves_no_weights_unless_they_are_scheduled():
    controller = controller_of(every_n_steps=4)
    assert not controller.due(4, skipped=True) and controller.due(8, skipped=False)
    assert controller_of("manual", schedule=SCHEDULE).due(7, skipped=True)


SCHEDULE = [
    {"step": 0, "weights": {"law": 0.5, "code": 0.3, "other": 0.2}},
    {"step": 7, "weights": {"law": 0.1, "code": 0.1, "other": 0.8}},
]


def test_manual_follows_its_schedule_without_losses_and_without_step_limit():
    controller = controller_of("manual", schedule=SCHEDULE, limits={"max_relative_change": 0.01})
    np.testing.assert_array_equal(controller.weights, [0.5, 0.3, 0.2])
    controller.update(7)
    np.testing.assert_array_equal(controller.weights, [0.1, 0.1, 0.8])
    with pytest.raises(ConfigError, match=r"step 7: other has weight 0\.8, outside"):
        controller_of("manual", schedule=SCHEDULE, limits={"max_weight": 0.6})


def run(controller: WeightController, steps, seed=0) -> list[dict]:
    """Feed random sums to `controller` in the order of calls of a run."""
    records = []
    for step in steps:
        rng = np.random.default_rng([seed, step])
        tokens = np.repeat(rng.integers(0, 2, 3) * rng.integers(1, 99), 2)  # two samples of a domain, or none
        losses = rng.uniform(0.5, 4, 6) * tokens
        controller.observe(DomainSums.from_samples([0, 0, 1, 1, 2, 2], losses, tokens, 3))
        if controller.due(step):
            records.append(controller.update(step).to_json())
    return records


@pytest.mark.parametrize("cut", [5, 10, 17])
@pytest.mark.parametrize("strategy", ["fostering", "expansion", "doremi", "raw_loss"])
def test_resumed_run_equals_the_uninterrupted_one(strategy, cut):
    """The resumed one was made with other initial weights: those of the state count, in alarms too."""
    limits = {"min_weight": 0.01, "initial": {"law": 0.1, "code": 0.2, "other": 0.7}}
    options = {"every_n_steps": 5, "target": "law", "noise_z": 0.25}
    whole, first = (controller_of(strategy, limits=limits, **options) for _ in range(2))
    second = controller_of(strategy, limits={"min_weight": 0.01}, **options)
    expected = run(whole, range(1, 31))
    got = run(first, range(1, cut + 1))
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    got += run(second, range(cut + 1, 31))
    assert json.dumps(got) == json.dumps(expected)
    assert any(loss for record in expected for loss in record["stderr"].values())
    assert second.digest() == whole.digest() and second.state() == whole.state()


def test_equal_inputs_give_equal_bits_and_the_digest_tells_others_apart():
    first, second, third = controller_of("raw_loss"), controller_of("raw_loss"), controller_of("raw_loss")
    assert run(first, range(1, 21)) == run(second, range(1, 21))
    assert first.digest() == second.digest()
    run(third, range(1, 21), seed=1)
    assert third.digest() != first.digest()


def test_state_of_something_else_is_refused_and_changes_nothing():
    controller = controller_of()
    run(controller, range(1, 13))
    state = controller.state()
    fresh = controller_of()
    for bad, text in (
        ({"version": 99}, "version 99"),
        ({"fingerprint": controller_of("raw_loss").state()["fingerprint"]}, "raw_loss.*fostering"),
        ({"weights": [0.5, 0.5]}, "damaged"),
        ({"weights": [0.5, 0.4, 0.2]}, "damaged"),
        ({"weights": [float("nan"), 0.5, 0.5]}, "damaged"),
        ({"window": {}}, "rows"),
        ({"window": DomainSums.zeros(2).to_json()}, "2 domains"),
        ({"losses": [1.0]}, "damaged"),
        ({"losses": "x"}, "damaged"),
    ):
        with pytest.raises(StateError, match=text):
            fresh.load_state({**state, **bad})
    with pytest.raises(StateError, match="damaged"):
        fresh.load_state({key: value for key, value in state.items() if key != "last_step"})
    assert fresh.state() == controller_of().state()


def test_wrong_calls_are_refused():
    controller = controller_of()
    controller.update(10)
    with pytest.raises(ValueError, match="steps must rise"):
        controller.update(10)
    with pytest.raises(ValueError, match="2 domains"):
        controller.observe(DomainSums.zeros(2))
    with pytest.raises(ValueError, match="must be skipped"):
        controller.observe(np.full((6, 3), np.nan))


def test_construction_refuses_what_cannot_work(tmp_path):
    table, domains = DomainTable(NAMES), Domains(names=NAMES)
    with pytest.raises(ConfigError, match="needs reference losses"):
        WeightController(table, domains, Weights(strategy="fostering", reference=REFERENCE), None)
    with pytest.raises(ConfigError, match="unknown domain 'math'"):
        controller_of("expansion", target="math")
    with pytest.raises(DataError, match="no such file"):
        controller_of("manual", schedule=tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("key", "reference", "losses"),
    [
        ("gamma_spread", {}, [2.0, 2.01, 2.005]),  # gamma 0.500 .. 0.5025
        ("reference_near_zero", {"law": 0.0006}, [2.0, 3.0, 4.0]),
        ("reference_reached", {"code": 3.0}, [2.0, 3.0, 4.0]),
    ],
)
def test_reference_alarms(key, reference, losses):
    def keys(controller):
        controller.observe(sums(losses))
        return {alarm.split(":")[0] for alarm in controller.update(10).alarms}

    assert key in keys(controller_of(reference=REFERENCE | reference))
    losses = [2.0, 3.0, 4.0]
    assert keys(controller_of()) == set()


def test_collapse_raises_alarms():
    controller = controller_of("raw_loss")
    controller.observe(sums([30.0, 1.0, 1.0]))
    keys = [alarm.split(":")[0] for alarm in controller.update(10).alarms]
    assert keys == ["weight_at_cap", "weight_at_floor", "weight_at_floor", "low_entropy"]


three_losses = st.lists(st.floats(0, 1e6), min_size=3, max_size=3)
three_counts = st.lists(st.integers(0, 3), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from(["constant", "fostering", "expansion", "doremi", "raw_loss"]),
    windows=st.lists(st.tuples(three_losses, three_counts), max_size=6),
    noise_z=st.sampled_from([0.0, 2.0]),
    change=st.sampled_from([None, 0.1, 2.0]),
    floor=st.sampled_from([0.0, 0.2]),
)
def test_nothing_makes_nan(strategy, windows, noise_z, change, floor):
    limits = {"min_weight": floor, "max_relative_change": change}
    controller = controller_of(strategy, target="code", noise_z=noise_z, limits=limits)
    for index, (losses, tokens) in enumerate(windows, start=1):
        controller.observe(sums(losses, tokens=[2 * t for t in tokens]))
        record = controller.update(index)
        json.dumps(record.to_json(), allow_nan=False)
        json.dumps(controller.state(), allow_nan=False)
        assert math.fsum(controller.weights) == pytest.approx(1.0, abs=1e-12)
        assert (controller.weights >= floor).all()
