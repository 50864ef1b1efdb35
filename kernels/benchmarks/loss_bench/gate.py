"""The gate: is the candidate right, by fp64? Asked before anything is timed, on what is timed.

The case's own rows go through the candidate as they will when it is timed, in as many chunks, and
through fp64. Compared are the loss; dX of picked rows and dW of picked classes, the last of each
among them (a fault in a chunk or a tile touches many); and, of a candidate that returns them, the
loss of every token, and the sums and counts of every sample. Errors are relative:
|loss - loss64| / |loss64|, and Frobenius norms |g - g64| / |g64|; a wrong count is an infinite one.

The yardstick is the textbook's own error in the case's dtype, computed as `hf eager` does it, on the
same picked rows and classes, with full logits for a few rows at a time: neither it nor fp64 needs
more memory for more rows.

    passed    every error <= 2 x torch's + eps
    outside   not passed, and every error <= 10 %; timed, and marked
    wrong     an error above 10 % or not finite; not timed

What is not covered: dX of the other rows and dW of the other classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loss_bench.candidates import IGNORE_INDEX, Inputs

PICKED_ROWS = 512
PICKED_CLASSES = 2048
ROW_BLOCK = 256
"""Rows of full logits held at a time: 0.3 GB in fp64 at V 152064."""
VOCAB_BLOCK = 8192
"""Classes of the weight held in fp64 at a time."""
WRONG_FROM = 0.1
EPS = 2e-6
"""A few roundings of fp32, in which the sums end: torch's own error may happen to be none."""
SUMS = ("sample_loss", "sample_loss_sq")


class Answer(NamedTuple):
    """What a candidate is held against."""

    token_loss: Tensor
    """[N], 0 where there is no label."""
    dx: Tensor
    """[picked rows, H]."""
    dw: Tensor
    """[picked classes, H]."""


def picked(count: int, wanted: int, device: torch.device) -> Tensor:
    """Up to `wanted` + 2 of 0..count - 1, the first and the last among them; the same in every process."""
    some = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:wanted]
    return torch.cat([some, torch.tensor([0, count - 1])]).unique().to(device)


def textbook(inputs: Inputs, dtype: torch.dtype, rows: Tensor, classes: Tensor) -> Answer:
    """The mean loss with full logits in `dtype`, softmax in at least fp32, and its gradients.

    Args:
        inputs: N rows.
        dtype: of the matrix products: the weight's, or a wider one.
        rows: int64, rows whose dX is wanted.
        classes: int64, classes whose dW is wanted.
    """
    wide = torch.promote_types(dtype, torch.float32)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    blocks = (weight,) if weight.dtype == dtype else weight.split(VOCAB_BLOCK)
    token_loss = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
    is_picked = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    is_picked[rows] = True
    valid = (inputs.labels != IGNORE_INDEX).nonzero().squeeze(1)
    of_rows, of_classes = [], []
    for part in valid.split(ROW_BLOCK):
        x, labels = hidden[part].to(dtype), inputs.labels[part][:, None]
        logits = torch.cat([x @ w.to(dtype).T for w in blocks], dim=1).to(wide)
        log_probs = logits.log_softmax(dim=1)
        del logits
        token_loss[part] = -log_probs.gather(1, labels).squeeze(1)
        d_logits = log_probs.exp_().scatter_add_(1, labels, -torch.ones_like(labels, dtype=wide))
        d_logits = d_logits.div_(len(valid)).to(dtype)
        of_rows.append(d_logits[is_picked[part]])
        of_classes.append(d_logits[:, classes])
    d_logits = torch.cat(of_rows)
    dx = torch.zeros_like(hidden, dtype=dtype)
    start = 0
    total = d_logits.new_zeros(len(d_logits), hidden.shape[1])
    for w in blocks:
        total += d_logits[:, start : start + len(w)] @ w.to(dtype)
        start += len(w)
    dx[valid[is_picked[valid]]] = total
    return Answer(token_loss, dx[rows], torch.cat(of_classes).T @ hidden[valid].to(dtype))


