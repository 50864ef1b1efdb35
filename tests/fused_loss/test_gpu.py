"""What only a GPU can show: the Triton backend compiled, large, without waiting, captured, repeated.

    python -m pytest tests/fused_loss -m gpu

The case tables of the other files run in Triton's interpreter; the decisive ones are repeated here.
"""

import os

import pytest
import torch
from torch import nn

from versatune_kernels import linear_cross_entropy, resolve_backend
from versatune_kernels.contract import Effort
from versatune_kernels.sizing import triton_chunks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"z_loss": 1e-3, "label_smoothing": 0.1, "logit_scale": 0.5, "softcap": 8.0}


@pytest.fixture(autouse=True)
def exact_products():
    """TF32 and 16-bit partial sums would be compared with torch's own, but blur the comparison."""
    settings = torch.backends.cuda.matmul
    names = (
        "allow_tf32",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_reduced_precision_reduction",
    )
    was = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in was.items():
        setattr(settings, name, value)


def _on_gpu(tools, case):
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    return tools.replace(
        case,
        hidden=case.hidden.cuda(),
        weight=case.weight.cuda(),
        labels=case.labels.cuda(),
        options=options,
    )


def test_the_backend_is_the_default_here():
    chosen = resolve_backend("auto", "cuda")
    assert chosen.name == "triton", chosen.reason


