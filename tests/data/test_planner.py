"""The planner: each sample once per pass, exact shares, short waits, resume, limits, refusals."""

import dataclasses
import itertools
import json
import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import content, random_corpus, random_weights, run

from versatune_ds.apps.bench.planner import raw_lengths
from versatune_ds.data.plan import order
from versatune_ds.data.plan import planner as planner_module
from versatune_ds.data.plan.balance import modelled_idle, quadratic_tokens, rank_packs
from versatune_ds.data.plan.corpus import WEIGHT_UNITS, Corpus, PlannerSettings, steps_per_epoch, token_supply
from versatune_ds.data.plan.planner import plan_step
from versatune_ds.data.plan.share_rules import ChairmanRule
from versatune_ds.data.plan.state import Carried, PlannerState, Totals
from versatune_ds.foundations.errors import StateError

CORPUS_FILES = ["law.jsonl", "medicine.jsonl", "finance.parquet", "science.jsonl", "code.json", "other.jsonl"]
UNEVEN = [0.05, 0.1, 0.15, 0.2, 0.2, 0.3]

fast = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)


# --- what a run of steps guarantees -----------------------------------------------------------------


@fast
@given(seeds, st.integers(1, 5), st.integers(1, 8), st.sampled_from(WEIGHT_UNITS))
def test_every_run_of_steps(seed: int, num_domains: int, packs: int, unit: str) -> None:
    rng = np.random.default_rng(seed)
    pack_len = int(rng.integers(8, 120))
    corpus = random_corpus(
        seed, rng.integers(1, 60, num_domains).tolist(), int(rng.integers(1, pack_len + 1))
    )
    settings = PlannerSettings(pack_len=pack_len, packs_per_step=packs, weight_unit=unit, seed=seed)
    weights = random_weights(seed, num_domains, 12)
    trained: Counter[tuple[int, int]] = Counter()
    drawn_before = np.zeros(num_domains)
    plans = run(corpus, settings, weights)
    assert [(plan.step, plan.state_after.step) for plan in plans] == [(s, s + 1) for s in range(12)]
    for plan, asked in zip(plans, weights, strict=True):
        state = plan.state_after
        # Drawn from exactly these weights, and never from a weight of 0.
        assert np.array_equal(plan.weights, asked)
        drawn = np.array(state.drawn.samples)
        assert not (drawn - drawn_before)[asked == 0].any()
        drawn_before = drawn
        # The step's packs: as many as set, none over capacity, none waited long, and they are well filled.
        assert plan.num_packs == packs
        assert all(0 < pack.length <= pack_len for pack in plan.packs)
        assert plan.max_wait_steps <= 2
        # Each sample once per pass: the carry-over is drawn and not trained.
        trained.update(pair for pack in content(plan) for pair in pack)
        seen = trained + Counter((c.domain, c.sample) for c in state.carry)
        for domain, size in enumerate(corpus.num_samples):
            counts = [seen[domain, sample] for sample in range(size)]
            assert set(counts) <= {state.passes[domain], state.passes[domain] + 1}
            assert sum(counts) == state.passes[domain] * size + state.positions[domain] == drawn[domain]
        # Totals are those of the samples.
        for name, values in [("tokens", corpus.lengths), ("supervised_tokens", corpus.supervised)]:
            per_domain = [0] * num_domains
            for (domain, sample), times in trained.items():
                per_domain[domain] += times * int(values[domain][sample])
            assert getattr(state.trained, name) == tuple(per_domain)
        real = sum(pack.length for pack in plan.packs)
        assert plan.tokens == real
        assert plan.efficiency == real / (packs * pack_len)
        assert plan.supervised_tokens == sum(
            int(corpus.supervised[domain][sample]) for pack in content(plan) for domain, sample in pack
        )


@fast
@given(seeds, st.integers(1, 4))
def test_no_sample_waits_longer_than_two_steps(seed: int, packs: int) -> None:
    """Lengths chosen to be awkward: just over a half, nearly full, tiny."""
    rng = np.random.default_rng(seed)
    awkward = np.array([51, 99, 100, 50, 34, 2, 1])
    lengths = [rng.choice(awkward, 40, p=rng.dirichlet(np.full(7, 0.4))).astype(np.int32) for _ in range(2)]
    settings = PlannerSettings(pack_len=100, packs_per_step=packs, seed=seed)
    plans = run(Corpus(lengths, lengths), settings, [np.array([0.5, 0.5])] * 25)
    assert max(plan.max_wait_steps for plan in plans) <= 2
    last = plans[-1].state_after
    assert all(last.step - 1 - carried.step <= 1 for carried in last.carry)


