"""Chunks: their size changes memory only, never the result; nothing large, nothing that waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from versatune_kernels import auto_chunk_tokens, linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 69, 70, 71, 10**9, "auto"])
def test_chunk_size_changes_nothing(tools, chunk_tokens, dtype):
    case = tools.case(100, dtype=dtype)
    case.labels[:] = case.labels.clamp(min=0)
    case.labels[70:] = -100  # 70 valid rows: chunks of 69, 70 and 71 end just around the last
    _, ours = tools.run(case, chunk_tokens=chunk_tokens)
    assert tools.worse_than_torch(case, ours) == {}


def test_the_weight_gradient_is_not_rounded_between_chunks(tools):
    """A sum kept in bf16 would lose accuracy with every one of the 256 chunks."""
    case = tools.case(1024, vocab_size=50, dtype=torch.bfloat16, ignored=0.0)
    exact = tools.torch_answer(case, torch.float64).d_weight

    def error(chunk_tokens):
        d_weight = tools.run(case, chunk_tokens=chunk_tokens)[1].d_weight.double()
        return float((d_weight - exact).norm() / exact.norm())

    assert error(4) < 1.05 * error(1024)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_permuting_tokens_permutes_the_result(tools, backend):
    case = tools.case(150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(150) // 15
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
def test_ten_runs_are_bitwise_equal(tools, dtype):
    case = tools.case(300, dtype=dtype, token_weight=torch.rand(300), z_loss=1e-4)
    ids = torch.arange(300) % 7

    def run():
        out, answer = tools.run(case, sample_ids=ids, num_samples=7, domain_ids=ids % 3, num_domains=3)
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


class Recorder(TorchDispatchMode):
    """The operations that ran and the largest tensor any of them made."""

    def __init__(self):
        super().__init__()
        self.largest_numel = 0
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.add(func._schema.name)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest_numel = max(self.largest_numel, leaf.numel())
        return result


def _record(case, **options):
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight, case.labels, **{**case.options, **options}).loss.backward()
    return recorder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("num_tokens", "ignored"), [(129, 0.0), (1000, 0.0), (1000, 0.7)])
def test_the_full_logits_never_exist(tools, num_tokens, ignored, softcap, dtype):
    case = tools.case(num_tokens, vocab_size=9000, dtype=dtype, ignored=ignored, softcap=softcap)
    num_valid = int(case.valid.sum())
    recorder = _record(case)
    chunk = auto_chunk_tokens(num_valid, 32, 9000)
    assert recorder.largest_numel == max(chunk * 9000, 9000 * 32)
    assert recorder.largest_numel < num_valid * 9000
    full = _record(case, backend="reference")
    assert full.largest_numel == num_valid * 9000, "the recorder does not see large tensors"


WAITS_FOR_THE_DEVICE = {
    "aten::_local_scalar_dense",  # .item(), bool(tensor)
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::bincount",
    "aten::_unique2",
    "aten::repeat_interleave",
}


def test_nothing_waits_for_the_device_when_num_valid_is_known(tools):
    """Seen on the CPU: none of the operations runs whose result the host must wait for on CUDA."""
    case = tools.case(300, normalizer=torch.tensor(210.0), z_loss=1e-4, softcap=9.0)
    ids = torch.arange(300) % 7
    options = dict(sample_ids=ids, num_samples=7, domain_ids=ids % 3, num_domains=3, validate=False)
    recorder = _record(case, num_valid=int(case.valid.sum()), **options)
    assert "aten::sort" in recorder.operations
    assert not recorder.operations & WAITS_FOR_THE_DEVICE
    assert _record(case, **options).operations & WAITS_FOR_THE_DEVICE == {"aten::nonzero"}


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.1])
def test_num_valid_changes_nothing(tools, ignored, backend):
    case = tools.case(90, ignored=ignored)
    out, answer = tools.run(case, backend=backend)
    out2, answer2 = tools.run(case, backend=backend, num_valid=int(case.valid.sum()))
    assert out2.loss.equal(out.loss) and out2.token_loss.equal(out.token_loss)
    assert answer2.d_hidden.equal(answer.d_hidden) and answer2.d_weight.equal(answer.d_weight)
