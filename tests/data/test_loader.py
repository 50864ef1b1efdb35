"""The loader: prefetched or not, the same batches; no old weights; the state of what was taken."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from versatune_ds.data import loader as loader_module
from versatune_ds.data.collate import Batch
from versatune_ds.data.loader import StepLoader
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.data.plan.planner import plan_step
from versatune_ds.data.plan.state import PlannerState
from versatune_ds.foundations.errors import ConfigError, DataError, StateError

SETTINGS = PlannerSettings(pack_len=64, packs_per_step=4)
EQUAL, MOSTLY_FIRST = np.array([0.5, 0.5]), np.array([0.9, 0.1])


class Source:
    """A cache in memory whose tokens tell sample and position; every token is supervised."""

    def __init__(self, domain: int, lengths: np.ndarray) -> None:
        self.domain, self.lengths = domain, lengths

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.lengths[index]
        tokens = 100_000 * (self.domain + 1) + 100 * index + np.arange(size)
        return tokens.astype(np.uint32), np.ones(size, bool)


@pytest.fixture
def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    lengths = [rng.integers(2, 40, size).astype(np.int32) for size in (60, 80)]
    return Corpus(lengths, [n - 1 for n in lengths])


@contextmanager
def open_loader(
    corpus: Corpus, rank: int = 0, world_size: int = 1, **options: object
) -> Iterator[StepLoader]:
    """A loader over in-memory caches, closed at the end."""
    sources = [Source(domain, lengths) for domain, lengths in enumerate(corpus.lengths)]
    state = options.pop("state", PlannerState.initial(2))
    with StepLoader(corpus, sources, SETTINGS, state, rank, world_size, pad_id=0, **options) as loader:
        yield loader


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Whether two lists hold equal batches."""
    return len(one) == len(other) and all(
        vars(a)[name] is vars(b)[name] is None
        or torch.equal(torch.as_tensor(vars(a)[name]), torch.as_tensor(vars(b)[name]))
        for a, b in zip(one, other, strict=True)
        for name in vars(a)
    )


def test_prefetch_changes_nothing(corpus: Corpus) -> None:
    weights = [EQUAL, EQUAL, MOSTLY_FIRST, EQUAL, EQUAL, EQUAL]
    with open_loader(corpus) as ahead, open_loader(corpus, prefetch=False) as plain:
        for step_weights in weights:
            (plan, batches), (expected_plan, expected) = ahead.take(step_weights), plain.take(step_weights)
            assert same(batches, expected)
            assert plan.state_after == expected_plan.state_after == ahead.state
            assert plan.step == expected_plan.step


