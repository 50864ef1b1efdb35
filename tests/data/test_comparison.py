"""Which samples are compared with the base model, and how they are laid out for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from versatune_ds.data.collate import collate, compare
from versatune_ds.data.loader import StepLoader
from versatune_ds.data.plan.comparison import chosen_samples
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.data.plan.packing import Pack
from versatune_ds.data.plan.state import PlannerState
from versatune_ds.foundations.constants import IGNORE_INDEX

LENGTHS = [5, 17, 30, 9]
SETTINGS = PlannerSettings(pack_len=64, packs_per_step=4, seed=3)


class Tokens:
    """Sample i is 100 i, 100 i + 1, ...; every third token is supervised."""

    def __init__(self, lengths) -> None:
        self.lengths = lengths

    def sample(self, i):
        return (100 * i + np.arange(self.lengths[i])).astype(np.uint32), np.arange(self.lengths[i]) % 3 == 1


def pack_of(*samples: int) -> Pack:
    return Pack(
        np.zeros(len(samples), np.int32),
        np.array(samples, np.int64),
        np.array([LENGTHS[i] for i in samples], np.int32),
    )


@pytest.mark.parametrize("share", [0.01, 0.25, 0.6])
def test_each_sample_is_chosen_with_the_probability_of_the_share(share):
    packs = [pack_of(*[0] * n) for n in (3, 0, 4)]
    steps = [np.concatenate(chosen_samples(packs, share, 0, step)) for step in range(4000)]
    assert {int(chosen.sum()) for chosen in steps} <= {int(7 * share), int(7 * share) + 1}
    assert np.mean(steps, axis=0) == pytest.approx([share] * 7, abs=0.03)


def test_all_or_nothing_and_other_seeds_and_steps():
    packs = [pack_of(0, 1), pack_of(), pack_of(2, 3, 0)]
    chosen = chosen_samples(packs, 1.0, 0, 7)
    assert [of_pack.tolist() for of_pack in chosen] == [[True] * 2, [], [True] * 3]
    assert not np.concatenate(chosen_samples(packs, 0.0, 0, 7)).any()
    ways = {str(chosen_samples(packs, 0.4, seed, step)) for seed in range(4) for step in range(4)}
    assert len(ways) > 2


def test_compared_samples_stand_alone_and_their_rows_meet():
    pack, sources = pack_of(2, 0, 1), [Tokens(LENGTHS)]
    batch = collate(pack, sources, 60, 9)
    found = compare(batch, pack, np.array([True, False, True]), sources, 9, 2.5).compared
    alone = found.batch
    assert alone.sample_domains.tolist() == [0, 0] and alone.num_tokens == 47 and len(alone.labels) == 64
    assert alone.cu_seqlens.tolist() == [0, 30, 47, 64] and found.normalizer == 2.5
    assert torch.equal(batch.labels[found.rows], alone.labels[found.own_rows])
    assert torch.equal(batch.input_ids[found.rows], alone.input_ids[found.own_rows])
    assert set(batch.sample_ids[found.rows].tolist()) == {0, 2}
    assert len(found.rows) == (alone.labels != IGNORE_INDEX).sum() > 0
    nobody = compare(batch, pack, np.zeros(3, bool), sources, 9, 2.5).compared
    assert len(nobody.rows) == len(nobody.own_rows) == nobody.batch.num_tokens == 0
    assert len(nobody.batch.labels) == 64


def taken(world_size: int, state: PlannerState, steps: int, share: float = 0.3):
    """For each step the compared tokens of all ranks, sorted, and the normalizers seen."""
    rng = np.random.default_rng(0)
    lengths = [rng.integers(4, 40, size).astype(np.int32) for size in (60, 80)]
    sources = [Tokens(n) for n in lengths]
    supervised = [
        np.array([s.sample(i)[1][1:].sum() for i in range(len(n))])
        for s, n in zip(sources, lengths, strict=True)
    ]
    corpus = Corpus(lengths, [n.astype(np.int32) for n in supervised])
    compared: list[list] = [[] for _ in range(steps)]
    for rank in range(world_size):
        with StepLoader(
            corpus, sources, SETTINGS, state, rank, world_size, pad_id=0, compared_share=share
        ) as loader:
            for step in compared:
                _, batches = loader.take([0.5, 0.5])
                step += [b.compared for b in batches]
            end = loader.state
    tokens = [sorted(t for c in step for t in c.batch.input_ids[c.own_rows].tolist()) for step in compared]
    return tokens, [{c.normalizer * world_size for c in step} for step in compared], end


def test_ranks_and_a_resume_compare_what_one_rank_compares():
    whole, normalizers, _ = taken(1, PlannerState.initial(2), 3)
    assert [{len(tokens)} for tokens in whole] == normalizers and whole[0] != whole[1]
    assert taken(4, PlannerState.initial(2), 3)[:2] == (whole, normalizers)
    _, _, state = taken(1, PlannerState.initial(2), 1)
    assert taken(2, PlannerState.from_json(state.to_json()), 2)[0] == whole[1:]
