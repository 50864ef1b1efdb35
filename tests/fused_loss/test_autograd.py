"""What the call is as a node of an autograd graph."""

import importlib
import weakref

import pytest
import torch
from torch import nn

from versatune_kernels import KernelError, LossOutput, fused_op, linear_cross_entropy, products


class Head(nn.Module):
    """A module that owns the weight, as the trainer uses it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden, labels, **options):
        return linear_cross_entropy(hidden, self.weight, labels, **options)


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


def test_only_loss_is_differentiable(tools, backend):
    case = tools.case(30)
    ids = torch.zeros(30, dtype=torch.int64)
    out, _ = tools.run(case, sample_ids=ids, num_samples=1, backend=backend)
    assert out.loss.requires_grad and out.loss.dtype == torch.float32 and out.loss.shape == ()
    assert [part.requires_grad for part in out[1:]] == [False] * 4


@pytest.mark.parametrize("factor", [0.0, -2.5, 1024.0])
def test_the_upstream_gradient_scales_both_gradients(tools, factor, backend):
    case = tools.case()
    _, unit = tools.run(case, backend=backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, case.labels, backend=backend, **case.options).loss
    (factor * loss).backward()
    torch.testing.assert_close(hidden.grad, factor * unit.d_hidden)
    torch.testing.assert_close(weight.grad, factor * unit.d_weight)


def test_using_the_loss_twice_is_one_backward(tools, backend):
    case = tools.case()
    _, unit = tools.run(case, backend=backend)
    hidden = case.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels, backend=backend, **case.options).loss
    (loss + 2 * loss).backward()
    torch.testing.assert_close(hidden.grad, 3 * unit.d_hidden)


def test_second_backward_is_a_clear_error(tools, chunking_backend):
    case = tools.case()
    hidden = case.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels, backend=chunking_backend).loss
    loss.backward(retain_graph=True)
    before = hidden.grad.clone()
    with pytest.raises(KernelError, match=r"second backward.*linear_cross_entropy again"):
        loss.backward()
    assert hidden.grad.equal(before)


def test_a_gradient_of_a_gradient_is_refused(tools, chunking_backend):
    case = tools.case()
    hidden = case.hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, case.weight, case.labels, backend=chunking_backend).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()
    with pytest.raises(KernelError, match="second backward"):
        (loss + grad.sum()).backward()  # a gradient penalty: never silently left out


def _count_products(monkeypatch, backend, vocab_size, hidden_size):
    """Names of the matrix products by the shape of their result."""
    counted = {"logits": 0, "d_x": 0, "d_weight": 0}
    real = products.product_

    def product(out, a, b, **options):
        if out.shape == (vocab_size, hidden_size):
            counted["d_weight"] += 1
        else:
            counted["logits" if out.shape[1] == vocab_size else "d_x"] += 1
        real(out, a, b, **options)

    module = {"chunked": "chunked", "triton": "triton_backend"}[backend]
    monkeypatch.setattr(f"versatune_kernels.{module}.product_", product)
    return counted


@pytest.mark.parametrize(
    ("frozen", "expected_products"),
    [
        ((), {"logits": 3, "d_x": 3, "d_weight": 3}),
        (("weight",), {"logits": 3, "d_x": 3, "d_weight": 0}),
        (("hidden",), {"logits": 3, "d_x": 0, "d_weight": 3}),
        (("hidden", "weight"), {"logits": 3, "d_x": 0, "d_weight": 0}),
    ],
)
def test_three_products_per_chunk_and_none_for_what_is_frozen(
    tools, monkeypatch, frozen, expected_products, chunking_backend
):
    case = tools.case(30, ignored=0.5)
    chunk = -(-int(case.valid.sum()) // 3)  # three chunks of valid rows, not of all rows
    _, full = tools.run(case, backend=chunking_backend)
    counted = _count_products(monkeypatch, chunking_backend, 1000, 32)
    hidden = case.hidden.requires_grad_("hidden" not in frozen)
    weight = case.weight.requires_grad_("weight" not in frozen)
    out = linear_cross_entropy(
        hidden, weight, case.labels, chunk_tokens=chunk, backend=chunking_backend, **case.options
    )
    assert out.loss.requires_grad == (len(frozen) < 2)
    if out.loss.requires_grad:
        out.loss.backward()
    assert counted == expected_products
    for tensor, expected in ((hidden, full.d_hidden), (weight, full.d_weight)):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_logits_only(tools, monkeypatch, context, chunking_backend):
    case = tools.case(dtype=torch.bfloat16)
    expected, _ = tools.run(case, backend=chunking_backend)
    counted = _count_products(monkeypatch, chunking_backend, 1000, 32)
    options = {**case.options, "backend": chunking_backend}
    with context():
        out = linear_cross_entropy(case.hidden, nn.Parameter(case.weight), case.labels, **options)
    assert counted["logits"] > 0 and counted["d_x"] == counted["d_weight"] == 0
    assert out.loss.equal(expected.loss) and not out.loss.requires_grad


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
def test_gradients_have_the_dtype_of_their_tensor(tools, dtype, backend):
    out, answer = tools.run(tools.case(dtype=dtype), chunk_tokens=16, backend=backend)
    assert answer.d_hidden.dtype == answer.d_weight.dtype == dtype
    assert out.loss.dtype == out.token_loss.dtype == torch.float32


def test_autocast_changes_nothing(tools, backend):
    case = tools.case()
    expected, expected_answer = tools.run(case, backend=backend)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_cross_entropy(hidden, weight, case.labels, backend=backend, **case.options)
    out.loss.backward()
    assert out.loss.equal(expected.loss) and weight.grad.equal(expected_answer.d_weight)


def test_parts_of_a_batch_add_up_to_the_whole(tools, backend):
    """Gradient accumulation: the same normalizer for every part gives the gradient of one batch."""
    case = tools.case(48)
    _, whole = tools.run(case, backend=backend)
    weight = case.weight.requires_grad_()
    for part in range(4):
        rows = slice(12 * part, 12 * part + 12)
        options = {**case.options, "backend": backend}
        linear_cross_entropy(case.hidden[rows], weight, case.labels[rows], **options).loss.backward()
    torch.testing.assert_close(weight.grad, whole.d_weight)


def test_a_loss_that_is_never_used_lets_go_of_its_gradients(tools, monkeypatch, chunking_backend):
    """The operator's node may not hold outputs that hold the node: such a ring is never collected."""
    module = (
        fused_op
        if chunking_backend == "chunked"
        else importlib.import_module("versatune_kernels.triton_backend")
    )
    real = getattr(module, f"{chunking_backend}_pass")
    kept = []

    def spy(*args):
        done = real(*args)
        kept.append(weakref.ref(done.d_weight))
        return done

    monkeypatch.setattr(module, f"{chunking_backend}_pass", spy)
    case = tools.case(20)
    weight = case.weight.requires_grad_()
    out = linear_cross_entropy(case.hidden, weight, case.labels, backend=chunking_backend)
    assert kept[0]() is not None, "the gradient is not kept for backward"
    del out
    assert kept[0]() is None
