"""`linear_kl` against plain log_softmax in float64, its memory, and what it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from versatune_kernels import KernelError, linear_kl

SHAPES = [(1, 8, 3), (47, 31, 123), (300, 16, 777)]


def inputs(rows, width, vocab, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    hidden, base = torch.randn(2, rows, width, generator=generator).to(dtype)
    return hidden, base, torch.randn(vocab, width, generator=generator).to(dtype)


def plain(hidden, base, weight, upstream, compute=torch.float64, scale=1.0, softcap=0.0):
    """KL and the gradient of upstream @ KL, as autograd has it."""
    hidden = hidden.to(compute, copy=True).requires_grad_()
    logits = [x @ weight.to(compute).T * scale for x in (hidden, base.to(compute))]
    if softcap:
        logits = [softcap * torch.tanh(x / softcap) for x in logits]
    log_p, log_q = (x.log_softmax(-1) for x in logits)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    (kl.float() @ upstream).backward()
    return kl.detach(), hidden.grad


def ours(hidden, base, weight, upstream, **options):
    hidden = hidden.clone().requires_grad_()
    kl = linear_kl(hidden, base, weight, **options)
    (kl @ upstream).backward()
    return kl.detach(), hidden.grad


def error(found, exact):
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.3, 5.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_float64(shape, scale, softcap, chunk):
    case, upstream = inputs(*shape), torch.randn(shape[0], generator=torch.Generator().manual_seed(9))
    options = {"scale": scale, "softcap": softcap}
    kl, gradient = ours(*case, upstream, logit_scale=scale, softcap=softcap, chunk_tokens=chunk)
    exact = plain(*case, upstream, **options)
    torch32 = plain(*case, upstream, torch.float32, **options)
    assert exact[0].min() > 0.01
    for mine, theirs, answer in zip((kl, gradient), torch32, exact, strict=True):
        assert error(mine, answer) <= 2 * error(theirs, answer) + 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_errs_no_more_than_twice_as_far_as_torch(shape):
    case, upstream = inputs(*shape, dtype=torch.bfloat16), torch.ones(shape[0])
    exact, torch16 = plain(*case, upstream), plain(*case, upstream, torch.bfloat16)
    kl, gradient = ours(*case, upstream)
    assert gradient.dtype == torch.bfloat16
    assert error(kl, exact[0]) <= 2e-6  # logits and softmax are fp32
    assert error(gradient, exact[1]) <= 2 * error(torch16[1], exact[1]) + 2**-8


def test_the_direction_is_from_the_base():
    """q = (1/2, 1/2) against p = (e / (1 + e), 1 / (1 + e)): by hand, and not the same the other way."""
    even, tilted, weight = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.eye(2)
    p = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(-1)
    by_hand = float((0.5 * (0.5 / p).log()).sum())
    assert linear_kl(tilted, even, weight).item() == pytest.approx(by_hand, rel=1e-6)
    assert linear_kl(even, tilted, weight).item() != pytest.approx(by_hand, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_hidden_states_give_nothing_at_all(dtype):
    hidden, _, weight = inputs(47, 31, 123, dtype)
    kl, gradient = ours(hidden, hidden, weight, torch.ones(47))
    assert not kl.any() and not gradient.any()


def test_no_rows_are_fine():
    hidden, base, weight = inputs(0, 8, 3)
    kl, gradient = ours(hidden, base, weight, torch.ones(0))
    assert kl.shape == (0,) and gradient.shape == (0, 8)


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
    hidden, base, weight = inputs(rows, width, vocab)
    with Largest() as largest:
        ours(hidden, base, weight, torch.ones(rows))
    assert 0 < largest.elements <= 2 * 128 * vocab < rows * vocab / 2


def test_what_cannot_be_computed_is_refused():
    hidden, base, weight = inputs(4, 8, 3)
    for arguments, message in [
        ((hidden, base[:3], weight), "must be"),
        ((hidden, base.bfloat16(), weight), "dtypes differ"),
        ((hidden, base, weight.clone().requires_grad_()), "must be frozen"),
    ]:
        with pytest.raises(KernelError, match=message):
            linear_kl(*arguments)
    hidden.requires_grad_()
    kl = linear_kl(hidden, base, weight).sum()
    kl.backward(retain_graph=True)
    with pytest.raises(KernelError, match="second backward"):
        kl.backward()