@pytest.mark.parametrize("logits_dtype", ["fp32", "compute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 127, 1000, 32000, 50257, 128256, 151936, 152064])
def test_as_good_as_torch(tools, vocab_size, dtype, logits_dtype):
    case = _on_gpu(tools, tools.case(257, hidden_size=64, vocab_size=vocab_size, dtype=dtype))
    _, ours = tools.run(case, backend="triton", chunk_tokens=128, logits_dtype=logits_dtype)
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 129])
def test_every_option_and_irregular_lengths(tools, num_tokens, dtype):
    weights = torch.rand(num_tokens, generator=torch.Generator().manual_seed(1))
    case = tools.case(num_tokens, vocab_size=9001, dtype=dtype, token_weight=weights, **EVERYTHING)
    case = _on_gpu(tools, case)
    _, ours = tools.run(case, backend="triton", chunk_tokens=64)
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_chunked(tools, dtype):
    case = _on_gpu(tools, tools.case(300, vocab_size=32001, dtype=dtype))
    ids = torch.arange(300, device="cuda") // 7
    options = {"sample_ids": ids, "num_samples": 43, "domain_ids": ids % 5, "num_domains": 6}
    outs = [tools.run(case, backend=b, **options)[0] for b in ("triton", "chunked")]
    for found, expected in zip(*outs, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert outs[0].sample_tokens.equal(outs[1].sample_tokens)


def test_a_nan_row_touches_its_own_sums_only(tools):
    case = _on_gpu(tools, tools.case(80, vocab_size=9001, ignored=0.0))
    ids = torch.arange(80, device="cuda") // 8
    options = {"sample_ids": ids, "num_samples": 10, "backend": "triton"}
    clean, clean_answer = tools.run(case, **options)
    case.hidden[33] = float("nan")
    out, answer = tools.run(case, **options)
    others, tokens = torch.arange(10) != 4, torch.arange(80) != 33
    assert out.loss.isnan() and out.sample_loss[4].isnan()
    assert out.sample_loss[others].equal(clean.sample_loss[others])
    assert answer.d_hidden[tokens].equal(clean_answer.d_hidden[tokens])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ten_runs_are_bitwise_equal(tools, dtype):
    case = _on_gpu(tools, tools.case(3000, hidden_size=512, vocab_size=32001, dtype=dtype))
    ids = torch.arange(3000, device="cuda") % 17

    def run():
        out, answer = tools.run(case, backend="triton", sample_ids=ids, num_samples=17, chunk_tokens=1024)
        return [t.detach() for t in out] + [answer.d_hidden, answer.d_weight]

    first = run()
    for _ in range(9):
        assert all(a.equal(b) for a, b in zip(first, run(), strict=True))


def test_more_than_2_to_the_31_logits_in_one_chunk():
    """The last of 14,200 rows starts beyond 2^31 elements; it must equal the same row alone."""
    free, _ = torch.cuda.mem_get_info()
    if free < 20e9:
        pytest.skip(f"needs 20 GB of free memory, {free / 1e9:.0f} are")
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(14_200, 64, generator=g, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(152_064, 64, generator=g, device="cuda").bfloat16().mul_(0.3)
    labels = torch.randint(0, 152_064, (14_200,), generator=g, device="cuda")
    out = linear_cross_entropy(hidden, weight, labels, backend="triton", chunk_tokens=14_200)
    out.loss.backward()
    tail = hidden[-100:].detach().requires_grad_()
    expected = linear_cross_entropy(tail, weight, labels[-100:], backend="triton")
    expected.loss.backward()
    torch.testing.assert_close(out.token_loss[-100:], expected.token_loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.grad[-100:], tail.grad)


@pytest.mark.parametrize("normalizer", ["float", "tensor"])
def test_the_host_never_waits(tools, normalizer):
    case = _on_gpu(tools, tools.case(500, vocab_size=9001, dtype=torch.bfloat16))
    ids = torch.arange(500, device="cuda") // 50
    divisor = 35.0 if normalizer == "float" else torch.tensor(35.0, device="cuda")
    num_valid = int(case.valid.sum())
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def step():
        out = linear_cross_entropy(
            hidden,
            weight,
            case.labels,
            sample_ids=ids,
            num_samples=10,
            domain_ids=ids % 3,
            num_domains=3,
            normalizer=divisor,
            num_valid=num_valid,
            backend="triton",
        )
        out.loss.backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_serves_other_batches(tools):
    """Captured with room for all rows (num_valid = N); replayed with other tokens and other masks."""
    cases = [
        _on_gpu(tools, tools.case(200, vocab_size=9001, dtype=torch.bfloat16, seed=seed)) for seed in range(3)
    ]
    weight = cases[0].weight.clone().requires_grad_()
    hidden = cases[0].hidden.clone().requires_grad_()
    labels = cases[0].labels.clone()
    ids = torch.arange(200, device="cuda") // 20

    def step():
        hidden.grad = weight.grad = None
        options = {"sample_ids": ids, "num_samples": 10, "num_valid": 200, "validate": False}
        out = linear_cross_entropy(hidden, weight, labels, backend="triton", **options)
        out.loss.backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for case in cases[1:]:
        with torch.no_grad():
            hidden.copy_(case.hidden)
            labels.copy_(case.labels)
        graph.replay()
        fresh = linear_cross_entropy(
            hidden.detach(), weight.detach(), labels, sample_ids=ids, num_samples=10, backend="triton"
        )
        torch.testing.assert_close(out.loss.detach(), fresh.loss, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.sample_loss, fresh.sample_loss, rtol=1e-4, atol=1e-4)
        assert weight.grad.isfinite().all()


def test_torch_compile(tools):
    case = _on_gpu(tools, tools.case(200, vocab_size=9001, dtype=torch.bfloat16))
    body = nn.Linear(32, 32, dtype=torch.bfloat16, device="cuda")
    weight = nn.Parameter(case.weight)

    def model(x):
        return linear_cross_entropy(torch.tanh(body(x)), weight, case.labels, normalizer=9.0).loss

    model(case.hidden).backward()
    expected = weight.grad.clone()
    weight.grad = None
    torch.compile(model, fullgraph=True)(case.hidden).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("budget", [None, 2_000_000_000, 1_300_000_000])
@pytest.mark.parametrize("logits_dtype", ["fp32", "compute"])
def test_the_memory_budget_holds_on_the_device(budget, logits_dtype):
    """Peak above the inputs: budget (or the rule's chunk), both gradients, one gathered chunk."""
    n, h, v = 16_384, 1024, 152_064
    hidden = torch.randn(n, h, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(v, h, device="cuda").bfloat16().mul_(0.03).requires_grad_()
    labels = torch.randint(0, v, (n,), device="cuda")
    torch.mm(hidden[:8].detach(), weight.detach().T)  # cuBLAS takes its workspace now
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(
        hidden,
        weight,
        labels,
        num_valid=n,
        backend="triton",
        memory_budget=budget,
        logits_dtype=logits_dtype,
    ).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    size = 4 if logits_dtype == "fp32" else 2
    effort = Effort(True, True, 0, budget or 0, logits_dtype)
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    rows, fp32_sum = triton_chunks(effort, n, h, v, torch.bfloat16, multiprocessors)
    planned = rows * v * size + fp32_sum * v * h * 4
    assert budget is None or planned <= budget
    gradients = n * h * 2 + v * h * 2
    assert peak <= planned + gradients + n * h * 2 + 64e6
