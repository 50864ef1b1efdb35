"""The gate: is the candidate right, by fp64? Asked before anything is timed.

A few rows of the case's own head, some without a label, some with the first and the last class, go
through the candidate and through fp64. Errors are relative: |loss - loss64| / |loss64|, and Frobenius
norms |g - g64| / |g64| of dX and dW. The yardstick is torch's own error in the same dtype (`hf eager`):

    passed    every error <= 2 x torch's + eps
    outside   not passed, and every error <= 10 %; timed, and marked
    wrong     an error above 10 % or not finite; not timed

What is not covered: the per-sample and per-domain sums (tests/fused_loss covers them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loss_bench.candidates import IGNORE_INDEX, Inputs, hf_eager

GATE_ROWS = 96
VOCAB_BLOCK = 8192
WRONG_FROM = 0.1
EPS = 2e-6
"""A few roundings of fp32, in which the sums end: torch's own error may happen to be none."""
ERRORS = ("loss", "dx", "dw")


def gate_inputs(inputs: Inputs) -> Inputs:
    """The first rows of a case with other labels: a quarter ignored, then class 0 and class V - 1."""
    rows = min(GATE_ROWS, len(inputs.labels))
    vocab_size = inputs.weight.shape[0]
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[::4] = IGNORE_INDEX
    labels[1], labels[2] = 0, vocab_size - 1
    return Inputs(
        hidden=inputs.hidden.detach()[:rows].clone().requires_grad_(),
        weight=inputs.weight,
        labels=labels.to(inputs.labels.device),
        sample_ids=inputs.sample_ids[:rows],
        domain_ids=inputs.domain_ids[:rows],
        num_samples=inputs.num_samples,
        num_domains=inputs.num_domains,
        num_valid=int((labels != IGNORE_INDEX).sum()),
    )


class Exact:
    """Loss and gradients of `inputs` in fp64; dW block by block, so that no second weight in fp64 is held."""

    def __init__(self, inputs: Inputs) -> None:
        self._valid = inputs.labels != IGNORE_INDEX
        self._x = inputs.hidden.detach()[self._valid].double()
        self._weight = inputs.weight.detach()
        labels = inputs.labels[self._valid]
        logits = torch.cat([self._x @ w.double().T for w in self._weight.split(VOCAB_BLOCK)], dim=1)
        log_probs = logits.log_softmax(dim=1)
        del logits
        self.loss = float(-log_probs.gather(1, labels[:, None]).mean())
        self._d_logits = log_probs.exp_()
        self._d_logits.scatter_add_(1, labels[:, None], torch.full_like(self._d_logits[:, :1], -1.0))
        self._d_logits /= inputs.num_valid
        blocks = zip(self._d_logits.split(VOCAB_BLOCK, dim=1), self._weight.split(VOCAB_BLOCK), strict=True)
        self.dx = torch.zeros_like(inputs.hidden, dtype=torch.float64)
        self.dx[self._valid] = torch.stack([d @ w.double() for d, w in blocks]).sum(0)

    def errors(self, loss: Tensor, dx: Tensor | None, dw: Tensor | None) -> dict[str, float]:
        """Relative errors of a candidate; infinite for a gradient that never came."""
        if dx is None or dw is None:
            return dict.fromkeys(ERRORS, math.inf)
        wrong_dw = size_dw = 0.0
        d_blocks = self._d_logits.split(VOCAB_BLOCK, dim=1)
        for got, d in zip(dw.split(VOCAB_BLOCK), d_blocks, strict=True):
            exact = d.T @ self._x
            wrong_dw += float((got.double() - exact).square().sum())
            size_dw += float(exact.square().sum())
        return {
            "loss": abs(float(loss) - self.loss) / abs(self.loss),
            "dx": float((dx.double() - self.dx).norm() / self.dx.norm()),
            "dw": math.sqrt(wrong_dw / size_dw),
        }


class Gate:
    """The gate of one case; fp64 and torch's own error are computed once."""

    def __init__(self, inputs: Inputs) -> None:
        self._small = gate_inputs(inputs)
        self._exact = Exact(self._small)
        self._torch_errors = _errors(self._small, self._exact, hf_eager)

    def judge(self, loss_of: Callable[[Inputs], Tensor | None]) -> dict[str, Any]:
        """Judge a candidate; `loss_of` gives its loss, without backward.

        Returns:
            verdict ("passed", "outside", "wrong"), errors, and torch_errors.
        """
        errors = _errors(self._small, self._exact, loss_of)
        return {
            "verdict": judge(errors, self._torch_errors),
            "errors": errors,
            "torch_errors": self._torch_errors,
        }


def judge(errors: dict[str, float], torch_errors: dict[str, float]) -> str:
    """The verdict on errors, by the rule at the head of this file."""
    if not all(math.isfinite(errors[name]) and errors[name] <= WRONG_FROM for name in ERRORS):
        return "wrong"
    within = all(errors[name] <= 2 * torch_errors[name] + EPS for name in ERRORS)
    return "passed" if within else "outside"


def _errors(inputs: Inputs, exact: Exact, loss_of: Callable[[Inputs], Tensor | None]) -> dict[str, float]:
    inputs.hidden.grad = inputs.weight.grad = None
    loss = loss_of(inputs)
    if loss is None:
        raise ValueError("a ceiling has no loss to judge")
    loss.backward()
    errors = exact.errors(loss.detach(), inputs.hidden.grad, inputs.weight.grad)
    inputs.hidden.grad = inputs.weight.grad = None
    return errors
