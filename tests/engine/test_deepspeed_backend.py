"""What `DeepSpeedBackend` asks of DeepSpeed's engine in a step; with DeepSpeed itself in `test_step.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from versatune_ds.config.model import Model
from versatune_ds.config.schema import Optimizer
from versatune_ds.engine.backend.deepspeed_backend import DeepSpeedBackend
from versatune_ds.engine.backend.deepspeed_config import state_layout
from versatune_ds.engine.backend.ranks import Group, Ranks
from versatune_ds.engine.model.source import multiplies_bf16

NAN = float("nan")


class Live:
    """Notes how it is called, with torch's optimizer."""

    def __init__(self, model: torch.nn.Linear) -> None:
        self.model, self.calls = model, []
        groups = [{"params": [model.weight]}, {"params": [model.bias]}]
        self.optimizer = torch.optim.SGD(groups, lr=9.0)
        self.applied = True

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        self.calls.append(is_last)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        self.calls.append((loss, scale_wrt_gas))
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()

    def was_step_applied(self) -> bool:
        return self.applied

    def train(self, mode: bool = True) -> None:
        self.model.train(mode)

    def eval(self) -> None:
        self.model.eval()


@pytest.fixture
def live() -> Live:
    return Live(torch.nn.Linear(2, 1))


def backend_of(live: Live, stage: int = 0) -> DeepSpeedBackend:
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    ranks = Ranks(Group(0, 1), Group(0, 1))
    config: Any = SimpleNamespace(model=Model(source="unused", dtype="fp32"), optimizer=Optimizer())
    layout = state_layout(settings, config)
    model: Any = live.model
    model.base = None  # as with a PackedCausalLM that is compared with no copy
    attention: Any = SimpleNamespace()
    device = torch.device("cpu")
    return DeepSpeedBackend(live, model, device, attention, settings, layout, ranks, config.optimizer)


def test_a_micro_batch_is_added_as_it_is_and_the_last_one_is_named(live):
    backend = backend_of(live)
    for is_last in (False, True):
        loss = live.model(torch.ones(1, 2)).sum()
        backend.backward(loss, is_last)
        named, (taken, is_scaled) = live.calls
        assert named == is_last and not is_scaled
        assert taken == loss and taken is not loss  # DeepSpeed's hook sits on the model's own output
        live.calls.clear()
    assert live.model.bias.grad.item() == 2.0


def test_a_step_is_taken_with_its_learning_rate(live):
    before = [p.detach().clone() for p in live.model.parameters()]
    live.model(torch.ones(1, 2)).sum().backward()
    backend = backend_of(live)
    assert backend.step(0.5)
    for old, new in zip(before, live.model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.5)
    live.applied = False
    assert not backend.step(0.5)


@pytest.mark.parametrize(("stage", "seen"), [(0, True), (1, False), (3, False)])
def test_gradients_of_stage_0_are_looked_at(live, stage, seen):
    """The other stages look themselves when they step."""
    backend = backend_of(live, stage)
    live.model(torch.ones(1, 2)).sum().backward()
    assert backend.gradients_are_finite()
    live.model.bias.grad.fill_(NAN)
    assert backend.gradients_are_finite() == (not seen)


def test_a_discarded_step_leaves_no_gradient(live):
    live.model(torch.ones(1, 2)).sum().backward()
    backend_of(live).discard()
    assert all(p.grad is None for p in live.model.parameters())


def test_an_evaluation_leaves_the_model_training_and_keeps_nothing(live):
    backend = backend_of(live)
    with backend.evaluating():
        assert not live.model.training and not live.model(torch.ones(1, 2)).requires_grad
    assert live.model.training and live.model(torch.ones(1, 2)).requires_grad


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True}, False),
    ],
)
def test_cpus_without_bf16_units_are_known(capabilities, expected):
    assert multiplies_bf16(capabilities) == expected
    assert isinstance(multiplies_bf16(), bool)