class Gate:
    """The gate of one case.

    Args:
        inputs: what will be timed.
        answers: file for fp64's and the textbook's answers: read where it is there, else written. All
            processes have the same inputs, so one computes them for all.
    """

    def __init__(self, inputs: Inputs, answers: Path | None = None) -> None:
        self._inputs = inputs
        device = inputs.hidden.device
        self._rows = picked(len(inputs.hidden), PICKED_ROWS, device)
        self._classes = picked(len(inputs.weight), PICKED_CLASSES, device)
        if answers is not None and answers.is_file():
            tensors = torch.load(answers, map_location=device, weights_only=True)
            self._exact, theirs = Answer(*tensors[:3]), Answer(*tensors[3:])
        else:
            with torch.no_grad():
                self._exact, theirs = (
                    textbook(inputs, dtype, self._rows, self._classes)
                    for dtype in (torch.float64, inputs.weight.dtype)
                )
            if answers is not None:
                temporary = answers.with_suffix(".part")
                torch.save([*self._exact, *theirs], temporary)
                temporary.replace(answers)
        self.torch_errors = self._errors_of_torch(theirs)

    def judge(self, loss_of: Callable[[Inputs], Any]) -> dict[str, Any]:
        """Judge a candidate; `loss_of` gives its loss or LossOutput, without backward.

        Returns:
            verdict ("passed", "outside", "wrong"), errors, and torch_errors.
        """
        inputs = self._inputs
        inputs.hidden.grad = inputs.weight.grad = None
        out = loss_of(inputs)
        if out is None:
            raise ValueError("a ceiling has no loss to judge")
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        errors = self._errors(loss.detach(), inputs.hidden.grad, inputs.weight.grad)
        if not isinstance(out, Tensor):
            errors["token_loss"] = _relative(out.token_loss, self._exact.token_loss)
            if out.sample_loss.numel():
                errors["sums"] = self._error_of_sums(out)
        inputs.hidden.grad = inputs.weight.grad = None
        torch_errors = {name: self.torch_errors[name] for name in errors}
        return {"verdict": judge(errors, torch_errors), "errors": errors, "torch_errors": torch_errors}

    def _errors(self, loss: Tensor, dx: Tensor | None, dw: Tensor | None) -> dict[str, float]:
        """Infinite for a gradient that never came; no dW of a frozen head."""
        exact = self._exact
        errors = {
            "loss": _relative(loss, exact.token_loss.sum() / self._inputs.num_valid),
            "dx": math.inf if dx is None else _relative(dx[self._rows], exact.dx),
        }
        if self._inputs.weight.requires_grad:
            errors["dw"] = math.inf if dw is None else _relative(dw[self._classes], exact.dw)
        return errors

    def _errors_of_torch(self, theirs: Answer) -> dict[str, float]:
        exact, count = self._exact, self._inputs.num_valid
        token_loss = theirs.token_loss.double()
        # n errors of torch's size that are independent leave |e| / n in the mean; its own may cancel by luck.
        independent = (token_loss - exact.token_loss).norm() / exact.token_loss.sum()
        errors = {
            "loss": max(
                float(independent), _relative(token_loss.sum() / count, exact.token_loss.sum() / count)
            ),
            "dx": _relative(theirs.dx, exact.dx),
            "dw": _relative(theirs.dw, exact.dw),
            "token_loss": _relative(token_loss, exact.token_loss),
        }
        found, right = self._sums(token_loss), self._sums(exact.token_loss)
        errors["sums"] = max(_relative(found[name], right[name]) for name in SUMS)
        return errors

    def _error_of_sums(self, out: Any) -> float:
        right = self._sums(self._exact.token_loss)
        if not torch.equal(out.sample_tokens, right["sample_tokens"]):
            return math.inf
        return max(_relative(getattr(out, name), right[name]) for name in SUMS)

    def _sums(self, token_loss: Tensor) -> dict[str, Tensor]:
        """Sums and counts per sample, by adding in the order of the rows."""
        inputs = self._inputs
        zeros, ids = token_loss.new_zeros(inputs.num_samples), inputs.sample_ids
        valid = (inputs.labels != IGNORE_INDEX).long()
        return {
            "sample_loss": zeros.index_add(0, ids, token_loss),
            "sample_loss_sq": zeros.index_add(0, ids, token_loss.square()),
            "sample_tokens": zeros.long().index_add(0, ids, valid),
        }


def judge(errors: dict[str, float], torch_errors: dict[str, float]) -> str:
    """The verdict on errors, by the rule at the head of this file."""
    if not all(math.isfinite(error) and error <= WRONG_FROM for error in errors.values()):
        return "wrong"
    within = all(errors[name] <= 2 * torch_errors[name] + EPS for name in errors)
    return "passed" if within else "outside"


def _relative(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|, Frobenius; infinite, not NaN, which a comparison would lose."""
    error = float((found.double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf
