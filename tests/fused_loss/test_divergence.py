"""`linear_kl` against plain log_softmax in float64, its memory, and what it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from versatune_kernels import KernelError, linear_kl

SHAPES = [(1, 8, 3), (47, 31, 123), (300, 16, 777)]


UPSTREAM = -0.7


def inputs(rows, width, vocab, dtype=torch.float32):
    """hidden, base, weight, and the base's weight."""
    generator = torch.Generator().manual_seed(rows + 5)
    states = torch.randn(2, rows, width, generator=generator).to(dtype)
    weights = torch.randn(2, vocab, width, generator=generator).to(dtype)
    return *states, *weights


def plain(hidden, base, weight, base_weight=None, compute=torch.float64, scale=1.0, softcap=0.0):
    """KL, and the gradients of `UPSTREAM` times its sum, as autograd has them."""
    hidden = hidden.to(compute, copy=True).requires_grad_()
    weight = weight.to(compute, copy=True).requires_grad_(base_weight is not None)
    of_base = weight if base_weight is None else base_weight.to(compute)
    logits = [x @ w.T * scale for x, w in ((hidden, weight), (base.to(compute), of_base))]
    if softcap:
        logits = [softcap * torch.tanh(x / softcap) for x in logits]
    log_p, log_q = (x.log_softmax(-1) for x in logits)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    (UPSTREAM * kl.sum()).backward()
    return kl.detach(), hidden.grad, *(() if base_weight is None else (weight.grad,))


def ours(hidden, base, weight, base_weight=None, **options):
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(base_weight is not None)
    kl = linear_kl(hidden, base, weight, base_weight, **options)
    (UPSTREAM * kl.total).backward()
    assert not kl.rows.requires_grad and torch.equal(kl.total.detach(), kl.rows.sum())
    return kl.rows, hidden.grad, *(() if base_weight is None else (weight.grad,))


def error(found, exact):
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.3, 5.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(shape, scale, softcap, chunk, is_trained):
    """With a head that trains beside the base's, and with a frozen one for both."""
    case, options = inputs(*shape)[: 4 if is_trained else 3], {"scale": scale, "softcap": softcap}
    found = ours(*case, logit_scale=scale, softcap=softcap, chunk_tokens=chunk)
    exact = plain(*case, **options)
    torch32 = plain(*case, compute=torch.float32, **options)
    assert exact[0].min() > 0.01 and len(exact) == len(case) - 1
    for mine, theirs, answer in zip(found, torch32, exact, strict=True):
        assert error(mine, answer) <= 2 * error(theirs, answer) + 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_errs_no_more_than_twice_as_far_as_torch(shape):
    case = inputs(*shape, dtype=torch.bfloat16)
    exact, torch16 = plain(*case), plain(*case, compute=torch.bfloat16)
    kl, *gradients = ours(*case)
    assert error(kl, exact[0]) <= 2e-6  # logits and softmax are fp32
    for mine, theirs, answer in zip(gradients, torch16[1:], exact[1:], strict=True):
        assert mine.dtype == torch.bfloat16
        assert error(mine, answer) <= 2 * error(theirs, answer) + 2**-8


def test_the_direction_is_from_the_base():
    """q = (1/2, 1/2) against p = (e / (1 + e), 1 / (1 + e)): by hand, and not the same the other way."""
    even, tilted, weight = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.eye(2)
    p = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(-1)
    by_hand = float((0.5 * (0.5 / p).log()).sum())
    assert linear_kl(tilted, even, weight).total.item() == pytest.approx(by_hand, rel=1e-6)
    assert linear_kl(even, tilted, weight).total.item() != pytest.approx(by_hand, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_give_nothing_at_all(dtype):
    hidden, _, weight, _ = inputs(47, 31, 123, dtype)
    assert not any(found.any() for found in ours(hidden, hidden, weight, weight))


def test_no_rows_are_fine():
    kl, gradient, of_weight = ours(*inputs(0, 8, 3))
    assert kl.shape == (0,) and gradient.shape == (0, 8) and not of_weight.any()


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_logits_of_all_rows_are_never_held():
    rows, width, vocab = 1024, 16, 500
    case = inputs(rows, width, vocab)
    with Largest() as largest:
        ours(*case)
    assert 0 < largest.elements <= 2 * 128 * vocab < rows * vocab / 2


def test_what_cannot_be_computed_is_refused():
    hidden, base, weight, base_weight = inputs(4, 8, 3)
    for arguments, message in [
        ((hidden, base[:3], weight), "must be"),
        ((hidden, base, weight, base_weight[:2]), "must be"),
        ((hidden, base.bfloat16(), weight), "dtypes differ"),
        ((hidden, base, weight, base_weight.bfloat16()), "dtypes differ"),
        ((hidden, base, weight.clone().requires_grad_()), "must be frozen"),
        ((hidden, base, weight, base_weight.clone().requires_grad_()), "must be frozen"),
    ]:
        with pytest.raises(KernelError, match=message):
            linear_kl(*arguments)
    hidden.requires_grad_()
    kl = linear_kl(hidden, base, weight).total
    kl.backward(retain_graph=True)
    with pytest.raises(KernelError, match="second backward"):
        kl.backward()
