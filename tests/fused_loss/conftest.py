"""Shared tools of the fused-loss tests: random cases, an independent fp64 answer, and the bound.

The Triton backend runs here on the CPU, in Triton's interpreter (`tests/conftest.py` asks for it where there
is no GPU). One program takes milliseconds there, so cases are small. `test_gpu.py` runs it on a GPU.

The bound is relative to what torch itself reaches in the same dtype on the tokens that have a target (a
product of few rows may sum in another order), so that no tolerance has to be guessed:
error(ours) <= 2 * error(torch) + eps, where an error is the largest absolute difference to
the fp64 answer divided by the largest absolute value of that answer. eps is EPS and one rounding to
the dtype of the answer, which the exact answer would suffer too.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
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
        num_tokens: int = 50,
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
        per_token = nll * o["token_weight"].to(z.dtype) if "token_weight" in o else nll
        if o.get("by_probability"):
            per_token = per_token * (-nll.detach()).exp()
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
        valid, options = case.valid, dict(case.options)
        if "token_weight" in options:
            options["token_weight"] = options["token_weight"][valid]
        counted = Case(case.hidden[valid], case.weight, case.labels[valid], options)
        exact = cls.torch_answer(counted, torch.float64)
        torchs = cls.torch_answer(counted, case.hidden.dtype)
        broken = {}
        for part in ("token_loss", "d_hidden"):
            if getattr(ours, part)[~valid].any():
                broken[part] = "not 0 where there is no target"
        ours = replace(ours, token_loss=ours.token_loss[valid], d_hidden=ours.d_hidden[valid])
        for part in ("loss", "token_loss", "d_hidden", "d_weight"):
            error = cls.error(getattr(ours, part), getattr(exact, part))
            eps = EPS + torch.finfo(getattr(torchs, part).dtype).eps / 2
            allowed = 2 * cls.error(getattr(torchs, part), getattr(exact, part)) + eps
            if not error <= allowed:
                broken[part] = f"error {error:.2e}, allowed {allowed:.2e}"
        return broken


@pytest.fixture
def tools() -> type[Tools]:
    return Tools


@pytest.fixture
def case() -> Callable[..., Case]:
    return Tools.case


# ---- backends -----------------------------------------------------------------------------------


@pytest.fixture(params=["chunked", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    return str(request.param)


@pytest.fixture(params=["chunked", "triton"])
def chunking_backend(request: pytest.FixtureRequest) -> str:
    """Every backend that computes gradients in forward, chunk by chunk."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    return str(request.param)


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the Triton backend, interpreted; tiles so small that a vocabulary takes several."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'triton>=3.6'")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here and TRITON_INTERPRET is not 1: test_gpu.py runs the Triton backend")
    from versatune_kernels import triton_backend

    monkeypatch.setattr(triton_backend, "VOCAB_TILE", 256)
    monkeypatch.setattr(triton_backend, "TOKEN_TILE", 32)
    _round_like_a_gpu(monkeypatch)
    return triton_backend


def _round_like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter truncates fp32 to bf16, where GPUs round to nearest even; make it round."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.array(data.view(np.float32)))
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
