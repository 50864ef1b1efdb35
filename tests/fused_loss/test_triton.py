"""The Triton kernels themselves: broken ones are noticed, every output is written, GPUs' code compiles.

What holds for all backends alike is tested in the other files, over the same cases.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from versatune_kernels import linear_cross_entropy

COMPILER = Path(__file__).with_name("compile_kernels.py")
NUM_SAMPLES = 4
MAX_ROW_REGISTERS = 128
"""Of 65,536 a multiprocessor: two programs of 256 threads at a time hide each other's loads."""


def _case(tools, dtype):
    """150 classes are two tiles of 64 and a ragged third; the last class is the label of two tokens."""
    weights = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5
    case = tools.case(24, vocab_size=150, dtype=dtype, ignored=0.2, token_weight=weights)
    case.options.update(z_loss=1e-3, label_smoothing=0.1, logit_scale=0.5, softcap=8.0)
    case.labels[:4] = torch.tensor([149, 0, 149, 63])
    case.weight[149] = 2 * case.weight[148]  # the last class matters
    return case


def _broken(tools, case, logits_dtype="fp32"):
    """Names of the parts of an answer that break their bound, sums included."""
    ids = torch.arange(24) // 6
    out, ours = tools.run(
        case,
        backend="triton",
        logits_dtype=logits_dtype,
        sample_ids=ids,
        num_samples=NUM_SAMPLES,
        normalizer=case.options["normalizer"],
    )
    broken = set(tools.worse_than_torch(case, ours))
    exact = tools.torch_answer(case, torch.float64).token_loss
    torchs = tools.torch_answer(case, case.hidden.dtype).token_loss
    for name, found, power in (
        ("sample_loss", out.sample_loss, 1),
        ("sample_loss_sq", out.sample_loss_sq, 2),
    ):
        by_torch, by_hand = (
            torch.stack([(nll[ids == i] ** power).sum() for i in range(NUM_SAMPLES)])
            for nll in (torchs.double(), exact)
        )
        if not tools.error(found, by_hand) <= 2 * tools.error(by_torch, by_hand) + 2e-6:
            broken.add(name)
    counts = torch.stack([case.valid[ids == i].sum() for i in range(NUM_SAMPLES)])
    if not out.sample_tokens.equal(counts):
        broken.add("sample_tokens")
    return broken


# name -> (text in the source, what it becomes, parts of the answer that must break)
LOSS_LOOP = "range(0, VOCAB_SIZE, TILE):\n        cols = start + tl.arange(0, TILE)\n        inside"
GRADIENT_LOOP = LOSS_LOOP.replace("\n        ", "\n            ")
MUTANTS = {
    "negated gradient": (
        "grad.to(grad_ptr.dtype.element_ty), mask=inside",
        "(-grad).to(grad_ptr.dtype.element_ty), mask=inside",
        {"d_hidden", "d_weight"},
    ),
    "gradient 5 % too large": (
        "factor = token_weight * logit_scale *",
        "factor = 1.05 * token_weight * logit_scale *",
        {"d_hidden", "d_weight"},
    ),
    "sums off by one sample": (
        "ids == segment",
        "ids == segment + 1",
        {"sample_loss", "sample_loss_sq", "sample_tokens"},
    ),
    "last tile of tokens dropped": (
        "while start < num_tokens:",
        "while start + TILE < num_tokens:",
        {"sample_loss", "sample_tokens"},
    ),
    "squares are not squared": ("value * value", "value", {"sample_loss_sq"}),
    "last tile of the vocabulary dropped from the loss": (
        LOSS_LOOP,
        LOSS_LOOP.replace("VOCAB_SIZE", "VOCAB_SIZE - TILE"),
        {"loss", "token_loss", "d_hidden"},
    ),
    "last tile of the vocabulary dropped from the gradient": (
        GRADIENT_LOOP,
        GRADIENT_LOOP.replace("VOCAB_SIZE", "VOCAB_SIZE - TILE"),
        {"d_hidden", "d_weight"},
    ),
    "columns beyond the vocabulary count": (
        'z = tl.where(inside, z, -float("inf"))',
        "z = tl.where(inside, z, 0.0)",
        {"token_loss"},
    ),
    "label V - 1 is no class": (
        "(label < VOCAB_SIZE)",
        "(label < VOCAB_SIZE - 1)",
        {"loss", "token_loss"},
    ),
    "label V - 1 gets no gradient": (
        "cols == label",
        "(cols == label) & (cols < VOCAB_SIZE - 1)",
        {"d_hidden", "d_weight"},
    ),
    "target of the neighbour": (
        "tl.load(logits_ptr + label,",
        "tl.load(logits_ptr + (label + 1) % VOCAB_SIZE,",
        {"loss", "token_loss"},
    ),
    "sum of exponentials not rescaled": (
        "exp_sum * tl.exp(top - shift)",
        "exp_sum",
        {"token_loss", "d_hidden"},
    ),
    "token weight only in the loss": (
        "factor = token_weight * logit_scale",
        "factor = logit_scale",
        {"d_hidden", "d_weight"},
    ),
    "normalizer forgotten": ("* tl.load(factor_ptr)", "", {"d_hidden", "d_weight"}),
    "z-loss only in the loss": ("(1.0 + 2.0 * z_loss * lse)", "1.0", {"d_hidden"}),
    "smoothing over the tile, not the vocabulary": (
        "logit_sum / VOCAB_SIZE",
        "logit_sum / TILE",
        {"loss"},
    ),
    "slope of the softcap forgotten": (
        "grad *= _capped_slope(z, softcap)",
        "grad *= 1.0",
        {"d_hidden", "d_weight"},
    ),
    "backward forgets the last factor": (
        "gradient * factor",
        "gradient",
        {"d_hidden", "d_weight"},
    ),
}


