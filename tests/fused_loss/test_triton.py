"""The Triton kernels themselves: every output is written and nothing else, GPUs' code compiles.

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
from versatune_kernels.tokens import valid_tokens

SWITCHES = {"HAS_TOKEN_WEIGHT": False, "HAS_SOFTCAP": False, "BY_PROBABILITY": False, "TRAINING": True}
COMPILER = Path(__file__).with_name("compile_kernels.py")
NUM_SAMPLES = 4
MAX_SPILLED_BYTES = 24
"""Stack, stores and loads of one address: with a softcap and a ragged last tile ptxas rather spills that than
lose a program of the multiprocessor."""
MAX_ROW_REGISTERS = 128
"""Of 65,536 a multiprocessor: two programs of 256 threads at a time hide each other's loads."""


def _case(tools, dtype):
    """150 classes are two tiles of 64 and a ragged third; the last class is the label of two tokens."""
    weights = torch.rand(24, generator=torch.Generator().manual_seed(1)) + 0.5
    case = tools.case(24, vocab_size=150, dtype=dtype, ignored=0.2, token_weight=weights)
    case.options.update(logit_scale=0.5, softcap=8.0)
    case.labels[:4] = torch.tensor([149, 0, 149, 63])
    case.weight[149] = 2 * case.weight[148]  # the last class matters
    return case


def _broken(tools, case, logits_dtype):
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


@pytest.fixture
def small_tiles(triton_backend, monkeypatch):
    monkeypatch.setattr(triton_backend, "VOCAB_TILE", 64)
    monkeypatch.setattr(triton_backend, "TOKEN_TILE", 16)
    return triton_backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logits_dtype", ["fp32", "compute"])
def test_the_kernels_are_as_good_as_torch(tools, dtype, logits_dtype, small_tiles):
    """That broken ones are not: `tests/mutants`."""
    assert _broken(tools, _case(tools, dtype), logits_dtype) == set()


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
    small_tiles.triton_kernels.row_kernel[(3,)](
        *(logits, logits, labels, None, torch.ones(()), nll, objective, stride, stride, -100),
        *(1.0, 0.0),
        VOCAB_SIZE=vocab_size,
        TILE=64,
        LANES=32,
        **SWITCHES,
    )
    torch.testing.assert_close(nll.double(), -exact[torch.arange(3), labels], rtol=1e-5, atol=1e-5)
    gradient = exact.exp() - torch.eye(vocab_size, dtype=torch.float64)[labels]
    torch.testing.assert_close(rows.double(), gradient, rtol=0.01, atol=1e-6)


def test_nothing_is_written_beyond_a_row(small_tiles):
    """Rows that lie end to end: the last tile of one ends within the next."""
    logits = torch.randn(4, 150)
    exact, labels = logits[:3].double().log_softmax(1), torch.tensor([3, 149, 0])
    after = logits[3].clone()
    nll, objective = torch.empty(3), torch.empty(3)
    small_tiles.triton_kernels.row_kernel[(3,)](
        *(logits, logits, labels, None, torch.ones(()), nll, objective, 150, 150, -100),
        *(1.0, 0.0),
        VOCAB_SIZE=150,
        TILE=64,
        LANES=32,
        **SWITCHES,
    )
    torch.testing.assert_close(nll.double(), -exact[torch.arange(3), labels], rtol=1e-5, atol=1e-5)
    gradient = exact.exp() - torch.eye(150, dtype=torch.float64)[labels]
    torch.testing.assert_close(logits[:3].double(), gradient, rtol=1e-5, atol=1e-6)
    assert logits[3].equal(after)


def test_sums_read_no_token_beyond_the_end(small_tiles):
    values, ids = torch.full((40,), 2.0), torch.zeros(40, dtype=torch.int64)
    found = small_tiles.triton_segment_sums(values[:33], ids[:33], -100, ids[:33], 1)
    assert (found.sums.item(), found.counts.item(), found.squares.item()) == (66.0, 33, 132.0)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 128, 129, 300])
