"""What the call is as a node of an autograd graph."""

import pytest
import torch
from torch import nn

from versatune_kernels import KernelError, LossOutput, linear_cross_entropy
from versatune_kernels import chunked as chunked_module

BACKENDS = ["chunked", "reference"]


class Head(nn.Module):
    """A module that owns the weight, as the trainer uses it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden, labels, **options):
        return linear_cross_entropy(hidden, self.weight, labels, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_gradient_arrives_once_on_the_parameter(tools, backend):
    case = tools.case()
    head, body = Head(case.weight.clone()), nn.Linear(32, 32)
    arrivals = []
    head.weight.register_post_accumulate_grad_hook(lambda p: arrivals.append(p.grad.clone()))
    out = head(body(case.hidden), case.labels, backend=backend, **case.options)
    assert isinstance(out, LossOutput)
    out.loss.backward()
    inside = tools.replace(case, hidden=body(case.hidden).detach())
    assert len(arrivals) == 1
    torch.testing.assert_close(arrivals[0], tools.torch_answer(inside, torch.float32).d_weight)
    assert body.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_loss_is_differentiable(tools, backend):
    case = tools.case(30)
    ids = torch.zeros(30, dtype=torch.int64)
    out, _ = tools.run(case, sample_ids=ids, num_samples=1, domain_ids=ids, num_domains=1, backend=backend)
    assert out.loss.requires_grad and out.loss.dtype == torch.float32 and out.loss.shape == ()
    assert [part.requires_grad for part in out[1:]] == [False] * 5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.0, -2.5, 1024.0])
def test_the_upstream_gradient_scales_both_gradients(tools, factor, backend):
    case = tools.case()
    _, unit = tools.run(case, backend=backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, case.labels, backend=backend, **case.options).loss
    (factor * loss).backward()
    torch.testing.assert_close(hidden.grad, factor * unit.d_hidden)
    torch.testing.assert_close(weight.grad, factor * unit.d_weight)


def test_using_the_loss_twice_is_one_backward(tools):
    case = tools.case()
    _, unit = tools.run(case)
    hidden = case.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels, **case.options).loss
    (loss + 2 * loss).backward()
    torch.testing.assert_close(hidden.grad, 3 * unit.d_hidden)


def test_second_backward_is_a_clear_error(tools):
    case = tools.case()
    hidden = case.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels).loss
    loss.backward(retain_graph=True)
    before = hidden.grad.clone()
    with pytest.raises(KernelError, match=r"second backward.*linear_cross_entropy again"):
        loss.backward()
    assert hidden.grad.equal(before)


def test_a_gradient_of_a_gradient_is_refused(tools):
    case = tools.case()
    hidden = case.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
    with pytest.raises(KernelError, match="second backward"):
        (loss + grad.sum()).backward()  # a gradient penalty: never silently left out


def _count_products(monkeypatch, vocab_size, hidden_size):
    """Names of the matrix products by the shape of their result."""
    counted = {"logits": 0, "d_x": 0, "d_weight": 0}
    real = chunked_module._product_

    def product(out, a, b, *, accumulate):
        if out.shape == (vocab_size, hidden_size):
            counted["d_weight"] += 1
        else:
            counted["logits" if out.shape[1] == vocab_size else "d_x"] += 1
        real(out, a, b, accumulate=accumulate)

    monkeypatch.setattr(chunked_module, "_product_", product)
    return counted


@pytest.mark.parametrize(
    ("frozen", "products"),
    [
        ((), {"logits": 3, "d_x": 3, "d_weight": 3}),
        (("weight",), {"logits": 3, "d_x": 3, "d_weight": 0}),
        (("hidden",), {"logits": 3, "d_x": 0, "d_weight": 3}),
        (("hidden", "weight"), {"logits": 3, "d_x": 0, "d_weight": 0}),
    ],
)
def test_three_products_per_chunk_and_none_for_what_is_frozen(tools, monkeypatch, frozen, products):
    case = tools.case(300, ignored=0.5)
    chunk = -(-int(case.valid.sum()) // 3)  # three chunks of valid rows, not of all rows
    _, full = tools.run(case)
    counted = _count_products(monkeypatch, 1000, 32)
    hidden = case.hidden.requires_grad_("hidden" not in frozen)
    weight = case.weight.requires_grad_("weight" not in frozen)
    out = linear_cross_entropy(hidden, weight, case.labels, chunk_tokens=chunk, **case.options)
    assert out.loss.requires_grad == (len(frozen) < 2)
    if out.loss.requires_grad:
        out.loss.backward()
    assert counted == products
    for tensor, expected in ((hidden, full.d_hidden), (weight, full.d_weight)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_logits_only(tools, monkeypatch, context):
    case = tools.case(300, dtype=torch.bfloat16)
    expected, _ = tools.run(case)
    counted = _count_products(monkeypatch, 1000, 32)
    with context():
        out = linear_cross_entropy(case.hidden, nn.Parameter(case.weight), case.labels, **case.options)
    assert counted["logits"] > 0 and counted["d_x"] == counted["d_weight"] == 0
    assert out.loss.equal(expected.loss) and not out.loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_weight_gets_both_gradients(tools, backend):
    case = tools.case(ignored=0.0)
    inputs = torch.arange(len(case.labels))
    weight = case.weight.requires_grad_()
    hidden = nn.functional.embedding(inputs, weight).tanh()
    linear_cross_entropy(hidden, weight, case.labels, backend=backend).loss.backward()

    exact = case.weight.detach().double().requires_grad_()
    logits = nn.functional.embedding(inputs, exact).tanh() @ exact.T
    nn.functional.cross_entropy(logits, case.labels, reduction="sum").backward()
    assert tools.error(weight.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_have_the_dtype_of_their_tensor(tools, dtype):
    out, answer = tools.run(tools.case(dtype=dtype), chunk_tokens=16)
    assert answer.d_hidden.dtype == answer.d_weight.dtype == dtype
    assert out.loss.dtype == out.token_loss.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(tools, backend):
    case = tools.case()
    expected, expected_answer = tools.run(case, backend=backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_cross_entropy(hidden, weight, case.labels, backend=backend, **case.options)
    out.loss.backward()
    assert out.loss.equal(expected.loss) and weight.grad.equal(expected_answer.d_weight)


def test_parts_of_a_batch_add_up_to_the_whole(tools):
    """Gradient accumulation: the same normalizer for every part gives the gradient of one batch."""
    case = tools.case(120)
    _, whole = tools.run(case)
    weight = case.weight.requires_grad_()
    for part in range(4):
        rows = slice(30 * part, 30 * part + 30)
        linear_cross_entropy(case.hidden[rows], weight, case.labels[rows], **case.options).loss.backward()
    torch.testing.assert_close(weight.grad, whole.d_weight)
