"""Unusual but legal input: no valid token, odd layouts, extreme logits."""

import pytest
import torch

from versatune_kernels import linear_cross_entropy


def _zero_and_tied(out, hidden, weight):
    assert out.loss.item() == 0.0 and out.loss.requires_grad
    out.loss.backward()
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("normalizer", [0.0, 5.0, torch.tensor(0.0), torch.tensor(5.0)])
@pytest.mark.parametrize("num_tokens", [0, 12])
@pytest.mark.parametrize("num_valid", [None, 0])
def test_no_valid_token_gives_a_zero_tied_to_both_inputs(tools, num_valid, num_tokens, normalizer, backend):
    case = tools.case(num_tokens, ignored=1.1)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    out = linear_cross_entropy(
        hidden,
        weight,
        case.labels,
        normalizer=normalizer,
        backend=backend,
        num_valid=num_valid,
        sample_ids=torch.zeros(num_tokens, dtype=torch.int64),
        num_samples=2,
    )
    assert out.token_loss.tolist() == [0.0] * num_tokens
    assert out.sample_loss.tolist() == [0.0, 0.0] and out.sample_tokens.tolist() == [0, 0]
    _zero_and_tied(out, hidden, weight)


@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0), torch.tensor(0.0)])
def test_normalizer_zero_gives_zero_even_beside_nan(tools, normalizer, backend):
    case = tools.case(20, ignored=0.0)
    case.hidden[4] = float("nan")
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    out = linear_cross_entropy(hidden, weight, case.labels, normalizer=normalizer, backend=backend)
    assert out.token_loss[4].isnan() and out.token_loss[5] > 0, "metrics do not need the normalizer"
    _zero_and_tied(out, hidden, weight)


def test_a_tensor_normalizer_equals_a_float(tools, backend):
    case = tools.case(20)
    expected, expected_answer = tools.run(case, normalizer=37.0, backend=backend)
    for tensor in (torch.tensor(37), torch.tensor([37.0]), torch.tensor(37.0, dtype=torch.float64)):
        out, answer = tools.run(case, normalizer=tensor, backend=backend)
        assert out.loss.equal(expected.loss)
        torch.testing.assert_close(answer.d_weight, expected_answer.d_weight)


def test_first_and_last_class(tools, backend):
    case = tools.case(ignored=0.0)
    case.labels[::2], case.labels[1::2] = 0, case.weight.shape[0] - 1
    _, ours = tools.run(case, backend=backend)
    assert tools.worse_than_torch(case, ours) == {}


def test_layouts_give_the_same_result(tools, backend):
    case = tools.case(24)
    ids = torch.arange(24) // 6
    expected, answer = tools.run(case, backend=backend, sample_ids=ids, num_samples=4)
    strided = torch.zeros(24, 64)[:, ::2].copy_(case.hidden)
    transposed = case.hidden.T.contiguous().T
    batched = case.hidden.reshape(2, 12, 32)
    time_major = batched.transpose(0, 1).contiguous().transpose(0, 1)
    odd_labels, odd_ids = (torch.empty(25, dtype=torch.int32)[1:].copy_(t) for t in (case.labels, ids))
    assert odd_labels.data_ptr() % 16 != 0
    for hidden, labels, sample_ids in (
        (strided, case.labels, ids),
        (transposed, odd_labels, odd_ids),
        (batched, case.labels.reshape(2, 12), ids.reshape(2, 12)),
        (time_major, case.labels, ids),
        (case.hidden, case.labels.repeat_interleave(2)[::2], ids.repeat_interleave(2)[::2]),
    ):
        hidden = hidden.detach().requires_grad_()
        weight = torch.zeros(1000, 64)[:, ::2].copy_(case.weight).requires_grad_()
        sums = {"sample_ids": sample_ids, "num_samples": 4}
        out = linear_cross_entropy(hidden, weight, labels, backend=backend, **sums, **case.options)
        out.loss.backward()
        assert out.token_loss.shape == (24,) and out.sample_tokens.equal(expected.sample_tokens)
        torch.testing.assert_close(out.sample_loss, expected.sample_loss)
        torch.testing.assert_close(out.token_loss, expected.token_loss)
        torch.testing.assert_close(hidden.grad.reshape(24, 32), answer.d_hidden)
        torch.testing.assert_close(weight.grad, answer.d_weight)


def test_three_dimensional_ids_and_weights(tools, backend):
    case = tools.case(24, token_weight=torch.rand(24))
    ids = torch.arange(24) // 6
    expected, _ = tools.run(case, sample_ids=ids, num_samples=4, backend=backend)
    out = linear_cross_entropy(
        case.hidden.reshape(2, 12, 32),
        case.weight,
        case.labels.reshape(2, 12),
        sample_ids=ids.reshape(2, 12).int(),
        num_samples=4,
        token_weight=case.options["token_weight"].reshape(2, 12),
        normalizer=case.options["normalizer"],
        backend=backend,
    )
    torch.testing.assert_close(tuple(out), tuple(t.detach() for t in expected))


def test_another_ignore_index(tools, backend):
    case = tools.case(ignored=0.0)
    case.labels[::3] = 0  # a class id as ignore_index: its tokens have no target
    _, ours = tools.run(case, ignore_index=0, backend=backend)
    masked = tools.replace(case, labels=torch.where(case.labels == 0, -100, case.labels))
    assert tools.worse_than_torch(masked, ours) == {}


def _logits_case(tools, rows, labels):
    """hidden and weight whose product is exactly `rows` (an identity head)."""
    logits = torch.tensor(rows)
    return tools.replace(
        tools.case(1),
        hidden=logits,
        weight=torch.eye(logits.shape[1]),
        labels=torch.tensor(labels),
        options={"normalizer": 1.0},
    )


def test_huge_and_equal_logits(tools, backend):
    case = _logits_case(
        tools,
        [[1e4, -1e4, 0.0], [1e4, 9999.0, -1e4], [-1e4, -1e4, -1e4], [0.5, 0.5, 0.5]],
        [1, 0, 2, 1],
    )
    out, ours = tools.run(case, backend=backend)
    assert tools.worse_than_torch(case, ours) == {}
    # At 1e4 the spacing of fp32 is 1e-3, but the loss log(1 + 1/e) must still be right.
    assert out.token_loss.tolist() == pytest.approx([2e4, 0.3132617, 1.0986123, 1.0986123], 1e-6)


def test_one_infinite_logit(tools, backend):
    """-1e30 * 1e30 is -inf in fp32: probability 0, and no NaN anywhere."""
    hidden = torch.tensor([[1e30, 1.0], [0.0, 1.0]])
    weight = torch.tensor([[-1e30, 0.0], [0.0, 1.0], [0.0, 2.0]])
    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_cross_entropy(hidden, weight, torch.tensor([1, 2]), backend=backend)
    out.loss.backward()
    assert out.token_loss[0].item() == pytest.approx(1.3132617)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    worst = linear_cross_entropy(hidden, weight, torch.tensor([0, 2]), backend=backend)
    assert worst.loss == float("inf")
