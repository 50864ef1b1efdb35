"""Chunks: their size changes memory only, never the result; nothing large, nothing that waits."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from versatune_kernels import auto_chunk_tokens, chunked, linear_cross_entropy
from versatune_kernels.contract import Spec
from versatune_kernels.fused_op import linear_cross_entropy_op
from versatune_kernels.products import REDUCTIONS, product_
from versatune_kernels.sizing import triton_chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 34, 35, 36, 10**9, "auto"])
def test_chunk_size_changes_nothing(tools, chunk_tokens, dtype, chunking_backend):
    case = tools.case(dtype=dtype)
    case.labels[:] = case.labels.clamp(min=0)
    case.labels[35:] = -100  # 35 valid rows: chunks of 34, 35 and 36 end just around the last
    _, ours = tools.run(case, chunk_tokens=chunk_tokens, backend=chunking_backend)
    assert tools.worse_than_torch(case, ours) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_rows_within_a_chunk_change_nothing(tools, dtype, monkeypatch):
    case = tools.case(20, dtype=dtype, ignored=0.0, token_weight=torch.rand(20), softcap=5.0)

    def answer(rows: int):
        monkeypatch.setattr(chunked, "CPU_ROW_BLOCK_BYTES", rows * 1000 * 4)
        return tools.run(case, chunk_tokens=8, backend="chunked")[1]

    whole = answer(8)
    assert tools.worse_than_torch(case, whole) == {}
    for rows in (0, 1, 3):  # a row larger than a block is a block of its own
        assert all(a.equal(b) for a, b in zip(vars(whole).values(), vars(answer(rows)).values(), strict=True))


def test_the_weight_gradient_is_not_rounded_between_many_chunks(tools, chunking_backend):
    """A sum kept in bf16 would lose accuracy with every one of the 40 chunks."""
    case = tools.case(160, vocab_size=50, dtype=torch.bfloat16, ignored=0.0)
    exact = tools.torch_answer(case, torch.float64).d_weight

    def error(chunk_tokens):
        _, ours = tools.run(case, chunk_tokens=chunk_tokens, backend=chunking_backend)
        return float((ours.d_weight.double() - exact).norm() / exact.norm())

    assert error(4) < 1.05 * error(160)


def test_permuting_tokens_permutes_the_result(tools, backend):
    case = tools.case(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(30) // 3
    out, answer = tools.run(case, sample_ids=ids, num_samples=10, backend=backend)
    shuffled = tools.replace(case, hidden=case.hidden[order], labels=case.labels[order])
    out2, answer2 = tools.run(shuffled, sample_ids=ids[order], num_samples=10, backend=backend)
    torch.testing.assert_close(out2.loss, out.loss)
    torch.testing.assert_close(out2.token_loss, out.token_loss[order])
    torch.testing.assert_close(out2.sample_loss, out.sample_loss, rtol=1e-6, atol=0)
    assert out2.sample_tokens.equal(out.sample_tokens)
    torch.testing.assert_close(answer2.d_hidden, answer.d_hidden[order])
    torch.testing.assert_close(answer2.d_weight, answer.d_weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ten_runs_are_bitwise_equal(tools, dtype, chunking_backend):
    num_tokens = 300 if chunking_backend == "chunked" else 6
    case = tools.case(num_tokens, dtype=dtype, token_weight=torch.rand(num_tokens))
    ids = torch.arange(num_tokens) % 7
    options = {"sample_ids": ids, "num_samples": 7}

    def run():
        out, answer = tools.run(case, backend=chunking_backend, **options)
        return [t.detach() for t in out] + [answer.d_hidden, answer.d_weight]

    first = run()
    for _ in range(9):
        assert all(a.equal(b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 129, 3328, 8192, 100_000])
@pytest.mark.parametrize("hidden_size", [1, 256, 5120, 16384])
@pytest.mark.parametrize("vocab_size", [1, 32000, 152064, 2**25])
def test_the_rule_for_chunks(num_tokens, hidden_size, vocab_size):
    rows = auto_chunk_tokens(num_tokens, hidden_size, vocab_size)
    assert rows >= 128 and rows % 128 == 0
    assert rows * vocab_size < 2**31 or rows == 128
    assert rows <= max(2 * hidden_size // 3, 128)
    if num_tokens > 128:
        assert rows < num_tokens, "the full logits would be held"


def test_the_worked_number_of_the_rule():
    assert auto_chunk_tokens(10**6, 5120, 152064) <= 3328
    assert auto_chunk_tokens(8192, 5120, 152064) == 2816


# ---- the rule of the Triton backend -------------------------------------------------------------

HEAD_32B = dict(hidden_size=5120, vocab_size=152064)


def _plan(num_tokens, dtype=torch.bfloat16, logits_dtype="fp32", chunk_tokens=0, **head):
    spec = Spec(1.0, 0.0, logits_dtype, chunk_tokens, grad_hidden=True, grad_weight=True)
    return triton_chunks(spec, num_tokens, dtype=dtype, **{**HEAD_32B, **head})


def test_the_worked_numbers_of_the_triton_rule():
    assert _plan(5120) == (5120, False)
    assert _plan(8192) == (4096, False)
    assert _plan(8192, logits_dtype="compute") == (8192, False)
    assert _plan(10240, logits_dtype="compute") == (10240, False)
    assert _plan(32768) == (8448, False), "no fp32 sum: its memory is the chunks'"
    assert _plan(40960) == (10240, False)
    rows, fp32_sum = _plan(40961)
    assert -(-40961 // rows) == 9 and fp32_sum, "more than four roundings of the sum"
    assert _plan(32768, dtype=torch.float16).fp32_sum and _plan(32768, dtype=torch.float16).rows <= 5120
    assert not _plan(32768, dtype=torch.float32).fp32_sum, "an fp32 sum needs no second one"
    assert _plan(100, dtype=torch.float16).fp32_sum, "fp16 could overflow before it is normalized"


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 4097, 8192, 65_536, 100_000])
@pytest.mark.parametrize("hidden_size", [1, 256, 5120, 16384])
@pytest.mark.parametrize("vocab_size", [1, 32000, 152064, 2**25])
@pytest.mark.parametrize("logits_dtype", ["fp32", "compute"])
def test_the_triton_rule_for_chunks(num_tokens, hidden_size, vocab_size, logits_dtype):
    rows, fp32_sum = _plan(
        num_tokens, hidden_size=hidden_size, vocab_size=vocab_size, logits_dtype=logits_dtype
    )
    num_chunks = -(-num_tokens // rows)
    logit_size = 4 if logits_dtype == "fp32" else 2
    widest = max(2 * hidden_size, 8192) * 2 // logit_size
    if 4 * widest < num_tokens and not fp32_sum:
        widest += 4 * hidden_size // logit_size  # of the sum that is not there
    assert 1 <= rows <= widest and rows * vocab_size < 2**31
    assert fp32_sum == (num_chunks > 4)
    assert num_chunks <= 1 or vocab_size == 2**25 or rows % 128 == 0


def test_the_fullest_of_the_largest_chunks_is_taken():
    """H 5120, 132 multiprocessors: of 33, 34 .. 40 tiles of rows, 33 * 20 fill five waves exactly."""
    rows, _ = _plan(4224 * 3, logits_dtype="fp32")
    assert rows == 4224


# ---- what is allocated, and what waits ----------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The operations that ran and the largest tensor any of them made."""

    def __init__(self):
        super().__init__()
        self.largest_bytes = 0
        self.storages = {}  # kept, so that no address is used twice
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.versatune_kernels.linear_cross_entropy.default:
            with self:  # look inside our own operator
                return linear_cross_entropy_op._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.operations.add(func._schema.name)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype != torch.uint8:  # copies by the interpreter
                self.largest_bytes = max(self.largest_bytes, leaf.nbytes)
                self.storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage()
        return result