def test_the_oldest_carried_sample_is_placed_first() -> None:
    corpus = Corpus([np.array([60, 70, 80, 90], np.int32)], [np.full(4, 9, np.int32)])
    settings = PlannerSettings(pack_len=100, packs_per_step=1)
    state = dataclasses.replace(
        PlannerState.initial(1),
        step=5,
        positions=(3,),
        drawn=Totals((3,), (230,), (27,)),
        trained=Totals((1,), (100,), (9,)),
        carry=(Carried(0, 1, step=4), Carried(0, 0, step=3)),
    )
    plan = plan_step(corpus, settings, state, [1.0])
    assert content(plan) == [[(0, 0)]]
    assert plan.max_wait_steps == 2
    assert plan.state_after.carry == (Carried(0, 1, step=4),)


# --- shares -----------------------------------------------------------------------------------------


@fast
@given(seeds, st.integers(2, 20))
def test_every_draw_is_within_one_sample_of_its_target(seed: int, num_domains: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.maximum(rng.dirichlet(np.full(num_domains, 0.4)), 1e-4)
    weights = (weights / weights.sum()).tolist()
    rule = ChairmanRule(weights, [0.0] * num_domains)
    drawn = [0] * num_domains
    bound = 1 - 1 / (2 * num_domains - 2)
    for n in range(1, 400):
        domain = rule.pick()
        rule.add(domain, 1)
        drawn[domain] += 1
        errors = [weight * n - count for weight, count in zip(weights, drawn, strict=True)]
        assert max(map(abs, errors)) <= bound + 1e-9
        assert rule.credit() == pytest.approx(errors)


def test_shares_stay_exact_when_weights_change_every_step() -> None:
    rng = np.random.default_rng(0)
    corpus = random_corpus(0, [300] * 6, 40)
    settings = PlannerSettings(pack_len=512, packs_per_step=4)
    weights, target, state = np.full(6, 1 / 6), np.zeros(6), PlannerState.initial(6)
    for _ in range(60):
        weights = np.maximum(weights * np.exp(0.3 * rng.normal(size=6)), 0.01)
        weights = weights / weights.sum()
        plan = plan_step(corpus, settings, state, weights)
        state = plan.state_after
        target += weights * sum(plan.drawn.samples)
        assert np.abs(target - state.drawn.samples).max() < 1
        assert np.allclose(target - state.drawn.samples, state.credit)
        assert np.allclose(plan.target_shares, weights)


@fast
@given(seeds)
def test_share_errors_do_not_add_up_over_any_weight_changes(seed: int) -> None:
    """Zero weights come and go, which no online rule can follow within one sample; two is never reached."""
    corpus = random_corpus(seed, [50] * 6, 40)
    settings = PlannerSettings(pack_len=256, packs_per_step=4)
    for plan in run(corpus, settings, random_weights(seed, 6, 40)):
        assert max(map(abs, plan.state_after.credit)) < 2


@pytest.mark.parametrize("unit", ["tokens", "supervised_tokens"])
def test_shares_of_tokens_are_within_a_few_samples(unit: str) -> None:
    rng = np.random.default_rng(1)
    lengths = [rng.integers(1, scale, 500).astype(np.int32) for scale in (20, 200, 800)]
    corpus = Corpus(lengths, [(n + 2) // 3 for n in lengths])
    settings = PlannerSettings(pack_len=1024, packs_per_step=4, weight_unit=unit)
    weights = np.array([0.5, 0.3, 0.2])
    state = run(corpus, settings, [weights] * 30)[-1].state_after
    drawn = np.array(getattr(state.drawn, unit))
    assert np.abs(drawn - weights * drawn.sum()).max() <= 800
    assert np.allclose(weights * drawn.sum() - drawn, state.credit)
    assert np.abs(getattr(state.trained.shares(), unit) - weights).max() < 0.02


# --- the same plan, whatever runs it ----------------------------------------------------------------


def test_ranks_share_the_same_global_batch() -> None:
    corpus = random_corpus(3, [200] * 6, 60)
    settings = PlannerSettings(pack_len=256, packs_per_step=8)
    for plan in run(corpus, settings, [np.array(UNEVEN)] * 5):
        for world_size in (1, 2, 4):
            dealt = [pack for rank in range(world_size) for pack in rank_packs(plan.packs, rank, world_size)]
            assert sorted(map(id, dealt)) == sorted(map(id, plan.packs))


@fast
@given(seeds, st.sampled_from(WEIGHT_UNITS), st.integers(0, 9))
def test_a_run_resumed_from_json_equals_one_that_never_stopped(seed: int, unit: str, stop: int) -> None:
    corpus = random_corpus(seed, [30, 7, 90], 50)
    settings = PlannerSettings(pack_len=64, packs_per_step=3, weight_unit=unit, seed=seed)
    weights = random_weights(seed, 3, 10)
    whole = run(corpus, settings, weights)
    state = whole[stop].state_after
    restored = PlannerState.from_json(json.loads(json.dumps(state.to_json())))
    assert restored == state
    resumed = run(corpus, settings, weights[stop + 1 :], restored)
    assert [content(p) for p in resumed] == [content(p) for p in whole[stop + 1 :]]
    if resumed:
        assert resumed[-1].state_after == whole[-1].state_after


def test_planning_changes_none_of_its_arguments() -> None:
    corpus = random_corpus(0, [40, 40], 30)
    settings = PlannerSettings(pack_len=64, packs_per_step=2)
    weights = np.array([0.25, 0.75])
    state = run(corpus, settings, [weights] * 2)[-1].state_after
    first, second = (plan_step(corpus, settings, state, weights) for _ in range(2))
    assert content(first) == content(second) and first.state_after == second.state_after
    weights[:] = 0.5
    assert first.weights.tolist() == [0.25, 0.75]


def equal_lengths(*sizes: int) -> Corpus:
    """Every sample has 10 tokens: what is drawn in a step fills its packs, and nothing is carried over."""
    lengths = [np.full(size, 10, np.int32) for size in sizes]
    return Corpus(lengths, lengths)


def test_seeds_and_passes_have_their_own_order() -> None:
    orders = []
    for seed in (0, 1):
        settings = PlannerSettings(pack_len=200, packs_per_step=1, seed=seed)
        plans = run(equal_lengths(100), settings, [np.array([1.0])] * 10)
        drawn = [{sample for _, sample in content(plan)[0]} for plan in plans]
        assert set.union(*drawn[:5]) == set.union(*drawn[5:]) == set(range(100))  # two passes of five steps
        orders += [drawn[:5], drawn[5:]]
    assert all(one[0] != other[0] for one, other in itertools.combinations(orders, 2))


def test_the_order_of_a_domain_is_its_own() -> None:
    """Domains of one size are not gone through in the same order."""
    settings = PlannerSettings(pack_len=400, packs_per_step=1)
    (plan,) = run(equal_lengths(50, 50), settings, [np.array([0.5, 0.5])])
    drawn = [{sample for domain, sample in content(plan)[0] if domain == d} for d in (0, 1)]
    assert len(drawn[0]) == len(drawn[1]) == 20 and drawn[0] != drawn[1]


def test_a_fraction_of_an_epoch_is_a_whole_number_of_samples() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    corpus = random_corpus(0, [100, 7], 30)
    settings = PlannerSettings(pack_len=64, packs_per_step=1, max_epochs=(0.29, None))
    assert settings.draw_limits(corpus) == (29, math.inf)


def test_the_plan_does_not_depend_on_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = random_corpus(0, [40, 200], 30)
    settings = PlannerSettings(pack_len=128, packs_per_step=4)
    weights = [np.array([0.5, 0.5])] * 6
    expected = [content(plan) for plan in run(corpus, settings, weights)]
    monkeypatch.setattr(order, "BLOCK_SAMPLES", 16)
    monkeypatch.setattr(planner_module, "FIRST_LOOKUP_SAMPLES", 3)
    order._block.cache_clear()
    assert [content(plan) for plan in run(corpus, settings, weights)] == expected
    order._block.cache_clear()


def test_memory_does_not_grow_with_the_corpus() -> None:
    size = 10**8
    lengths = np.broadcast_to(np.int32(100), size)  # stands for a memory-mapped file
    corpus = Corpus([lengths], [lengths], fingerprints=("big",))
    settings = PlannerSettings(pack_len=8192, packs_per_step=8)
    tracemalloc.start()
    plans = run(corpus, settings, [np.array([1.0])] * 2)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plans[-1].state_after.drawn.samples[0] > 1000
    assert peak_bytes < 8 * 2**20


# --- max_epochs -------------------------------------------------------------------------------------


def test_an_exhausted_domain_gives_its_share_to_the_others() -> None:
    corpus = random_corpus(0, [20, 500, 500], 20)
    settings = PlannerSettings(pack_len=100, packs_per_step=4, max_epochs=(1.5, None, None))
    plans = run(corpus, settings, [np.array([0.5, 0.4, 0.1])] * 20)
    final = plans[-1].state_after
    assert final.drawn.samples[0] == 30
    first = next(plan for plan in plans if plan.exhausted)
    assert first.exhausted == (0,) and first.drawn.samples[0] > 0
    assert first.efficiency > 0.95  # the others fill the step
    assert first.target_shares[0] < 0.5 and first.target_shares.sum() == pytest.approx(1)
    for plan in plans[first.step + 1 :]:
        assert plan.drawn.samples[0] == 0
        assert plan.target_shares.tolist() == pytest.approx([0, 0.8, 0.2])
    assert max(map(abs, final.credit)) < 1


@fast
@given(seeds, st.sampled_from(WEIGHT_UNITS))
def test_limited_data_is_used_up_completely_and_no_further(seed: int, unit: str) -> None:
    corpus = random_corpus(seed, [11, 30, 5], 30)
    settings = PlannerSettings(
        pack_len=40, packs_per_step=2, weight_unit=unit, seed=seed, max_epochs=(2.0, 1.0, 0.4)
    )
    state, trained = PlannerState.initial(3), Counter()
    with pytest.raises(StateError) as stopped:
        while True:
            plan = plan_step(corpus, settings, state, [0.2, 0.3, 0.5])
            state = plan.state_after
            trained.update(pair for pack in content(plan) for pair in pack)
    assert f"step {state.step} cannot be planned" in str(stopped.value)
    assert "d0 (2), d1 (1), d2 (0.4)" in str(stopped.value)
    assert state.trained.samples == state.drawn.samples == (22, 30, 2)
    assert all(trained[0, i] == 2 for i in range(11)) and all(trained[1, i] == 1 for i in range(30))
    assert settings.draw_limits(corpus) == state.drawn.samples
    # The cure that the message names works: more epochs, same state.
    more = dataclasses.replace(settings, max_epochs=(3.0, 1.0, 0.4))
    assert plan_step(corpus, more, state, [0.2, 0.3, 0.5]).drawn.samples[0] > 0


def test_supply_counts_what_can_be_trained_on() -> None:
    corpus = Corpus([np.full(10, 50, np.int32), np.full(20, 10, np.int32)], [np.ones(10), np.ones(20)])
    settings = PlannerSettings(pack_len=100, packs_per_step=2, max_epochs=(3.0, None))
    assert settings.draw_limits(corpus) == (30, math.inf)
    assert sum(token_supply(corpus, settings, [0.5, 0.5])) == math.inf
    assert token_supply(corpus, settings, [1.0, 0.0]) == (1500, 0)
    assert sum(token_supply(corpus, settings, [1.0, 0.0])) // settings.tokens_per_step == 7


def test_steps_per_epoch_with_and_without_packing() -> None:
    corpus = Corpus([np.full(10, 50, np.int32), np.full(20, 10, np.int32)], [np.ones(10), np.ones(20)])
    steps = steps_per_epoch(corpus, PlannerSettings(pack_len=100, packs_per_step=2))
    assert steps == (4, 15)  # 700 tokens in steps of 200; 30 samples in steps of 2


def test_a_corpus_over_caches_has_nothing_where_there_is_no_cache() -> None:
    class Cache:
        lengths = np.array([3, 4], np.int32)
        supervised = np.array([2, 3], np.int32)
        fingerprint = "abc"
        weight_sums = None

    corpus = Corpus.from_caches([None, Cache()], ["law", "code"])
    assert (corpus.names, corpus.fingerprints) == (("law", "code"), ("", "abc"))
    assert (corpus.num_samples, corpus.num_tokens, corpus.num_supervised) == ((0, 2), (0, 7), (0, 5))


def test_weights_of_tokens_change_the_normaliser_and_nothing_else() -> None:
    lengths = [np.full(8, 50, np.int32), np.full(9, 40, np.int32)]
    plain = Corpus(lengths, lengths)
    weighted = Corpus(lengths, lengths, weight_sums=[None, np.arange(9) / 10])
    settings = PlannerSettings(pack_len=200, packs_per_step=2)
    one, other = (plan_step(c, settings, PlannerState.initial(2), [0.5, 0.5]) for c in (plain, weighted))
    assert one.loss_weight == one.supervised_tokens
    packed = [(d, s) for pack in other.packs for d, s in zip(pack.domains, pack.samples, strict=True)]
    assert packed == [(d, s) for pack in one.packs for d, s in zip(pack.domains, pack.samples, strict=True)]
    assert other.loss_weight == pytest.approx(sum(s / 10 if d else 50 for d, s in packed))
    assert other.supervised_tokens == one.supervised_tokens != other.loss_weight


# --- the real corpus --------------------------------------------------------------------------------


def real_lengths(corpus_folder: Path) -> list[np.ndarray]:
    """Tokens of each row of each domain, 4 characters counted as one."""
    return [raw_lengths(corpus_folder / "train" / file) for file in CORPUS_FILES]


@pytest.mark.parametrize(
    ("pack_len", "packs", "efficiency"), [(8192, 8, 0.999), (8192, 64, 0.999), (32768, 8, 0.9995)]
)
def test_targets_on_real_lengths(corpus_folder: Path, pack_len: int, packs: int, efficiency: float) -> None:
    lengths = real_lengths(corpus_folder)
    corpus = Corpus(lengths, [n // 2 for n in lengths])
    settings = PlannerSettings(pack_len=pack_len, packs_per_step=packs)
    plans = run(corpus, settings, [np.array(UNEVEN)] * 30)
    assert np.mean([plan.efficiency for plan in plans]) >= efficiency
    assert max(plan.max_wait_steps for plan in plans) <= 2
    state = plans[-1].state_after
    assert max(map(abs, state.credit)) < 1
    assert np.abs(state.trained.shares().samples - UNEVEN).max() < 0.002


# --- idle time --------------------------------------------------------------------------------------


def long_tailed_lengths(domain: int) -> np.ndarray:
    """Log-normal: medians of 120 to 330 tokens, one in a hundred ten times as long, at most 8,192."""
    rng = np.random.default_rng(domain)
    return rng.lognormal(4.8 + 0.2 * domain, 1.0, 20_000).clip(8, 8192).astype(np.int32)


def mean_idle(lengths: list[np.ndarray]) -> float:
    """Modelled idle time of a 7B model on 64 ranks with one pack of 32,768 tokens each, over 20 steps."""
    corpus = Corpus(lengths, [n // 2 for n in lengths])
    plans = run(corpus, PlannerSettings(pack_len=32768, packs_per_step=64), [np.array(UNEVEN)] * 20)
    layers, hidden = 28, 3584
    length = quadratic_tokens(6_500_000_000, layers, hidden)
    return float(
        np.mean([modelled_idle(p.packs, 64, pack_len=32768, quadratic_tokens=length) for p in plans])
    )


def test_idle_time_of_64_ranks_on_long_tailed_lengths() -> None:
    lengths = [long_tailed_lengths(domain) for domain in range(6)]
    assert max(n.max() for n in lengths) == 8192
    assert mean_idle(lengths) <= 0.025


def test_idle_time_of_64_ranks_on_real_lengths(corpus_folder: Path) -> None:
    assert mean_idle(real_lengths(corpus_folder)) <= 0.025
