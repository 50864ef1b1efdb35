"""What is computed again in backward, and what waits in host memory. Gradients: `test_step.py`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny_families import VOCAB_SIZE, family_model
from torch.utils._python_dispatch import TorchDispatchMode

from versatune_ds.config.model import Model
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.engine.model.recompute import HostInputs, recompute_in_backward
from versatune_ds.foundations.errors import ConfigError

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Counting(TorchDispatchMode):
    """Counts the operators that are computed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def computed_in_backward(policy):
    torch.manual_seed(0)
    lm = family_model("llama")
    recompute_in_backward(lm, policy)
    model, ids = PackedCausalLM(lm, "chunked").train(), torch.arange(24) % VOCAB_SIZE
    out = model(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(10), torch.arange(14)]),
        labels=ids.roll(-1),
        sample_ids=torch.arange(2).repeat_interleave(torch.tensor([10, 14])),
        cu_seqlens=torch.tensor([0, 10, 24]).int(),
        max_seqlen=14,
        num_samples=2,
        num_valid=24,
        normalizer=1.0,
    )
    with Counting() as counting:
        out.loss.backward()
    return counting.counts, [p.grad for p in model.parameters()], len(lm.model.layers)


def test_selective_computes_no_product_and_no_attention_again():
    (off, expected, layers), (every, _, _) = computed_in_backward("off"), computed_in_backward("all")
    selective, found, _ = computed_in_backward("selective")
    assert every["aten::mm"] >= off["aten::mm"] + 6 * layers and every[ATTENTION] == layers
    assert selective["aten::mm"] == off["aten::mm"] and selective[ATTENTION] == 0
    assert selective["aten::silu"] == every["aten::silu"] > 0  # elementwise work is done again
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inputs_wait_in_memory_of_their_own_and_the_one_before_is_fetched_ahead():
    hosts, inputs = HostInputs(), []
    hidden = x = torch.randn(4, 8, requires_grad=True)
    for _ in range(3):
        hidden = hosts.checkpoint(torch.sin, hidden)
        inputs.append(hosts._last())
    assert [held.before and held.before() for held in inputs] == [None, *inputs[:2]]
    assert inputs[0].host.data_ptr() != x.data_ptr() and torch.equal(inputs[0].host, x)
    fetched = []
    original = hosts._fetch
    hosts._fetch = lambda held: (fetched.append(inputs.index(held)), original(held))
    hidden.sum().backward()
    assert fetched == [2, 1, 1, 0, 0]  # each asked for by the layer behind it before it is needed
    y = x.detach().requires_grad_()
    assert torch.equal(x.grad, torch.autograd.grad(y.sin().sin().sin().sum(), y)[0])


def test_nothing_is_held_after_backward():
    hosts = HostInputs()
    out = hosts.checkpoint(torch.sin, torch.randn(4, requires_grad=True))
    assert hosts._last() is not None
    out.sum().backward()
    del out
    assert hosts._last() is None


def test_layers_that_cannot_recompute_are_refused():
    lm = family_model("llama")
    lm.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match="cannot recompute"):
        recompute_in_backward(lm, "selective")


@pytest.mark.parametrize("policy", ["selective", "offload"])
def test_what_cannot_be_compiled_is_refused(policy):
    with pytest.raises(ValueError, match=f"cannot trace activation_checkpointing {policy}"):
        Model(source="m", compile="layers", activation_checkpointing=policy)