@pytest.mark.parametrize(("parts", "share"), [(1, 0.0), (2, 0.0), (1, 0.5)])
def test_without_padding_a_batch_holds_the_same_samples_and_nothing_else(corpus, parts, share) -> None:
    options = {"part": (0, parts), "compared_share": share}
    with open_loader(corpus, **options) as padded, open_loader(corpus, pads=False, **options) as plain:
        (plan, full), (_, bare) = padded.take(EQUAL), plain.take(EQUAL)
    for pack, whole, batch in zip(plan.packs, full, bare, strict=True):
        rows = -(-pack.length // parts)
        assert len(batch.input_ids) == rows and pack.length < SETTINGS.pack_len
        assert batch.cu_seqlens[-1] == rows * parts and batch.max_seqlen == max(pack.lengths)
        for name in ("input_ids", "labels", "position_ids", "sample_ids"):
            expected = getattr(whole, name)[: min(rows, pack.length)]
            assert torch.equal(getattr(batch, name)[: len(expected)], expected), name
        if parts == 1:
            assert batch.supervised_tokens == whole.supervised_tokens
        if share:
            assert torch.equal(batch.compared.rows, whole.compared.rows)


def test_no_batch_is_drawn_from_old_weights(corpus: Corpus) -> None:
    state = PlannerState.initial(2)
    with open_loader(corpus) as loader:
        for weights in [EQUAL, MOSTLY_FIRST, MOSTLY_FIRST, EQUAL, MOSTLY_FIRST]:
            if loader._prefetch is not None:
                loader._prefetch.result.exception()  # the wrong step is ready and waiting
            plan, _ = loader.take(weights)
            expected = plan_step(corpus, SETTINGS, state, weights)
            assert np.array_equal(plan.weights, weights)
            assert plan.state_after == expected.state_after
            state = expected.state_after


def test_weights_that_moved_by_one_bit_are_other_weights(corpus: Corpus) -> None:
    moved = np.array([np.nextafter(0.5, 1), np.nextafter(0.5, 0)])
    with open_loader(corpus) as loader:
        loader.take(EQUAL)
        plan, _ = loader.take(moved)
        assert plan.weights.tolist() == moved.tolist() != EQUAL.tolist()


def test_a_change_of_the_callers_array_is_a_change_of_weights(corpus: Corpus) -> None:
    weights = EQUAL.copy()
    with open_loader(corpus) as loader:
        loader.take(weights)
        weights[:] = MOSTLY_FIRST
        plan, _ = loader.take(weights)
        assert plan.weights.tolist() == MOSTLY_FIRST.tolist()


def test_state_is_that_of_the_last_taken_step(corpus: Corpus) -> None:
    with open_loader(corpus) as loader:
        plans = [loader.take(EQUAL)[0] for _ in range(3)]
        assert loader._prefetch is not None
        loader._prefetch.result.result()  # step 3 is planned, in full, and has left no trace
        saved = loader.state.to_json()
        assert loader.state == plans[-1].state_after
        expected = [loader.take(EQUAL) for _ in range(3)]
    with open_loader(corpus, state=PlannerState.from_json(saved)) as resumed:
        for plan, batches in expected:
            again, same_batches = resumed.take(EQUAL)
            assert again.step == plan.step and same(same_batches, batches)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_what_one_rank_gets(corpus: Corpus, world_size: int) -> None:
    def rows(batches: list[Batch]) -> list[list[int]]:
        return [batch.input_ids.tolist() for batch in batches]

    with open_loader(corpus) as single:
        expected = [rows(single.take(EQUAL)[1]) for _ in range(3)]
    dealt: list[list[list[int]]] = [[], [], []]
    for rank in range(world_size):
        with open_loader(corpus, rank, world_size) as loader:
            for step in range(3):
                _, batches = loader.take(EQUAL)
                assert len(batches) == SETTINGS.packs_per_step // world_size
                dealt[step] += rows(batches)
    assert [sorted(step) for step in dealt] == [sorted(step) for step in expected]


def test_an_error_of_the_thread_is_raised_by_the_step_it_belongs_to(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, threads = plan_step, []

    def failing(corpus: Corpus, settings: PlannerSettings, state: PlannerState, weights: np.ndarray):
        threads.append(threading.current_thread())
        if state.step == 2:
            raise StateError("step 2 is broken")
        return real(corpus, settings, state, weights)

    monkeypatch.setattr(loader_module, "plan_step", failing)
    with open_loader(corpus) as loader:
        loader.take(EQUAL)
        loader.take(EQUAL)
        before = loader.state
        with pytest.raises(StateError, match="step 2 is broken"):
            loader.take(EQUAL)
        assert loader.state is before and before.step == 2
    assert threads[2] is not threading.main_thread()


def test_supervised_tokens_that_differ_from_the_plan_are_refused(corpus: Corpus) -> None:
    wrong = Corpus(corpus.lengths, [n - 2 for n in corpus.lengths])
    with open_loader(wrong) as loader, pytest.raises(DataError, match="loss would be scaled wrongly"):
        loader.take(EQUAL)


def test_planning_is_measured_and_the_plan_kept(corpus: Corpus) -> None:
    with open_loader(corpus) as loader:
        began = time.perf_counter()
        plan, _ = loader.take(EQUAL)
        assert 0 < loader.last_plan_s <= time.perf_counter() - began
        assert loader.last_plan is plan and plan.state_after is loader.state


def test_a_closed_loader_has_ended_its_thread_and_gives_no_more_steps(corpus: Corpus) -> None:
    before = set(threading.enumerate())
    with open_loader(corpus) as loader:
        loader.take(EQUAL)
        assert set(threading.enumerate()) - before
    assert not set(threading.enumerate()) - before
    loader.close()
    with pytest.raises(StateError, match="the loader is closed"):
        loader.take(EQUAL)


def test_an_uneven_world_size_is_refused_at_once(corpus: Corpus) -> None:
    with (
        pytest.raises(ConfigError, match="4, which 3 ranks cannot share evenly; use one of 1, 2, 4 ranks"),
        open_loader(corpus, 0, 3),
    ):
        pass
