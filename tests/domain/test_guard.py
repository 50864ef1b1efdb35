"""The guard: rises by hand, who is held and who comes back, what the weights are then, and its state."""

import json
import math

import numpy as np
import pytest

from versatune_ds.config.weights import Domains, Guard, Weights
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.probes.guard import OverfitGuard, without
from versatune_ds.domain.probes.samples import SampleLosses, rise_of
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import StateError

NAMES = ["law", "code", "other"]
TOKENS = [np.array([10.0, 10.0])] * 3


def probe(law, code=(20.0, 20.0), other=(20.0, 20.0)) -> SampleLosses:
    """Two samples a domain, of 10 tokens each; given are their summed losses."""
    return SampleLosses([np.array(values, dtype=float) for values in (law, code, other)], TOKENS)


def trained_on(*losses) -> DomainSums:
    """Two training samples of 10 tokens in each domain, 0.1 nats a token below and above its mean loss; none
    of a domain without."""
    samples = [(j, 10 * (loss + side)) for j, loss in enumerate(losses) if loss for side in (-0.1, 0.1)]
    ids, sums = zip(*samples, strict=True)
    return DomainSums.from_samples(ids, sums, [10] * len(ids), len(losses))


class Learning(WeightController):
    """Each window's training losses are a nat a token below the last one's, if a test observes no others."""

    def update(self, step, probe=None):
        if not self.window.tokens.any():
            self.observe(trained_on(*[9.0 - step / 10] * len(NAMES)))
        return super().update(step, probe)


def controller_of(strategy="constant", **options) -> WeightController:
    given = {"every_n_steps": 10, "guard": Guard(probes=2, noise_z=2.0)} | options
    initial = {"law": 0.5, "code": 0.3, "other": 0.2}
    return Learning(
        DomainTable(NAMES), Domains(names=NAMES, initial=initial), Weights(strategy=strategy, **given)
    )


def test_a_rise_by_hand():
    # d = 3, 1 and 0 on 10, 10 and 0 tokens (that sample does not count): r = 4 / 20 = 0.2;
    # residuals 1, -1; n / (n - 1) = 2: se = sqrt(2 * 2) / 20 = 0.1
    now, then = np.array([23.0, 11.0, 0.0]), np.array([20.0, 10.0, 0.0])
    rise = rise_of(now, then, np.array([10, 10, 0]))
    assert rise == pytest.approx((0.2, 0.1))
    assert rise.beyond(1.9) and not rise.beyond(2.1)
    # unequal samples: d = 4, 1 on 30, 10: r = 0.125; residuals 0.25, -0.25: sqrt(2 * 0.125) / 40
    rise = rise_of(np.array([4.0, 1.0]), np.zeros(2), np.array([30, 10]))
    assert rise == pytest.approx((0.125, 0.0125))
    assert not rise_of(np.array([9.0]), np.zeros(1), np.array([10])).beyond(0.0)  # no error known
    assert math.isnan(rise_of(np.zeros(0), np.zeros(0), np.zeros(0)).value)


def test_the_share_of_a_held_domain_goes_to_the_others_in_proportion():
    limits = {"min_weight": 0.0, "max_weight": 1.0}
    law = np.array([True, False, False])
    weights = np.array([0.5, 0.3, 0.2])
    np.testing.assert_allclose(without(weights, law, **limits), [0.0, 0.6, 0.4], rtol=1e-15)
    # a floor stays with it: 0.1, and 0.9 shared as 3 : 2
    floor = without(weights, law, min_weight=0.1, max_weight=1.0)
    np.testing.assert_allclose(floor, [0.1, 0.54, 0.36], rtol=1e-15)
    # code may not pass its cap of 0.5: other takes the rest
    np.testing.assert_allclose(without(weights, law, min_weight=0.0, max_weight=0.5), [0, 0.5, 0.5])
    # nobody is left to take it
    for held in (np.ones(3, bool), np.zeros(3, bool)):
        np.testing.assert_array_equal(without(weights, held, **limits), weights)
    only_law = np.array([1.0, 0.0, 0.0])
    np.testing.assert_array_equal(without(only_law, law, **limits), only_law)


