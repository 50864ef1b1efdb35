"""Sums per sample: exact counts, fixed order, NaN kept where it belongs."""

import math

import pytest
import torch

from versatune_kernels import linear_cross_entropy
from versatune_kernels.sums import segment_sums

SAMPLES = 9


def _ids(num_tokens, size, seed=3):
    return torch.randint(0, size, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def test_sums_equal_a_loop_over_tokens(tools, backend):
    case = tools.case(40, token_weight=torch.rand(40))
    ids = _ids(40, SAMPLES)
    ids[10:14] = -1
    out, _ = tools.run(case, sample_ids=ids, num_samples=SAMPLES, backend=backend)
    exact = tools.torch_answer(case, torch.float64).token_loss  # plain nll, whatever is trained on
    assert out.sample_loss.dtype == out.sample_loss_sq.dtype == torch.float64
    assert out.sample_tokens.dtype == torch.int64
    for i in range(SAMPLES):
        members = [t for t in range(40) if ids[t] == i and case.valid[t]]
        assert out.sample_tokens[i] == len(members)
        losses = [float(exact[t]) for t in members]
        assert out.sample_loss[i] == pytest.approx(sum(losses), rel=1e-5)
        assert out.sample_loss_sq[i] == pytest.approx(sum(loss**2 for loss in losses), rel=1e-5)


def test_samples_and_tokens_add_up_to_the_same_sum(tools, backend):
    case = tools.case(40)
    out, _ = tools.run(case, sample_ids=_ids(40, SAMPLES), num_samples=SAMPLES, backend=backend)
    total = math.fsum(out.token_loss.tolist())
    assert math.fsum(out.sample_loss.tolist()) == pytest.approx(total, rel=1e-14)
    assert out.loss.item() * case.options["normalizer"] == pytest.approx(total, rel=1e-6)
    assert out.sample_tokens.sum() == case.valid.sum()


def test_an_absent_and_an_ignored_sample_are_zero(tools, backend):
    case = tools.case(60)
    ids = torch.tensor([0, 2, 3])[_ids(60, 3)]
    case.labels[ids == 2] = -100
    out, _ = tools.run(case, sample_ids=ids, num_samples=5, backend=backend)
    assert out.sample_tokens[[1, 2, 4]].tolist() == [0, 0, 0]
    assert out.sample_loss[[1, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert (out.sample_loss[[0, 3]] > 0).all()


def test_negative_ids_are_in_no_sum_but_in_the_loss(tools, backend):
    case = tools.case(20, ignored=0.0)
    out, _ = tools.run(case, sample_ids=torch.full((20,), -7), num_samples=2, backend=backend)
    assert out.sample_loss.tolist() == [0, 0] and out.sample_tokens.tolist() == [0, 0]
    assert out.loss > 0


def test_sums_are_empty_without_ids(tools, backend):
    out, _ = tools.run(tools.case(4), backend=backend)
    assert [part.shape for part in out[2:]] == [(0,)] * 3


def test_a_nan_row_touches_its_own_token_and_sample_only(tools, backend):
    case = tools.case(40, ignored=0.2)
    case.labels[33] = 5
    ids = _ids(40, SAMPLES)
    options = dict(sample_ids=ids, num_samples=SAMPLES, backend=backend, chunk_tokens=16)
    clean, clean_answer = tools.run(case, **options)
    case.hidden[33] = float("nan")
    out, answer = tools.run(case, **options)

    assert out.loss.isnan()
    others = torch.arange(40) != 33
    assert out.token_loss[33].isnan() and out.token_loss[others].equal(clean.token_loss[others])
    assert answer.d_hidden[others].equal(clean_answer.d_hidden[others])
    others = torch.arange(SAMPLES) != ids[33]
    for found, before in (
        (out.sample_loss, clean.sample_loss),
        (out.sample_loss_sq, clean.sample_loss_sq),
    ):
        assert found[ids[33]].isnan() and found[others].equal(before[others])
    assert out.sample_tokens.equal(clean.sample_tokens)


def test_a_nan_in_an_ignored_row_changes_nothing(tools, backend):
    case = tools.case()
    clean, clean_answer = tools.run(case, backend=backend)
    case.hidden[~case.valid] = float("nan")
    out, answer = tools.run(case, backend=backend)
    assert out.loss.equal(clean.loss)
    assert answer.d_hidden.equal(clean_answer.d_hidden)
    assert answer.d_weight.equal(clean_answer.d_weight)


@pytest.fixture(params=["torch", "triton"])
def sum_up(request):
    """Both implementations of the sums."""
    if request.param == "triton":
        return request.getfixturevalue("triton_backend").triton_segment_sums
    return segment_sums


def test_sums_are_kept_in_float64(sum_up):
    """1 + 2^-40 a thousand times: fp32 would lose every small part."""
    values = torch.tensor([1.0] + [2.0**-40] * 1000, dtype=torch.float32)
    zeros = torch.zeros(1001, dtype=torch.int64)
    found = sum_up(values, zeros, -100, zeros, 1)
    assert found.sums.item() == 1.0 + 1000 * 2.0**-40 and found.counts.item() == 1001
    assert found.squares.item() == 1.0 + 1000 * 2.0**-80


@pytest.mark.parametrize("num_tokens", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_sums_over_ragged_tiles(sum_up, num_tokens, dtype):
    values = torch.arange(num_tokens, dtype=torch.float32)
    ids = _ids(num_tokens, 5).to(dtype) - 1
    labels = torch.where(torch.arange(num_tokens) % 3 == 0, -100, 7).to(dtype)
    found = sum_up(values, labels, -100, ids, 4)
    for i in range(4):
        mine = values[(ids == i) & (labels == 7)].double()
        assert found.sums[i] == mine.sum() and found.squares[i] == mine.square().sum()
        assert found.counts[i] == len(mine)


def test_sums_of_strided_ids_and_labels(sum_up):
    values, ids = torch.arange(20.0), _ids(20, 3)
    labels = torch.where(torch.arange(20) % 4 == 0, -100, 7)
    expected = sum_up(values, labels, -100, ids, 3)
    values, labels, ids = (t.repeat_interleave(2)[::2] for t in (values, labels, ids))
    found = sum_up(values, labels, -100, ids, 3)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_many_segments_are_sorted_instead_of_scanned(triton_backend, monkeypatch):
    """Sums of integers are exact, so both ways must agree to the last bit."""
    values, ids = torch.arange(60.0), _ids(60, 9)
    labels = torch.zeros(60, dtype=torch.int64)
    scanned = triton_backend.triton_segment_sums(values, labels, -100, ids, 9)
    monkeypatch.setattr(triton_backend, "MAX_SEGMENT_READS", 60 * 9 - 1)
    monkeypatch.setattr(triton_backend, "triton_kernels", None)
    in_order = triton_backend.triton_segment_sums(values, labels, -100, ids, 9)
    assert all(a.equal(b) for a, b in zip(scanned, in_order, strict=True))


def test_off_by_one_sample_is_noticed(tools):
    """The comparison of this file rejects sums that belong to the neighbour."""
    case = tools.case(200)
    ids = _ids(200, SAMPLES)
    right = linear_cross_entropy(
        case.hidden, case.weight, case.labels, sample_ids=ids, num_samples=SAMPLES
    ).sample_loss
    shifted = linear_cross_entropy(
        case.hidden, case.weight, case.labels, sample_ids=(ids + 1) % SAMPLES, num_samples=SAMPLES
    ).sample_loss
    assert shifted.roll(-1).equal(right)
    assert not torch.isclose(shifted, right, rtol=1e-5).any()
