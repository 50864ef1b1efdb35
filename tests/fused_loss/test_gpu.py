"""What only a GPU can show: the Triton backend compiled, large, without waiting, captured, repeated.

    python -m pytest tests/fused_loss -m gpu
    VERSATUNE_GPU_TESTS_ON_CPU=1 python -m pytest tests/fused_loss/test_gpu.py    # minutes

The case tables of the other files run in Triton's interpreter; the decisive ones are repeated here. The
second command runs them in the interpreter too, with few rows, so that a slip in a test's body does not
wait for a GPU; those that need CUDA itself are skipped.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from versatune_kernels import KernelError, linear_cross_entropy, resolve_backend
from versatune_kernels.contract import Spec
from versatune_kernels.sizing import triton_chunks

ON_CPU = os.environ.get("VERSATUNE_GPU_TESTS_ON_CPU") == "1"
DEVICE = "cpu" if ON_CPU else "cuda"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_CPU or torch.cuda.is_available()), reason="needs a CUDA device"),
    pytest.mark.skipif(IS_INTERPRETED and not ON_CPU, reason="TRITON_INTERPRET=1: nothing is compiled"),
    pytest.mark.skipif(ON_CPU and not IS_INTERPRETED, reason="TRITON_INTERPRET is not 1"),
]
needs_cuda = pytest.mark.skipif(ON_CPU, reason="needs CUDA itself")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"logit_scale": 0.5, "softcap": 8.0}


@pytest.fixture(autouse=True)
def rounding(request):
    if ON_CPU:  # the interpreter truncates, where GPUs round
        request.getfixturevalue("triton_backend").VOCAB_TILE = 4096  # small ones cost minutes here


def rows(on_gpu: int) -> int:
    """Tokens of a case: the interpreter takes up to a second for each."""
    return min(on_gpu, 10) if ON_CPU else on_gpu


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
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    return tools.replace(
        case,
        hidden=case.hidden.to(DEVICE),
        weight=case.weight.to(DEVICE),
        labels=case.labels.to(DEVICE),
        options=options,
    )


@needs_cuda
def test_the_backend_is_the_default_here():
    chosen = resolve_backend("auto", "cuda")
    assert chosen.name == "triton", chosen.reason


@pytest.mark.parametrize("logits_dtype", ["fp32", "compute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 127, 1000, 32000, 50257, 128256, 151936, 152064])
def test_as_good_as_torch(tools, vocab_size, dtype, logits_dtype):
    case = _on_gpu(tools, tools.case(rows(257), hidden_size=64, vocab_size=vocab_size, dtype=dtype))
    _, ours = tools.run(case, backend="triton", chunk_tokens=rows(128), logits_dtype=logits_dtype)
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("logits_dtype", ["fp32", "compute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [32_001, 50_257, 128_257])
def test_the_last_tile_of_a_ragged_vocabulary(tools, vocab_size, dtype, logits_dtype):
    """The last class is the most likely one, and the label of every second token."""
    case = tools.case(rows(64), hidden_size=64, vocab_size=vocab_size, dtype=dtype, ignored=0.0)
    case.weight[-1] = 3 * case.hidden.float().mean(0).to(dtype) + 2 * case.weight[-2]
    case.labels[::2] = vocab_size - 1
    case = _on_gpu(tools, case)
    _, ours = tools.run(case, backend="triton", logits_dtype=logits_dtype)
    assert tools.worse_than_torch(case, ours) == {}
    assert ours.d_weight[-1].abs().max() > 0.1 * ours.d_weight.abs().max()  # it does count


@pytest.mark.parametrize("num_tokens", [8, 64])
def test_few_rows_with_torchs_own_settings(tools, num_tokens):
    """dX sums 152,064 products, and torch allows 16-bit partial sums unless told otherwise. What is
    asked for is an error within twice that of exact sums."""
    case = tools.case(
        rows(num_tokens), hidden_size=512, vocab_size=152_064, dtype=torch.bfloat16, ignored=0.0
    )
    case = _on_gpu(tools, case)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    _, ours = tools.run(case, backend="triton")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_several_chunks_and_sums(tools, dtype):
    """Seven chunks and a ragged eighth (three in the interpreter); dW is summed in fp32."""
    num_tokens, chunk = rows(1000), 4 if ON_CPU else 128
    case = _on_gpu(tools, tools.case(num_tokens, hidden_size=64, vocab_size=9001, dtype=dtype, ignored=0.0))
    case.labels[num_tokens // 3 :: 7] = -100
    case = tools.replace(case, options={"normalizer": float(case.valid.sum())})
    ids = torch.arange(num_tokens, device=DEVICE) * 5 // num_tokens
    options = {"sample_ids": ids, "num_samples": 6}
    out, ours = tools.run(case, backend="triton", chunk_tokens=chunk, **options)
    assert tools.worse_than_torch(case, ours) == {}
    exact, torchs = (tools.torch_answer(case, d).token_loss.double() for d in (torch.float64, dtype))
    for found, power in ((out.sample_loss, 1), (out.sample_loss_sq, 2)):
        by_hand, by_torch = (
            torch.stack([(nll[ids == i] ** power).sum() for i in range(6)]) for nll in (exact, torchs)
        )
        assert tools.error(found, by_hand) <= 2 * tools.error(by_torch, by_hand) + 2e-6
    counts = torch.stack([case.valid[ids == i].sum() for i in range(6)])
    assert out.sample_tokens.equal(counts)


@pytest.mark.parametrize("layout", ["rows apart", "features apart", "transposed", "three dimensions"])
def test_strided_hidden_states(tools, layout):
    n = rows(96) // 2 * 2
    case = _on_gpu(tools, tools.case(n, hidden_size=64, vocab_size=9001, dtype=torch.bfloat16))
    _, expected = tools.run(case, backend="triton")
    base = {
        "rows apart": lambda x: torch.stack([x, x + 1], 1).flatten(1),
        "features apart": lambda x: torch.stack([x, x + 1], 2).flatten(1),
        "transposed": lambda x: x.T.contiguous(),
        "three dimensions": lambda x: torch.stack([x, x + 1], 1).reshape(2, n // 2, 128),
    }[layout](case.hidden).requires_grad_()
    view = {
        "rows apart": lambda x: x[:, :64],
        "features apart": lambda x: x[:, ::2],
        "transposed": lambda x: x.T,
        "three dimensions": lambda x: x[..., :64],
    }[layout]
    weight = case.weight.clone().requires_grad_()
    assert not view(base).is_contiguous()
    linear_cross_entropy(view(base), weight, case.labels, backend="triton", **case.options).loss.backward()
    torch.testing.assert_close(view(base.grad).reshape(n, 64), expected.d_hidden)
    torch.testing.assert_close(weight.grad, expected.d_weight)


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
    case = _on_gpu(tools, tools.case(rows(300), vocab_size=32001, dtype=dtype))
    ids = torch.arange(rows(300), device=DEVICE) // 7
    options = {"sample_ids": ids, "num_samples": 43}
    outs = [tools.run(case, backend=b, **options)[0] for b in ("triton", "chunked")]
    for found, expected in zip(*outs, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
    assert outs[0].sample_tokens.equal(outs[1].sample_tokens)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_bad_row_touches_its_own_sums_only(tools, dtype, value):
    n = rows(80)
    bad, sample = n // 2 + 1, (n // 2 + 1) * 10 // n
    case = _on_gpu(tools, tools.case(n, vocab_size=9001, dtype=dtype, ignored=0.0))
    ids = torch.arange(n, device=DEVICE) * 10 // n
    options = {"sample_ids": ids, "num_samples": 10, "backend": "triton", "chunk_tokens": n // 4}
    clean, clean_answer = tools.run(case, **options)
    case.hidden[bad] = value
    out, answer = tools.run(case, **options)
    others, tokens = torch.arange(10) != sample, torch.arange(n) != bad
    assert out.loss.isnan() and out.sample_loss[sample].isnan() and out.token_loss[bad].isnan()
    assert out.token_loss[tokens].equal(clean.token_loss[tokens])
    assert out.sample_loss[others].equal(clean.sample_loss[others])
    assert out.sample_tokens.equal(clean.sample_tokens)
    assert answer.d_hidden[tokens].equal(clean_answer.d_hidden[tokens])


@pytest.mark.parametrize("label", [9001, -1, 2**32])
def test_a_bad_label_has_a_text_of_ours(tools, label):
    case = _on_gpu(tools, tools.case(8, vocab_size=9001, dtype=torch.bfloat16, ignored=0.0))
    case.labels[5] = label
    with pytest.raises(KernelError, match=f"label {label} of token 5 is outside 0..9000"):
        tools.run(case, backend="triton", validate=True)
    out, _ = tools.run(case, backend="triton", validate=False)
    assert out.token_loss.isnan().nonzero().flatten().tolist() == [5]


BAD_LABEL = """
import torch
from versatune_kernels import linear_cross_entropy
x, w = (torch.ones(n, 64, dtype=torch.bfloat16, device="DEVICE", requires_grad=True) for n in (8, 1000))
labels = torch.tensor([0, 1, 2, 3, 1000, 5, 6, 7], device="DEVICE")
linear_cross_entropy(x, w, labels, num_valid=8, backend="triton").loss.backward()
torch.cuda.synchronize()
"""


def test_a_bad_label_that_nobody_waited_for_is_told_at_the_end():
    """The device stops and names us, and what to do; in a process of its own, which it costs."""
    script = BAD_LABEL.replace("DEVICE", DEVICE)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    expected = "label 1000 of token 4" if ON_CPU else "versatune_kernels: bad input; use validate=True"
    assert done.returncode != 0 and expected in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ten_runs_are_bitwise_equal(tools, dtype):
    n = rows(3000)
    case = _on_gpu(tools, tools.case(n, hidden_size=512, vocab_size=32001, dtype=dtype))
    ids = torch.arange(n, device=DEVICE) % 17

    def run():
        out, answer = tools.run(
            case, backend="triton", sample_ids=ids, num_samples=17, chunk_tokens=rows(1024)
        )
        return [t.detach() for t in out] + [answer.d_hidden, answer.d_weight]

    first = run()
    for _ in range(1 if ON_CPU else 9):
        assert all(a.equal(b) for a, b in zip(first, run(), strict=True))


@needs_cuda
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
    n = rows(500)
    case = _on_gpu(tools, tools.case(n, vocab_size=9001, dtype=torch.bfloat16))
    ids = torch.arange(n, device=DEVICE) * 10 // n
    divisor = 35.0 if normalizer == "float" else torch.tensor(35.0, device=DEVICE)
    num_valid = int(case.valid.sum())
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def step():
        out = linear_cross_entropy(
            hidden,
            weight,
            case.labels,
            sample_ids=ids,
            num_samples=10,
            normalizer=divisor,
            num_valid=num_valid,
            backend="triton",
        )
        out.loss.backward()

    step()  # compiles
    if ON_CPU:
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_serves_other_batches(tools):
    """Captured with room for all rows (num_valid = N); replayed with other tokens and other masks."""
    cases = [
        _on_gpu(tools, tools.case(rows(200), vocab_size=9001, dtype=torch.bfloat16, seed=seed))
        for seed in range(3)
    ]
    weight = cases[0].weight.clone().requires_grad_()
    hidden = cases[0].hidden.clone().requires_grad_()
    labels = cases[0].labels.clone()
    ids = torch.arange(len(labels), device=DEVICE) * 10 // len(labels)

    def step():
        hidden.grad = weight.grad = None
        options = {"sample_ids": ids, "num_samples": 10, "num_valid": len(labels), "validate": False}
        out = linear_cross_entropy(hidden, weight, labels, backend="triton", **options)
        out.loss.backward()
        return out

    if ON_CPU:
        step()
        return
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
    case = _on_gpu(tools, tools.case(rows(200), vocab_size=9001, dtype=torch.bfloat16))
    body = nn.Linear(32, 32, dtype=torch.bfloat16, device=DEVICE)
    weight = nn.Parameter(case.weight)

    def model(x):
        return linear_cross_entropy(torch.tanh(body(x)), weight, case.labels, normalizer=9.0).loss

    model(case.hidden).backward()
    expected = weight.grad.clone()
    weight.grad = None
    torch.compile(model, fullgraph=True)(case.hidden).backward()
    torch.testing.assert_close(weight.grad, expected, rtol=2e-2, atol=1e-3)


WORKSPACE_BYTES = 2**25
"""Of one cuBLAS handle on Hopper by torch's default (8.1 MiB before); held in torch's allocator for as long
as the process runs. cuBLASLt may take another for the length of a product."""


@needs_cuda
@pytest.mark.parametrize("chunk_tokens", [0, 1024])
@pytest.mark.parametrize("logits_dtype", ["fp32", "compute"])
def test_the_planned_memory_holds_on_the_device(chunk_tokens, logits_dtype):
    """Peak above the inputs: the chunk and its fp32 sum, both gradients, one gathered chunk."""
    n, h, v = 16_384, 1024, 152_064
    hidden = torch.randn(n, h, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(v, h, device="cuda").bfloat16().mul_(0.03).requires_grad_()
    labels = torch.randint(0, v, (n,), device="cuda")
    spec = Spec(1.0, 0.0, logits_dtype, chunk_tokens, grad_hidden=True, grad_weight=True)
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    chunk, fp32_sum = triton_chunks(spec, n, h, v, torch.bfloat16, multiprocessors)
    options = {"backend": "triton", "chunk_tokens": chunk_tokens or "auto", "logits_dtype": logits_dtype}
    # The same kinds of products on a few rows: every handle takes its workspace now.
    linear_cross_entropy(hidden[:256], weight, labels[:256], **options).loss.backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, num_valid=n, **options).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    size = 4 if logits_dtype == "fp32" else 2
    planned = chunk * v * size + fp32_sum * v * h * 4
    gradients = n * h * 2 + v * h * 2
    per_token = 256 * n  # labels, ids, masks and losses: about twenty vectors of 8 bytes and their sort
    assert peak <= planned + gradients + n * h * 2 + per_token + 2 * WORKSPACE_BYTES