@pytest.fixture
def small_tiles(triton_backend, monkeypatch):
    monkeypatch.setattr(triton_backend, "VOCAB_TILE", 64)
    monkeypatch.setattr(triton_backend, "TOKEN_TILE", 16)
    return triton_backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_are_as_good_as_torch(tools, dtype, small_tiles):
    assert _broken(tools, _case(tools, dtype)) == set()


FP16_ONLY = {"backward forgets the last factor"}
"""In other dtypes that factor is 1."""
NOT_IN_BF16 = {*FP16_ONLY, "z-loss only in the loss"}
"""What the latter changes drowns in the rounding of bf16."""


@pytest.mark.parametrize(
    ("name", "dtype", "logits_dtype"),
    [(name, torch.float16 if name in FP16_ONLY else torch.float32, "fp32") for name in MUTANTS]
    + [
        (name, torch.bfloat16, logits_dtype)
        for name in MUTANTS
        if name not in NOT_IN_BF16
        for logits_dtype in ("fp32", "compute")
    ],
)
def test_a_broken_kernel_is_noticed(tools, name, dtype, logits_dtype, small_tiles, tmp_path, monkeypatch):
    old, new, parts = MUTANTS[name]
    source = Path(small_tiles.triton_kernels.__file__).read_text()
    assert old in source, "the kernel has changed: adapt this mutant"
    (tmp_path / "mutant.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", tmp_path / "mutant.py")
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr(small_tiles, "triton_kernels", mutant)
    assert parts <= _broken(tools, _case(tools, dtype), logits_dtype)


def test_a_first_tile_of_impossible_classes(tools, small_tiles):
    """All of the first tile's logits are -inf: its largest is no number that others may be measured from."""
    hidden, weight = torch.tensor([[1e30, 1.0]]), torch.zeros(150, 2)
    weight[:70, 0], weight[70:, 1] = -1e30, 1.0
    case = tools.replace(tools.case(1), hidden=hidden, weight=weight, labels=torch.tensor([149]))
    out, answer = tools.run(case, backend="triton")
    assert out.token_loss.item() == pytest.approx(math.log(80))
    assert answer.d_hidden.isfinite().all() and answer.d_weight.isfinite().all()


def test_offsets_beyond_2_to_the_31_elements(small_tiles):
    """The last row of a matrix of 4 GB, of which only three rows are touched: the others take no memory."""
    stride, vocab_size = 2**30 + 64, 150
    logits = torch.empty(2 * stride + vocab_size, dtype=torch.bfloat16)
    rows = logits.as_strided((3, vocab_size), (stride, 1))
    rows.copy_(torch.randn(3, vocab_size))
    exact = rows.double().log_softmax(1)
    nll, objective = torch.empty(3), torch.empty(3)
    labels = torch.tensor([3, 4, 149])
    switches = {"HAS_TOKEN_WEIGHT": False, "HAS_SMOOTHING": False, "HAS_SOFTCAP": False, "TRAINING": True}
    small_tiles.triton_kernels.row_kernel[(3,)](
        *(logits, logits, labels, None, torch.ones(()), nll, objective, stride, stride, -100),
        *(0.0, 0.0, 1.0, 0.0),
        VOCAB_SIZE=vocab_size,
        TILE=64,
        **switches,
    )
    torch.testing.assert_close(nll.double(), -exact[torch.arange(3), labels], rtol=1e-5, atol=1e-5)
    gradient = exact.exp() - torch.eye(vocab_size, dtype=torch.float64)[labels]
    torch.testing.assert_close(rows.double(), gradient, rtol=0.01, atol=1e-6)