def test_it_holds_after_n_risen_probes_and_lets_go():
    controller = controller_of()
    # law: 40 nats at its best; d = 3, 1 then 4, 2: r = 0.2 (se 0.1) and 0.3 (se 0.1)
    told = [controller.update(step, probe(law)) for step, law in ((10, (20, 20)), (20, (24, 22.5)))]
    # training losses 8 and 7, each with an error of sqrt(2 * 2) / 20 = 0.1
    seen = {"training_fall": 0.0, "training_fall_stderr": math.sqrt(0.02), "probes": 0, "best_step": 10}
    assert told[0].guard["law"] == pytest.approx({"held": False, "rise": 0.0, "stderr": 0.0, **seen})
    assert told[1].guard["law"]["probes"] == 1 and told[1].alarms == []
    np.testing.assert_array_equal(controller.weights, [0.5, 0.3, 0.2])
    record = controller.update(30, probe((24, 23)))  # r = 7 / 20, residuals 0.5: se sqrt(2 * 0.5) / 20
    seen |= {"training_fall": 2.0, "probes": 2}
    assert record.guard["law"] == pytest.approx({"held": True, "rise": 0.35, "stderr": 0.05, **seen})
    (alarm,) = record.alarms
    assert (
        alarm.startswith("overfitting: law is 0.35 nats (standard error 0.05) above") and "step 10" in alarm
    )
    assert "its training loss has fallen by 2 since" in alarm
    np.testing.assert_allclose(controller.weights, [0.0, 0.6, 0.4], rtol=1e-15)
    assert record.before == {"law": 0.5, "code": 0.3, "other": 0.2} and record.after["code"] == 0.6
    # still risen, and not higher than when it was held: stays
    assert controller.update(40, probe((24, 23))).guard["law"]["held"]
    # 1 nat above its best in one sample: r = 0.05, se 0.05: noise
    record = controller.update(50, probe((21, 20)))
    assert "law comes back: no longer above its lowest loss beyond noise" in record.reasons
    np.testing.assert_array_equal(controller.weights, [0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("losses", "is_held"),
    [
        ((5, 4.5, 4.5), True),  # falls by 0.5, error sqrt(0.02) = 0.14
        ((5, 4.8, 4.8), False),  # by 0.2: within two errors
        ((5, 5.5, 6), False),  # law is disturbed by others, or lacks training
        ((None, 5, 4.5, 4), True),  # from the first window on in which it was trained at all
        ((5, None, None), False),
        ((5, 4.5, None, 4), True),  # a window without it says nothing
        ((5, 4.5, 5.5, 4), False),
    ],
)
def test_a_domain_whose_training_loss_has_not_fallen_is_not_overfitted(losses, is_held):
    controller = controller_of()
    for step, loss in enumerate(losses, start=1):
        controller.observe(trained_on(loss, 4.0, 4.0))
        record = controller.update(10 * step, probe((20, 20) if step == 1 else (24, 23)))
    assert record.guard["law"]["rise"] == pytest.approx(0.35) and record.guard["law"]["held"] == is_held


def test_a_held_domain_that_is_forgotten_comes_back():
    controller = controller_of()
    for step, law in ((10, (20, 20)), (20, (24, 23)), (30, (24, 23))):
        controller.update(step, probe(law))
    assert controller.weights[0] == 0.0
    # since it was held: d = 3, 2.5: r = 0.275, se = sqrt(2 * 0.125) / 20 = 0.025
    record = controller.update(40, probe((27, 25.5)))
    assert "law comes back: 0.275 nats (standard error 0.025) higher since it was held" in record.reasons
    assert record.guard["law"]["probes"] == 0 and controller.weights[0] == 0.5


def test_a_rise_within_noise_or_interrupted_holds_nobody():
    controller = controller_of()
    # d = 8, 0: r = 0.4, se 0.4; then twice a clear rise with a probe at the best loss between them
    for step, law in enumerate([(20, 20), (28, 20), (28, 20), (24, 23), (20, 20), (24, 23)], start=1):
        record = controller.update(10 * step, probe(law))
        assert not record.guard["law"]["held"], step
    assert record.guard["law"]["probes"] == 1


def test_with_all_domains_overfitted_the_weights_stand_and_it_is_said():
    controller = controller_of(guard=Guard(probes=1))
    controller.update(10, probe((20, 20)))
    record = controller.update(20, probe((24, 23), (24, 23), (24, 23)))
    assert len(record.alarms) == 3 and any("every domain with a share" in r for r in record.reasons)
    np.testing.assert_array_equal(controller.weights, [0.5, 0.3, 0.2])


def test_the_strategy_moves_on_under_the_guard_and_gets_its_domain_back():
    """raw_loss goes on re-weighting all domains; what the guard holds back is only not in force."""
    options = {"loss_source": "probe", "guard": Guard(probes=1)}
    guarded, free = controller_of("raw_loss", **options), controller_of("raw_loss", loss_source="probe")
    for step, law in ((10, (20, 20)), (20, (24, 23)), (30, (20, 20))):
        record = guarded.update(step, probe(law))
        free.update(step, probe(law))
        assert (guarded.weights[0] == 0.0) == (step == 20)
        assert record.after == dict(zip(NAMES, guarded.weights.tolist(), strict=True))
    np.testing.assert_array_equal(guarded.weights, free.weights)


def test_a_schedule_is_guarded_between_its_steps():
    schedule = [{"step": 25, "weights": {"law": 0.2, "code": 0.4, "other": 0.4}}]
    controller = controller_of("manual", schedule=schedule, guard=Guard(probes=1))
    assert [step for step in range(31) if controller.due(step)] == [10, 20, 25, 30]
    controller.update(10, probe((20, 20)))
    controller.update(20, probe((24, 23)))
    assert controller.weights[0] == 0.0
    controller.update(25, probe((20, 20)))
    np.testing.assert_array_equal(controller.weights, [0.2, 0.4, 0.4])


def test_it_says_where_to_go_back_to_and_what_to_keep_for_that():
    controller = controller_of(guard=Guard(probes=2, go_back=True))
    best, risen = (20, 20), (24, 23)
    controller.update(10, probe(best, code=(21, 21)))
    assert controller.kept_steps == {10} and controller.back_to(10) is None
    controller.update(20, probe(risen))  # code is better than at 10, other as good
    assert controller.kept_steps == {10, 20}
    assert controller.update(30, probe(risen)).guard["law"]["held"]
    assert controller.back_to(30) == 10 and controller.back_to(31) is None
    # what the others were at their best is gone with the steps since
    assert controller.kept_steps == set()
    record = controller.update(40, probe(best, code=(21, 21)))
    assert record.guard["law"]["held"] and controller.weights[0] == 0.0  # low because the model went back
    assert record.guard["code"]["best_step"] == 40
    assert controller.back_to(40) is None and controller.kept_steps == {40}
    # forgotten since: it comes back, and is looked at anew
    record = controller.update(50, probe(risen))
    assert any(reason.startswith("law comes back: ") for reason in record.reasons)
    assert controller.update(60, probe(risen)).guard["law"]["best_step"] == 60


def test_in_shadow_mode_it_only_tells():
    controller = controller_of(shadow=True, guard=Guard(probes=1))
    controller.update(10, probe((20, 20)))
    record = controller.update(20, probe((24, 23)))
    assert record.after["law"] == 0.0 and not record.applied and controller.weights[0] == 0.5


def test_a_resumed_guard_goes_on_exactly():
    whole, first = controller_of(), controller_of()
    losses = [(20, 20), (24, 23), (24.1, 23.3), (24, 23), (20, 20)]
    for step, law in enumerate(losses, start=1):
        expected = whole.update(10 * step, probe(law)).to_json()
        resumed = controller_of()
        resumed.load_state(json.loads(json.dumps(first.state())))
        assert resumed.update(10 * step, probe(law)).to_json() == expected
        first = resumed
        assert resumed.digest() == whole.digest() and json.dumps(expected)


def test_state_without_guard_and_damaged_state():
    plain = controller_of(guard=None)
    assert "guard" not in plain.state() and "guard" not in plain.update(10).to_json()
    guarded = controller_of()
    guarded.load_state(plain.state())  # begins to watch now
    assert guarded.update(20, probe((20, 20))).guard["law"]["best_step"] == 20
    fresh = OverfitGuard(NAMES, Guard()).state()
    for damage in ({"risen": [0]}, {"best": None}, {"trained": [[1.0, 0.1]]}, {"trained": [[1.0]] * 3}):
        with pytest.raises(StateError, match=r"weights\.guard"):
            OverfitGuard(NAMES, Guard()).load_state(fresh | damage)
    del fresh["trained"]  # as version 0.1 wrote it
    OverfitGuard(NAMES, Guard()).load_state(fresh)


def test_other_samples_than_before_are_refused():
    guard = OverfitGuard(["law"], Guard())
    guard.observe(1, SampleLosses([np.ones(2)], [np.ones(2)]), DomainSums.zeros(1))
    with pytest.raises(StateError, match=r"law: a probe of 3 held-out samples after one of 2.*probe_samples"):
        guard.observe(2, SampleLosses([np.ones(3)], [np.ones(3)]), DomainSums.zeros(1))