def test_every_element_is_scaled(size, in_place, small_tiles, monkeypatch):
    """Once, and none beyond the end; 8 programs share 19 tiles of 16 elements."""
    monkeypatch.setattr(small_tiles, "SCALE_TILE", 16)
    monkeypatch.setattr(small_tiles, "DEFAULT_MULTIPROCESSORS", 1)
    memory = torch.arange(1.0, 321.0)
    gradient, factor, one = memory[:size], torch.tensor(3.0), torch.tensor(1.0)
    out = small_tiles.scaled_gradient(gradient, factor, one, torch.float32, in_place=in_place)
    assert out.equal(3 * torch.arange(1.0, size + 1.0))
    assert (out.data_ptr() == memory.data_ptr()) == in_place
    assert memory[size:].equal(torch.arange(size + 1.0, 321.0))


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
    options = {"sample_ids": ids, "num_samples": 5}
    out, answer = tools.run(case, backend="triton", chunk_tokens=8, **options)
    for tensor in (*out, answer.d_hidden, answer.d_weight):
        assert tensor.isfinite().all()
    assert out.sample_tokens.sum() == case.valid.sum()
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


@pytest.mark.parametrize("num_valid", [None, 0, 40, 60, 75])
@pytest.mark.parametrize("normalizer", [0.0, 3.0])
def test_tokens_with_a_label_come_first(small_tiles, num_valid, normalizer):
    """As the portable backend finds them, also where the caller's count is not the true one."""
    g = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(75, generator=g) < 0.3, -100, torch.randint(0, 9, (75,), generator=g))
    for integer, given in ((torch.int64, torch.rand(75, generator=g)), (torch.int32, None)):
        facts = (labels.to(integer), given, torch.tensor(normalizer).double(), -100, num_valid)
        found = small_tiles.triton_tokens(*facts, ids=None, num_segments=0, vocab_size=9, check=False)
        torch.testing.assert_close(vars(found), vars(valid_tokens(*facts)), rtol=0, atol=0)


BAD_VALUES = {
    "a label that is no class": dict(labels=torch.full((75,), 9)),
    "a negative label": dict(labels=torch.cat([torch.zeros(74, dtype=torch.int64), torch.tensor([-1])])),
    "an id that is no sample": dict(ids=torch.arange(75) // 25 + 1),
    "a wrong count": dict(num_valid=74),
    "a negative normalizer": dict(normalizer=torch.tensor(-1.0).double()),
    "a normalizer that is no number": dict(normalizer=torch.tensor(float("nan")).double()),
    "an infinite normalizer": dict(normalizer=torch.tensor(float("inf")).double()),
}


@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
def test_the_device_asserts_what_the_host_checks(small_tiles, bad):
    good = dict(labels=torch.arange(75) % 9, ids=torch.arange(75) // 25, num_valid=75)
    good |= dict(normalizer=torch.tensor(0.0).double())
    more = dict(token_weight=None, ignore_index=-100, num_segments=3, vocab_size=9, check=True)
    small_tiles.triton_tokens(**good, **more)
    with pytest.raises(RuntimeError, match="validate=True"):
        small_tiles.triton_tokens(**{**good, **bad}, **more)


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
    """In registers but for an address, and guarded where its result takes the memory that it reads."""
    rows = [b for b in built if (b["capability"], b["vocab_size"]) == (capability, vocab_size)]
    assert {("*fp32", "*bf16"), ("*bf16", "*bf16"), ("*fp32", "*fp32")} <= {tuple(b["types"]) for b in rows}
    for kernel in rows:
        print(kernel)
        assert kernel["kernel"] == "row_kernel", kernel
        assert kernel["local_bytes"] <= (MAX_SPILLED_BYTES if vocab_size % 8 else 0), kernel
        assert kernel["registers"] <= MAX_ROW_REGISTERS, kernel
        assert kernel["loads_16_bytes"], kernel
        assert kernel["barrier_between_load_and_store"] or not kernel["training"], kernel


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "builds"), [("tokens_kernel", 2), ("segment_kernel", 1), ("scale_kernel", 3)]
)
def test_the_other_kernels_compile_for_gpus(built, capability, name, builds):
    kernels = [b for b in built if (b["capability"], b["kernel"]) == (capability, name)]
    assert len(kernels) == builds
    for kernel in kernels:
        print(kernel)
        assert kernel["local_bytes"] == 0, kernel
        assert kernel["loads_16_bytes"] or name != "scale_kernel", kernel
