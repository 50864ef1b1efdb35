"""Loss and gradients against an independent fp64 computation, and proof that the bound can fail."""

import pytest
import torch

from versatune_kernels import linear_cross_entropy

CHUNK = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 5.0},
    "both": {"logit_scale": 0.5, "softcap": 8.0},
    "probability": {"softcap": 8.0, "by_probability": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 127, 1000])
@pytest.mark.parametrize("num_tokens", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 127])
def test_as_good_as_torch(tools, num_tokens, vocab_size, dtype, chunking_backend):
    ignored = 0.5 if num_tokens == 127 else 0.0
    case = tools.case(num_tokens, vocab_size=vocab_size, dtype=dtype, ignored=ignored)
    _, ours = tools.run(case, chunk_tokens=CHUNK, backend=chunking_backend)
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [32000, 50257, 128256, 151936, 152064])
@pytest.mark.parametrize("num_tokens", [5, CHUNK + 1])
def test_as_good_as_torch_over_a_real_vocabulary(
    tools, num_tokens, vocab_size, dtype, chunking_backend, monkeypatch
):
    """GPT-2's, Llama's and Qwen's: ragged tiles of the kernel, ragged blocks of `chunked`."""
    if chunking_backend == "triton":
        monkeypatch.setattr("versatune_kernels.triton_backend.VOCAB_TILE", 4096)
    case = tools.case(num_tokens, hidden_size=16, vocab_size=vocab_size, dtype=dtype)
    _, ours = tools.run(case, chunk_tokens=CHUNK, backend=chunking_backend)
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [7, 1000])
def test_sixteen_bit_logits_are_as_good_as_torchs(tools, vocab_size, dtype, triton_backend):
    case = tools.case(vocab_size=vocab_size, dtype=dtype)
    exact = tools.torch_answer(case, torch.float64)
    errors = {}
    for logits_dtype in ("fp32", "compute"):
        _, ours = tools.run(case, chunk_tokens=CHUNK, backend="triton", logits_dtype=logits_dtype)
        assert tools.worse_than_torch(case, ours) == {}
        errors[logits_dtype] = tools.error(ours.token_loss, exact.token_loss)
    assert errors["fp32"] < errors["compute"] / 10, "logits_dtype changed nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 1000])
def test_reference_is_as_good_as_torch(tools, vocab_size, dtype):
    case = tools.case(vocab_size=vocab_size, dtype=dtype)
    _, ours = tools.run(case, backend="reference")
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(tools, name, dtype, backend):
    weights = torch.rand(30, generator=torch.Generator().manual_seed(1))
    case = tools.case(30, dtype=dtype, token_weight=weights, **OPTIONS[name])
    _, ours = tools.run(case, backend=backend, chunk_tokens=CHUNK)
    assert tools.worse_than_torch(case, ours) == {}
    without = tools.replace(case, options={"normalizer": case.options["normalizer"]})
    assert "loss" in tools.worse_than_torch(without, ours), "the option changed nothing"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_confident_targets_keep_their_gradient(tools, dtype, chunking_backend):
    """p of about 0.9995 rounds to 1 in bf16, so p - 1 must be formed before rounding."""
    case = tools.case(sigma=0.0, vocab_size=7, ignored=0.0, dtype=dtype)
    case.weight[3] = 0.25
    case.hidden.copy_(case.hidden.abs() / 4 + 1)
    case.labels.fill_(3)
    _, ours = tools.run(case, chunk_tokens=CHUNK, backend=chunking_backend)
    assert 1e-5 < float(ours.loss) < 1e-2, "the targets are not confident"
    assert tools.worse_than_torch(case, ours) == {}

    p = (case.hidden.float() @ case.weight.float().T).softmax(1).to(dtype)
    d_logits = (p - torch.eye(7, dtype=dtype)[case.labels]) / case.options["normalizer"]
    too_early = tools.replace(ours, d_weight=d_logits.float().T @ case.hidden.float())
    if dtype == torch.bfloat16:
        assert "d_weight" in tools.worse_than_torch(case, too_early)