@pytest.fixture
def poisoned_memory():
    """Whatever torch.empty gives holds NaN, or the largest integer."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.1])
def test_every_output_is_written(tools, dtype, ignored, small_tiles, poisoned_memory):
    case = tools.case(20, vocab_size=150, dtype=dtype, ignored=ignored)
    ids = torch.arange(20) % 3
    options = {"sample_ids": ids, "num_samples": 5, "domain_ids": ids, "num_domains": 4}
    out, answer = tools.run(case, backend="triton", chunk_tokens=8, **options)
    for tensor in (*out, answer.d_hidden, answer.d_weight):
        assert tensor.isfinite().all()
    assert out.sample_tokens.sum() == out.domain_tokens.sum() == case.valid.sum()
    assert not answer.d_hidden[~case.valid].any() and not out.token_loss[~case.valid].any()


@pytest.mark.parametrize("num_valid", [17, 20])
def test_rows_beyond_the_valid_ones_are_zero(tools, num_valid, small_tiles, poisoned_memory):
    """A captured CUDA graph has a fixed number of rows: num_valid may then exceed the true count."""
    case = tools.case(20, vocab_size=150)
    options = {"sample_ids": torch.arange(20) % 3, "num_samples": 3, "backend": "triton"}
    expected, expected_answer = tools.run(case, **options)
    assert case.valid.sum() < num_valid
    out, answer = tools.run(case, num_valid=num_valid, validate=False, **options)
    torch.testing.assert_close(tuple(out), tuple(expected))
    torch.testing.assert_close(answer.d_hidden, expected_answer.d_hidden)
    torch.testing.assert_close(answer.d_weight, expected_answer.d_weight)


@pytest.mark.parametrize("label", [150, 191, -1, 2**40])
def test_an_unchecked_label_that_is_no_class_gives_nan_in_its_row(tools, label, small_tiles):
    """Never a read of the neighbour's memory (191 is the padding of the row)."""
    case = tools.case(6, vocab_size=150, ignored=0.0)
    good = linear_cross_entropy(case.hidden, case.weight, case.labels, backend="triton")
    case.labels[2] = label
    bad = linear_cross_entropy(case.hidden, case.weight, case.labels, backend="triton", validate=False)
    others = torch.arange(6) != 2
    assert bad.loss.isnan() and bad.token_loss[2].isnan()
    assert bad.token_loss[others].equal(good.token_loss[others])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What Triton's compiler, which needs no GPU, makes of the kernels (`compile_kernels.py`)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'triton>=3.6'")
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, str(COMPILER)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("vocab_size", [32001, 50257, 128257, 151936, 152064])
def test_the_row_kernel_compiles_for_gpus(built, capability, vocab_size):
    """In registers alone, and guarded where its result takes the memory that it reads."""
    rows = [b for b in built if (b["capability"], b["vocab_size"]) == (capability, vocab_size)]
    assert {("*fp32", "*bf16"), ("*bf16", "*bf16"), ("*fp32", "*fp32")} <= {tuple(b["types"]) for b in rows}
    for kernel in rows:
        print(kernel)
        assert kernel["kernel"] == "row_kernel" and kernel["local_bytes"] == 0, kernel
        assert kernel["registers"] <= MAX_ROW_REGISTERS, kernel
        assert kernel["loads_16_bytes"] or vocab_size % 8, kernel
        assert kernel["barrier_between_load_and_store"] or not kernel["training"], kernel


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("name", "builds"), [("segment_kernel", 1), ("scale_kernel", 3)])
def test_the_other_kernels_compile_for_gpus(built, capability, name, builds):
    kernels = [b for b in built if (b["capability"], b["kernel"]) == (capability, name)]
    assert len(kernels) == builds
    for kernel in kernels:
        print(kernel)
        assert kernel["local_bytes"] == 0, kernel
        assert kernel["loads_16_bytes"] or name == "segment_kernel", kernel
