"""The planner refuses what it cannot follow: weights, data, settings, and states of another run."""

import dataclasses
import math

import numpy as np
import pytest
from planned import random_corpus

from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.data.plan.planner import plan_step
from versatune_ds.data.plan.state import PlannerState
from versatune_ds.foundations.errors import ConfigError, DataError, StateError


def tiny() -> tuple[Corpus, PlannerSettings, PlannerState]:
    """A corpus of two domains, one of them without data, and a state after one step."""
    corpus = Corpus(
        [np.array([5, 9], np.int32), np.zeros(0, np.int32)],
        [np.array([4, 8], np.int32), np.zeros(0, np.int32)],
        ("law", "code"),
    )
    settings = PlannerSettings(pack_len=10, packs_per_step=1)
    return corpus, settings, plan_step(corpus, settings, PlannerState.initial(2), [1.0, 0.0]).state_after


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ([0.5, 0.5], DataError, "domain code has weight 0.5 and no samples"),
        ([1.0], ConfigError, "one is needed for each of 2 domains"),
        ([1.5, -0.5], ConfigError, "must be finite and >= 0"),
        ([math.nan, 1.0], ConfigError, "must be finite and >= 0"),
        ([0.5, 0.0], ConfigError, "weights sum to 0.5; they must sum to 1"),
    ],
)
def test_weights_that_cannot_be_followed_are_refused(
    weights: list[float], error: type[Exception], text: str
) -> None:
    corpus, settings, state = tiny()
    with pytest.raises(error, match=text):
        plan_step(corpus, settings, state, weights)


def test_a_sample_longer_than_a_pack_is_refused() -> None:
    corpus, settings, _ = tiny()
    short = dataclasses.replace(settings, pack_len=8)
    with pytest.raises(DataError, match=r"law: sample 1 has 9 tokens.*pack_len = 8; set data.overlong"):
        plan_step(corpus, short, PlannerState.initial(2), [1.0, 0.0])


def test_samples_that_cannot_count_are_refused() -> None:
    empty = Corpus([np.array([3, 0], np.int32)], [np.array([2, 0], np.int32)], ("law",))
    settings = PlannerSettings(pack_len=10, packs_per_step=1)
    with pytest.raises(DataError, match="law: sample 1 has no tokens"):
        plan_step(empty, settings, PlannerState.initial(1), [1.0])
    silent = Corpus([np.array([3], np.int32)], [np.array([0], np.int32)], ("law",))
    with pytest.raises(DataError, match="law has no supervised token"):
        supervised = dataclasses.replace(settings, weight_unit="supervised_tokens")
        plan_step(silent, supervised, PlannerState.initial(1), [1.0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 5}, "run.seed was 0 and is 5"),
        ({"pack_len": 20}, "batch.pack_len was 10 and is 20"),
        ({"packs_per_step": 2}, "batch.packs_per_step was 1 and is 2"),
        ({"weight_unit": "tokens"}, "domains.weight_unit was 'samples' and is 'tokens'"),
    ],
)
def test_a_state_of_other_settings_is_refused(changes: dict[str, object], text: str) -> None:
    corpus, settings, state = tiny()
    with pytest.raises(StateError, match=text):
        plan_step(corpus, dataclasses.replace(settings, **changes), state, [1.0, 0.0])


def test_a_state_of_another_corpus_is_refused() -> None:
    corpus, settings, state = tiny()
    other = Corpus([np.array([5, 8], np.int32), corpus.lengths[1]], corpus.supervised, corpus.names)
    with pytest.raises(StateError, match=r"the prepared training data of law changed .* since step 1; set"):
        plan_step(other, settings, state, [1.0, 0.0])
    three = [[*part, part[0]] for part in (corpus.lengths, corpus.supervised)]
    more = Corpus(*three, (*corpus.names, "new"))
    with pytest.raises(StateError, match=r"domains.names changed \(added new\)"):
        plan_step(more, settings, state, [1.0, 0.0, 0.0])
    other = dataclasses.replace(corpus, names=corpus.names[::-1])
    with pytest.raises(StateError, match=r"domains.names changed \(their order\)"):
        plan_step(other, settings, state, [1.0, 0.0])
    with pytest.raises(StateError, match=r"domains.names changed \(added d0; gone law, code\)"):
        plan_step(random_corpus(0, [4], 9), settings, state, [1.0])


def test_a_damaged_or_foreign_state_is_refused() -> None:
    corpus, settings, state = tiny()
    good = state.to_json()
    for bad, text in [
        ({**good, "version": 99}, "has version 99, this program reads version 1"),
        ({"step": 1}, "has version None"),
        ({k: v for k, v in good.items() if k != "credit"}, "is damaged"),
        ({**good, "credit": [0.0]}, "lists of unequal length"),
    ]:
        with pytest.raises(StateError, match=text):
            PlannerState.from_json(bad)
    moved = PlannerState.from_json({**good, "positions": [0, 0], "passes": [7, 0]})
    with pytest.raises(StateError, match="law has 2 draws at pass 7, position 0"):
        plan_step(corpus, settings, moved, [1.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pack_len": 0}, "must be >= 1"),
        ({"weight_unit": "sample"}, "did you mean 'samples'"),
        ({"max_epochs": (0.0,)}, "must be a number > 0"),
    ],
)
def test_settings_are_checked(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PlannerSettings(**{"pack_len": 8, "packs_per_step": 1, **arguments})


def test_a_limit_below_one_sample_is_refused() -> None:
    settings = PlannerSettings(pack_len=50, packs_per_step=1, max_epochs=(0.1,))
    with pytest.raises(ConfigError, match=r"0\.1 of d0 is less than one of its 5 samples"):
        plan_step(random_corpus(0, [5], 50), settings, PlannerState.initial(1), [1.0])
