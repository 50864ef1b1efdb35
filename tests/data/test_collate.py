"""Collate: one small pack checked number by number, then the rules for any pack."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from versatune_ds.data.collate import Batch, collate, rows_of
from versatune_ds.data.plan.packing import Pack
from versatune_ds.foundations.errors import DataError

PAD = 9


class Source:
    """A token cache in memory: samples as (tokens, mask) lists."""

    dtype: type = bool

    def __init__(self, *samples: tuple[list[int], list[float]]) -> None:
        self.samples = samples

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = self.samples[index]
        return np.array(tokens, np.uint32), np.array(mask, self.dtype)


def pack(*samples: tuple[int, int, int]) -> Pack:
    """Pack of (domain, sample, length)."""
    columns = np.array(samples, dtype=np.int64).reshape(-1, 3)
    return Pack(columns[:, 0].astype(np.int32), columns[:, 1], columns[:, 2].astype(np.int32))


def test_a_pack_of_two_samples_and_padding() -> None:
    sources = [Source(([5, 6, 7], [1, 1, 1])), None, Source(([0, 0], [0, 0]), ([8, 4_000_000_000], [1, 1]))]
    batch = collate(pack((2, 1, 2), (0, 0, 3)), sources, pack_len=8, pad_id=PAD)
    expected = {
        "input_ids": [8, 4_000_000_000, 5, 6, 7, PAD, PAD, PAD],
        # The mask of a sample's first token never counts: nothing predicts it.
        "labels": [4_000_000_000, -100, 6, 7, -100, -100, -100, -100],
        "position_ids": [0, 1, 0, 1, 2, 0, 1, 2],
        "cu_seqlens": [0, 2, 5, 8],
        "sample_ids": [0, 0, 1, 1, 1, -1, -1, -1],
        "sample_domains": [2, 0],
    }
    for name, values in expected.items():
        assert getattr(batch, name).tolist() == values, name
    assert (batch.max_seqlen, batch.num_tokens, batch.supervised_tokens) == (3, 5, 3)
    int64 = {"input_ids", "labels", "position_ids"}
    for name in expected:
        assert getattr(batch, name).dtype == (torch.int64 if name in int64 else torch.int32), name


def test_weights_stand_at_the_positions_that_predict() -> None:
    """A sample with weights beside one with a mask; the weight of a first token never counts."""
    plain, weighted = Source(([5, 6], [1, 1])), Source(([7, 8, 9], [3, 0, 0.5]))
    weighted.dtype = np.float32
    batch = collate(pack((0, 0, 2), (1, 0, 3)), [plain, weighted], pack_len=6, pad_id=PAD)
    assert batch.labels.tolist() == [6, -100, -100, 9, -100, -100]
    assert batch.token_weight is not None and batch.token_weight.dtype == torch.float32
    assert batch.token_weight.tolist() == [1, 0, 0, 0.5, 0, 0]
    assert collate(pack((0, 0, 2)), [plain], pack_len=6, pad_id=PAD).token_weight is None


def test_a_full_pack_has_no_padding_segment() -> None:
    batch = collate(pack((0, 0, 3)), [Source(([1, 2, 3], [1, 1, 1]))], pack_len=3, pad_id=PAD)
    assert batch.cu_seqlens.tolist() == [0, 3]
    assert batch.labels.tolist() == [2, 3, -100]


def test_an_empty_pack_is_all_padding() -> None:
    batch = collate(pack(), [None], pack_len=4, pad_id=PAD)
    assert batch.input_ids.tolist() == [PAD] * 4
    assert batch.labels.tolist() == [-100] * 4
    assert batch.position_ids.tolist() == [0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.sample_ids.tolist() == [-1] * 4
    assert batch.sample_domains.shape == (0,)
    assert (batch.max_seqlen, batch.num_tokens, batch.supervised_tokens) == (4, 0, 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=6), st.integers(0, 5))
def test_any_pack_obeys_the_contract(masks: list[list[bool]], padding: int) -> None:
    samples = [([10 * i + t for t in range(len(m))], [int(b) for b in m]) for i, m in enumerate(masks)]
    real = sum(map(len, masks))
    batch = collate(
        pack(*((0, i, len(m)) for i, m in enumerate(masks))), [Source(*samples)], real + padding or 1, PAD
    )
    boundaries = batch.cu_seqlens.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == len(batch.input_ids)
    assert all(a < b for a, b in itertools.pairwise(boundaries))
    assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(boundaries))
    assert (batch.position_ids == 0).nonzero().flatten().tolist() == boundaries[:-1]
    assert batch.supervised_tokens == sum(sum(m[1:]) for m in masks)
    for i, (tokens, mask) in enumerate(samples):
        own = batch.sample_ids == i
        assert batch.input_ids[own].tolist() == tokens
        shifted = [t if m else -100 for t, m in zip(tokens[1:], mask[1:], strict=True)] + [-100]
        assert batch.labels[own].tolist() == shifted


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_pack_are_its_rows_with_the_boundaries_of_all(parts: int) -> None:
    source = Source(([1, 2, 3, 4, 5, 6, 7], [0, 1, 0.5, 0, 2, 1, 1]), ([9], [1]), ([7, 8, 9], [1, 1, 1]))
    source.dtype = np.float32
    whole = collate(pack((0, 0, 7), (0, 1, 1), (0, 2, 3)), [source], rows_of(12, parts), PAD)
    found = [whole.part(rank, parts) for rank in range(parts)]
    for name in ("input_ids", "labels", "position_ids", "sample_ids", "token_weight"):
        assert torch.equal(torch.cat([getattr(part, name) for part in found]), getattr(whole, name))
    for part in found:
        assert torch.equal(part.cu_seqlens, whole.cu_seqlens) and part.max_seqlen == whole.max_seqlen
        assert torch.equal(part.sample_domains, whole.sample_domains) and part.parts == parts
        assert part.supervised_tokens == int((part.labels != -100).sum())
    assert sum(part.num_tokens for part in found) == whole.num_tokens == 11
    assert [rows_of(n, parts) % parts for n in (8, 9, 13)] == [0, 0, 0]
    assert whole.part(0, 1) is whole


def test_to_moves_every_tensor_and_keeps_host_numbers() -> None:
    batch = collate(pack((0, 0, 2)), [Source(([1, 2], [1, 1]))], pack_len=4, pad_id=PAD)
    moved = batch.to("meta")
    tensors = [v for v in vars(moved).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 6 and all(t.device.type == "meta" for t in tensors)
    assert isinstance(moved, Batch) and moved.max_seqlen == 2 and moved.supervised_tokens == 1


def test_a_changed_cache_is_refused() -> None:
    with pytest.raises(DataError, match="sample 0 has 2 tokens and was planned with 3"):
        collate(pack((0, 0, 3)), [Source(([1, 2], [1, 1]))], pack_len=4, pad_id=PAD)


def test_a_pack_that_overflows_is_refused() -> None:
    with pytest.raises(DataError, match=r"5 tokens does not fit batch\.pack_len = 4"):
        collate(pack((0, 0, 5)), [Source(([1] * 5, [1] * 5))], pack_len=4, pad_id=PAD)


def test_a_domain_without_cache_is_refused() -> None:
    with pytest.raises(DataError, match="domain 1, which has no token cache"):
        collate(pack((1, 0, 2)), [Source(([1, 2], [1, 1])), None], pack_len=4, pad_id=PAD)
