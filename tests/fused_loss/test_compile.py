"""torch.compile sees the loss as one node, and what it makes of it gives the same numbers.

The compilers "eager" and "aot_eager" trace as any other would, and generate no code.
"""

import pytest
import torch
from torch import nn

from versatune_kernels import linear_cross_entropy
from versatune_kernels.fused_op import linear_cross_entropy_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Model(nn.Module):
    """A body and a head that owns its weight."""

    def __init__(self, weight, backend):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(weight.shape[1], weight.shape[1], dtype=weight.dtype)
        self.weight = nn.Parameter(weight.clone())
        self.backend = backend

    def forward(self, x, labels, ids, num_valid=None):
        hidden = torch.tanh(self.body(x))
        return linear_cross_entropy(
            hidden,
            self.weight,
            labels,
            sample_ids=ids,
            num_samples=3,
            normalizer=7.0,
            num_valid=num_valid,
            backend=self.backend,
        )


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _numbers(model, function, case, **options):
    model.zero_grad()
    out = function(case.hidden, case.labels, torch.arange(len(case.labels)) // 4, **options)
    out.loss.backward()
    return [part.detach().clone() for part in out] + [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_body_and_head_are_one_graph_with_one_node_for_the_loss(tools, dtype, chunking_backend):
    """Also with ignored rows, and with their number known or not."""
    case = tools.case(12, vocab_size=150, dtype=dtype)
    model = Model(case.weight, chunking_backend)
    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph.forward

    expected = _numbers(model, model, case)
    compiled = torch.compile(model, backend=look, fullgraph=True)
    for options in ({}, {"num_valid": int(case.valid.sum())}):
        found = _numbers(model, compiled, case, **options)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    for graph in graphs:
        targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        ours = torch.ops.versatune_kernels.linear_cross_entropy.default
        assert targets.count(ours) == 1
        assert not any("cross_entropy" in str(t) or "mm" in str(t) for t in targets if t is not ours)


@pytest.mark.parametrize("torch_says_so", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_traced_together_give_the_same(
    tools, dtype, torch_says_so, chunking_backend, monkeypatch
):
    """Also where torch does not say that it compiles, as 2.11 does not in this place."""
    if not torch_says_so:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    case = tools.case(12, vocab_size=150, dtype=dtype)
    model = Model(case.weight, chunking_backend)
    expected = _numbers(model, model, case)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        found = _numbers(model, compiled, case)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_second_backward_of_a_compiled_model_scales_nothing_twice(tools, chunking_backend):
    """Traced code has no error for it: it must give the same gradient again."""
    case = tools.case(12, vocab_size=150)
    model = Model(case.weight, chunking_backend)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(case.hidden, case.labels, torch.zeros(12, dtype=torch.int64)).loss
    loss = 3 * loss
    loss.backward(retain_graph=True)
    first = model.weight.grad.clone()
    model.zero_grad()
    loss.backward()
    assert model.weight.grad.equal(first)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_keeps_what_it_promises(tools, dtype, wanted, chunking_backend):
    """Schema and output shapes, dtypes and strides as announced, checked by torch itself."""
    case = tools.case(8, vocab_size=150, dtype=dtype)
    ids = torch.arange(8) % 3
    hidden = case.hidden.requires_grad_(wanted[0])
    weight = case.weight.requires_grad_(wanted[1])
    normalizer = torch.tensor(5.0, dtype=torch.float64)
    options = (3, None, -100, None, 0.5, 8.0, "fp32", 4, *wanted, True, chunking_backend)
    torch.library.opcheck(
        linear_cross_entropy_op,
        (hidden, weight, case.labels, ids, None, normalizer, *options),
        test_utils=("test_schema", "test_faketensor"),
    )
