"""What a budget pays for, the first mixtures, and the bounds that all keep."""

import numpy as np
import pytest

from versatune_ds.apps.search.bounds import Bounds
from versatune_ds.apps.search.design import count, draw, first_points, round_size, rounded
from versatune_ds.config.weights import Domains
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.foundations.errors import ConfigError


def test_proxies_cost_their_tokens_and_two_evaluations_and_two_runs_check():
    # a run: 1000 tokens and 2 x 300 held-out ones at a third, 1200; 12000 pay for ten, two of them checks
    found = count("proxies", 12_500, 2, 1000, 300)
    assert (found.singles, found.points, found.checks, found.tokens) == (0, 8, 2, 12_000)
    assert found.total == 10


def test_adapters_are_trained_once_and_what_is_left_evaluates():
    # 2 adapters and 2 checks of 1200; an evaluation costs 100
    found = count("adapters", 5_650, 2, 1000, 300)
    assert (found.singles, found.points, found.checks, found.tokens) == (2, 8, 2, 5_600)
    assert count("adapters", 10**6, 2, 1000, 300).points == 20


@pytest.mark.parametrize(("way", "needed"), [("proxies", "8,400"), ("adapters", "5,300")])
def test_a_budget_without_a_surface_is_refused_with_what_it_takes(way, needed):
    with pytest.raises(ConfigError, match=f"needs? {needed}|need {needed}"):
        count(way, int(needed.replace(",", "")) - 1, 2, 1000, 300)
    assert count(way, int(needed.replace(",", "")), 2, 1000, 300).points == 5


def test_half_of_the_mixtures_come_first_and_the_rest_in_even_rounds():
    sizes, done = [], 0
    while done < 15:
        sizes.append(round_size(done, 15, 3))
        done += sizes[-1]
    assert sizes == [8, 3, 3, 1]  # 7 / 3 rounded up
    assert round_size(0, 5, 1) == 3 and round_size(3, 5, 1) == 2


def test_the_first_mixtures_are_start_uniform_and_drawn_around_both():
    start = np.array([0.7, 0.2, 0.1])
    points = first_points(start, 200, lambda w: w, 3)
    np.testing.assert_array_equal(points[0], start)
    np.testing.assert_allclose(points[1], [0.3334, 0.3333, 0.3333])
    around_start, around_uniform = np.mean(points[2::2], axis=0), np.mean(points[3::2], axis=0)
    np.testing.assert_allclose(around_start, start, atol=0.06)  # se of a share: 0.02 to 0.03
    np.testing.assert_allclose(around_uniform, 1 / 3, atol=0.08)
    assert all(abs(p.sum() - 1) < 1e-12 and (p >= 0).all() for p in points)
    again = first_points(start, 200, lambda w: w, 3)
    np.testing.assert_array_equal(points, again)


def test_a_uniform_start_is_tried_once():
    points = first_points(np.full(4, 0.25), 6, lambda w: w, 3)
    assert len({tuple(point) for point in points}) == len(points) == 6
    assert points[0].tolist() == [0.25] * 4


def test_a_domain_without_a_share_is_tried_too():
    drawn = draw([np.array([1.0, 0.0])], 50, 2.0, lambda w: w, np.random.default_rng(0))
    assert max(p[1] for p in drawn) > 0.01


def test_rounding_keeps_the_sum():
    assert rounded(np.array([1 / 3, 1 / 3, 1 / 3])).tolist() == [0.3334, 0.3333, 0.3333]
    assert rounded(np.array([0.00004, 0.99996])).tolist() == [0.0, 1.0]


def bounds(unit: str, steps: int = 10, **domains) -> Bounds:
    """Domain a: 20 samples of 10 tokens, b: 50 of 30; a step is 100 tokens."""
    lengths = [np.full(20, 10, np.int32), np.full(50, 30, np.int32)]
    corpus = Corpus(lengths, [np.full(20, 5, np.int32), np.full(50, 5, np.int32)], ("a", "b"))
    limit = domains.pop("max_epochs", None)
    planner = PlannerSettings(
        pack_len=50, packs_per_step=2, weight_unit=unit, seed=0, max_epochs=(limit, None) if limit else ()
    )
    return Bounds.of(Domains(names=["a", "b"], weight_unit=unit, **domains), corpus, planner, steps)


@pytest.mark.parametrize(
    ("unit", "a", "b"),
    [
        ("tokens", 2.5, 500 / 1500),  # 500 tokens of each
        ("samples", 25 / 20, 25 / 50),  # 25 samples of each: 25 x 10 + 25 x 30 = 1000
        ("supervised_tokens", 25 / 20, 25 / 50),  # samples of both have 5 of them
    ],
)
def test_passes_of_an_even_mixture_by_hand(unit, a, b):
    np.testing.assert_allclose(bounds(unit).passes(np.array([0.5, 0.5])), [a, b])


def test_a_cap_on_passes_is_a_cap_on_the_share():
    # a has 200 tokens, of 1000 twice is 0.4
    capped = bounds("tokens", max_epochs=2.0).nearest(np.array([0.5, 0.5]))
    np.testing.assert_allclose(capped, [0.4, 0.6])
    # 20 samples once: 20 x 10 + n x 30 = 1000, so n = 26.67 and the share is 20 / 46.67
    capped = bounds("samples", max_epochs=1.0).nearest(np.array([0.9, 0.1]))
    np.testing.assert_allclose(capped, [3 / 7, 4 / 7], atol=1e-6)
    assert bounds("samples", max_epochs=1.0).passes(capped)[0] == pytest.approx(1.0, abs=1e-6)


def test_floor_and_cap_hold_and_what_is_within_stays():
    found = bounds("tokens", min_weight=0.1, max_weight=0.9)
    np.testing.assert_allclose(found.nearest(np.array([0.0, 1.0])), [0.1, 0.9])
    np.testing.assert_array_equal(found.nearest(np.array([0.3, 0.7])), [0.3, 0.7])


def test_data_that_do_not_last_are_refused():
    limited = {"a": 1.0, "b": 1.0}
    lengths = [np.full(20, 10, np.int32), np.full(50, 30, np.int32)]
    corpus = Corpus(lengths, lengths, ("a", "b"))
    planner = PlannerSettings(
        pack_len=50, packs_per_step=2, weight_unit="tokens", seed=0, max_epochs=tuple(limited.values())
    )
    with pytest.raises(ConfigError, match="lasts for 17 steps"):
        Bounds.of(Domains(names=["a", "b"]), corpus, planner, 18)