def test_fp16_gradients_do_not_underflow_with_a_large_normalizer(tools, chunking_backend):
    """1/N inside fp16 gradients of the logits would flush all but the largest to zero."""
    case = tools.case(dtype=torch.float16, vocab_size=127, normalizer=2.0**18)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, case.labels, backend=chunking_backend, **case.options).loss
    (loss * 2.0**18).backward()  # a loss scaler
    unit = tools.replace(case, options={"normalizer": 1.0})
    exact = tools.torch_answer(unit, torch.float64)
    assert tools.error(hidden.grad, exact.d_hidden) < 2e-3
    assert tools.error(weight.grad, exact.d_weight) < 2e-3


def test_fp16_weight_gradient_does_not_overflow_before_it_is_normalized(tools, chunking_backend):
    """Summed over tokens this gradient exceeds 65504; divided by N it does not."""
    case = tools.case(200, hidden_size=4, vocab_size=7, dtype=torch.float16, ignored=0.0)
    case.hidden.fill_(600.0)
    case.weight.zero_()
    case.labels.fill_(2)
    _, ours = tools.run(case, backend=chunking_backend)
    exact = tools.torch_answer(case, torch.float64)
    assert exact.d_weight.abs().max() * case.options["normalizer"] > 65504
    assert tools.error(ours.d_weight, exact.d_weight) < 2e-3


# ---- the bound must be able to fail -------------------------------------------------------------


def _wrong_target(tools, case, ours):
    labels = case.labels.clone()
    first = int(case.valid.nonzero()[0])
    labels[first] = (labels[first] + 1) % case.weight.shape[0]
    return tools.run(tools.replace(case, labels=labels))[1]


def _last_chunk_dropped(tools, case, ours):
    labels = case.labels.clone()
    labels[-20:] = -100
    return tools.run(tools.replace(case, labels=labels))[1]


MUTANTS = {
    "negated d_hidden": (lambda t, c, a: t.replace(a, d_hidden=-a.d_hidden), {"d_hidden"}),
    "negated d_weight": (lambda t, c, a: t.replace(a, d_weight=-a.d_weight), {"d_weight"}),
    "d_hidden 5 % too large": (
        lambda t, c, a: t.replace(a, d_hidden=a.d_hidden * 1.05),
        {"d_hidden"},
    ),
    "d_weight 5 % too small": (
        lambda t, c, a: t.replace(a, d_weight=a.d_weight * 0.95),
        {"d_weight"},
    ),
    "d_weight off by one class": (
        lambda t, c, a: t.replace(a, d_weight=a.d_weight.roll(1, 0)),
        {"d_weight"},
    ),
    "tokens off by one": (
        lambda t, c, a: t.replace(a, token_loss=a.token_loss.roll(1), d_hidden=a.d_hidden.roll(1, 0)),
        {"token_loss", "d_hidden"},
    ),
    "one zero row": (
        lambda t, c, a: t.replace(a, d_hidden=a.d_hidden * (torch.arange(len(a.d_hidden)) != 25)[:, None]),
        {"d_hidden"},
    ),
    "last chunk dropped": (_last_chunk_dropped, {"loss", "token_loss", "d_hidden", "d_weight"}),
    "one wrong target": (_wrong_target, {"loss", "token_loss", "d_hidden", "d_weight"}),
    "NaN loss": (lambda t, c, a: t.replace(a, loss=a.loss * float("nan")), {"loss"}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_the_bound_rejects_a_broken_answer(tools, name, dtype):
    mutate, broken_parts = MUTANTS[name]
    case = tools.case(dtype=dtype, ignored=0.0)
    _, ours = tools.run(case)
    assert tools.worse_than_torch(case, ours) == {}
    assert broken_parts <= set(tools.worse_than_torch(case, mutate(tools, case, ours)))