def _record(case, **options):
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight, case.labels, **{**case.options, **options}).loss.backward()
    return recorder


def test_a_chunk_of_logits_is_the_largest_tensor(tools, chunking_backend):
    case = tools.case(20, hidden_size=8, vocab_size=1000, ignored=0.0)
    row_stride = 1000 if chunking_backend == "chunked" else 1024  # rows start at aligned addresses
    recorder = _record(case, backend=chunking_backend, chunk_tokens=20)
    assert recorder.largest_bytes == 20 * row_stride * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("num_tokens", "ignored"), [(129, 0.0), (1000, 0.0), (1000, 0.7)])
def test_the_full_logits_never_exist(tools, num_tokens, ignored, softcap, dtype):
    case = tools.case(num_tokens, vocab_size=9000, dtype=dtype, ignored=ignored, softcap=softcap)
    num_valid = int(case.valid.sum())
    recorder = _record(case, backend="chunked")
    chunk = auto_chunk_tokens(num_valid, 32, 9000)
    assert recorder.largest_bytes == max(chunk * 9000, 9000 * 32) * 4
    assert recorder.largest_bytes < num_valid * 9000 * 4
    full = _record(case, backend="reference")
    assert full.largest_bytes == num_valid * 9000 * 4, "the recorder does not see large tensors"


