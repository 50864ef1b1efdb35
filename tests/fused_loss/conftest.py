"""Shared tools of the fused-loss tests: random cases, an independent fp64 answer, and the bound.

The bound is relative to what torch itself reaches in the same dtype, so that no tolerance has to be
guessed: error(ours) <= 2 * error(torch) + EPS, where an error is the largest absolute difference to
the fp64 answer divided by the largest absolute value of that answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from versatune_kernels import LossOutput, linear_cross_entropy

IGNORE = -100
EPS = 2e-6  # a few roundings of fp32, for quantities in which torch happens to be exact
SMALLEST_SCALE = 1e-4  # answers below it (a gradient that is exactly 0) are compared absolutely


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # int64 [N]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        return self.labels != IGNORE


@dataclass(frozen=True)
class Answer:
    loss: Tensor
    token_loss: Tensor  # [N]
    d_hidden: Tensor  # [N, H]
    d_weight: Tensor  # [V, H]


class Tools:
    Answer = Answer
    replace = staticmethod(replace)

    @staticmethod
    def case(
        num_tokens: int = 100,
        hidden_size: int = 32,
        vocab_size: int = 1000,
        dtype: torch.dtype = torch.float32,
        sigma: float = 4.0,
        ignored: float = 0.3,
        seed: int = 0,
        **options: Any,
    ) -> Case:
        """Peaked logits (standard deviation `sigma`); half of the targets are the top class."""
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(num_tokens, hidden_size, generator=g).to(dtype)
        weight = (torch.randn(vocab_size, hidden_size, generator=g) * sigma / hidden_size**0.5).to(dtype)
        labels = torch.randint(0, vocab_size, (num_tokens,), generator=g)
        favourite = (hidden.float() @ weight.float().T).argmax(1)
        labels = torch.where(torch.rand(num_tokens, generator=g) < 0.5, favourite, labels)
        labels[torch.rand(num_tokens, generator=g) < ignored] = IGNORE
        options.setdefault("normalizer", float(max(1, int((labels != IGNORE).sum()))))
        return Case(hidden, weight, labels, options)

    @staticmethod
    def run(case: Case, **more: Any) -> tuple[LossOutput, Answer]:
        """Our output and, after backward, our answer."""
        hidden = case.hidden.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_()
        out = linear_cross_entropy(hidden, weight, case.labels, **{**case.options, **more})
        out.loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return out, Answer(out.loss.detach(), out.token_loss, hidden.grad, weight.grad)

    @staticmethod
    def torch_answer(case: Case, dtype: torch.dtype) -> Answer:
        """The textbook: full logits in `dtype`, softmax in at least fp32, gradients by autograd."""
        o = case.options
        hidden = case.hidden.to(dtype).detach().requires_grad_()
        weight = case.weight.to(dtype).detach().requires_grad_()
        logits = F.linear(hidden, weight)
        z = logits.to(torch.promote_types(dtype, torch.float32)) * o.get("logit_scale", 1.0)
        if o.get("softcap", 0.0):
            z = o["softcap"] * torch.tanh(z / o["softcap"])
        nll = F.cross_entropy(z, case.labels, ignore_index=IGNORE, reduction="none")
        smooth = F.cross_entropy(
            z,
            case.labels,
            ignore_index=IGNORE,
            reduction="none",
            label_smoothing=o.get("label_smoothing", 0.0),
        )
        per_token = smooth + o.get("z_loss", 0.0) * z.logsumexp(1).square() * case.valid
        if "token_weight" in o:
            per_token = per_token * o["token_weight"].to(z.dtype)
        loss = per_token.sum() / o["normalizer"]
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return Answer(loss.detach(), nll.detach(), hidden.grad, weight.grad)

    @staticmethod
    def error(found: Tensor, exact: Tensor) -> float:
        if exact.numel() == 0:
            return 0.0
        difference = (found.double() - exact.double()).abs().max()
        return float(difference / exact.double().abs().max().clamp(min=SMALLEST_SCALE))

    @classmethod
    def worse_than_torch(cls, case: Case, ours: Answer) -> dict[str, str]:
        """The parts of `ours` that break the bound, with their errors; empty when all is well."""
        exact = cls.torch_answer(case, torch.float64)
        torchs = cls.torch_answer(case, case.hidden.dtype)
        broken = {}
        for part in ("loss", "token_loss", "d_hidden", "d_weight"):
            error = cls.error(getattr(ours, part), getattr(exact, part))
            allowed = 2 * cls.error(getattr(torchs, part), getattr(exact, part)) + EPS
            if not error <= allowed:
                broken[part] = f"error {error:.2e}, allowed {allowed:.2e}"
        return broken


@pytest.fixture
def tools() -> type[Tools]:
    return Tools


@pytest.fixture
def case() -> Callable[..., Case]:
    return Tools.case