def test_the_weight_gradient_exists_once(tools, chunking_backend):
    """Neither autograd's zeros for outputs without a gradient, nor a copy on the way to the Parameter."""
    case = tools.case(8, hidden_size=64, vocab_size=300)
    weight = case.weight.requires_grad_()
    with Recorder() as recorder:
        loss = linear_cross_entropy(case.hidden, weight, case.labels, backend=chunking_backend).loss
        loss.backward()
    sizes = [storage.nbytes() for storage in recorder.storages.values()]
    of_weight = weight.untyped_storage().data_ptr()
    assert sum(size >= 300 * 64 * 4 for size in sizes) == 1 + (of_weight in recorder.storages)
    assert weight.grad.untyped_storage().data_ptr() in recorder.storages


WAITS_FOR_THE_DEVICE = {
    "aten::_local_scalar_dense",  # .item(), bool(tensor)
    "aten::item",  # the same within an operator
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::bincount",
    "aten::_unique2",
    "aten::repeat_interleave",
}


@pytest.mark.parametrize("normalizer", [35.0, torch.tensor(35.0)], ids=["float", "tensor"])
def test_nothing_waits_for_the_device_when_num_valid_is_known(tools, normalizer, triton_backend):
    """Seen on the CPU: none of the operations runs whose result the host must wait for on CUDA."""
    case = tools.case(20, normalizer=normalizer, softcap=9.0)
    ids = torch.arange(20) % 7
    options = dict(sample_ids=ids, num_samples=7)
    options.update(validate=False, backend="triton")
    recorder = _record(case, num_valid=int(case.valid.sum()), **options)
    assert not recorder.operations & {"aten::sort", "aten::ne", "aten::reciprocal"}, "one kernel does it"
    assert not recorder.operations & WAITS_FOR_THE_DEVICE
    assert _record(case, **options).operations & WAITS_FOR_THE_DEVICE == {"aten::item"}


@pytest.mark.parametrize("fails", [False, True])
def test_products_keep_partial_sums_in_fp32(tools, fails, triton_backend, monkeypatch):
    """torch lets cuBLAS round the parts of a long sum to 16 bits; the caller's settings come back."""
    seen, settings = [], torch.backends.cuda.matmul
    was = [getattr(settings, name) for name in REDUCTIONS]

    def recording(*args, **options):
        seen.append([getattr(settings, name) for name in REDUCTIONS])
        product_(*args, **options)
        if fails:
            raise ZeroDivisionError

    monkeypatch.setattr(triton_backend, "product_", recording)
    try:
        _set([True, False])
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            tools.run(tools.case(8), backend="triton")
        assert seen == [[False, False]] * (1 if fails else 3)
        assert [getattr(settings, name) for name in REDUCTIONS] == [True, False]
    finally:
        _set(was)


def _set(values):
    for name, value in zip(REDUCTIONS, values, strict=True):
        setattr(torch.backends.cuda.matmul, name, value)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.1])
def test_num_valid_changes_nothing(tools, ignored, backend):
    case = tools.case(40, ignored=ignored)
    out, answer = tools.run(case, backend=backend)
    out2, answer2 = tools.run(case, backend=backend, num_valid=int(case.valid.sum()))
    assert out2.loss.equal(out.loss) and out2.token_loss.equal(out.token_loss)
    assert answer2.d_hidden.equal(answer.d_hidden) and answer2.d_weight.equal(answer.d_weight)
