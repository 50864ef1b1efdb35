"""A backend in plain PyTorch, whole runs with it, and the same steps by hand.

One rank, fp32, no ZeRO. All else of a run is real, so the loop runs in the tests' own process in a second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launching import read_jsonl
from torch.nn.functional import cross_entropy

from versatune_ds.config.load import load_config
from versatune_ds.config.schema import Config
from versatune_ds.data.loader import StepLoader
from versatune_ds.engine import run as run_module
from versatune_ds.engine import train
from versatune_ds.engine.backend.backend import Backend, Write, all_names
from versatune_ds.engine.backend.deepspeed_config import state_layout
from versatune_ds.engine.backend.optimizer import build_optimizer, set_learning_rate
from versatune_ds.engine.backend.ranks import Group, Ranks
from versatune_ds.engine.model.attention import choose_attention
from versatune_ds.engine.model.packed_lm import build_model
from versatune_ds.engine.prepared import Prepared
from versatune_kernels import LossOutput

CPU = torch.device("cpu")
Disturb = Callable[[int, Any], Any]


class PlainBackend:
    """A `Backend` in plain PyTorch.

    Attributes:
        rates: learning rates that the optimizer was stepped with.
        boundaries: at each backward, whether it was said to be the last of its step.
        disturb: called with the number of the step (from 0) and the output of each training pass.
    """

    ranks = Ranks(Group(0, 1), Group(0, 1))
    device = CPU

    def __init__(self, config: Config, disturb: Disturb | None) -> None:
        self.layout = state_layout({"zero_optimization": {"stage": 0}}, config)
        self.attention = choose_attention(config.model, "cpu")
        self.model = build_model(config.model, self.attention, config.run.seed)
        self.optimizer = build_optimizer(self.model, config.optimizer, offload=False)
        self.max_norm = config.optimizer.max_grad_norm
        self.disturb: Disturb = disturb or (lambda step, out: out)
        self.rates: list[float] = []
        self.boundaries: list[bool] = []
        self._norm = 0.0

    def forward(self, **inputs: Any) -> LossOutput:
        out = self.model(**inputs)
        return self.disturb(sum(self.boundaries), out) if self.model.training else out

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        loss.backward()
        self.boundaries.append(is_last)

    def gradients_are_finite(self) -> bool:
        return all(bool(p.grad.isfinite().all()) for p in self.model.parameters() if p.grad is not None)

    def step(self, learning_rate: float) -> bool:
        assert self.boundaries[-1], "a step in the middle of another"
        self.rates.append(learning_rate)
        set_learning_rate(self.optimizer, learning_rate)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self._norm = float(norm)
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
        return self._norm

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train()

    def parameters(self, wanted=all_names) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter) for name, parameter in self.model.own_parameters() if wanted(name))

    def save(self, folder: Path, write: Write) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        write(state, folder / "plain.pt")

    def load(self, folder: Path, layout: Mapping[str, Any], world_size: int) -> None:
        state = torch.load(folder / "plain.pt")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        pass


class PlainRun:
    """A whole run with a `PlainBackend`.

    Attributes:
        backend: it, after the run.
        start: the transformers model before the first step.
        samples: of every step in turn, (domain, index) of each sample.
        train, held_out: token caches by domain.
    """

    def __init__(self, config: Config, disturb: Disturb | None = None) -> None:
        self.config = config
        self.folder = config.run.dir
        self.samples: list[list[tuple[int, int]]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "build_backend", self._build(disturb))
            patch.setattr(run_module, "assemble", self._noting(run_module.assemble))
            patch.setattr(StepLoader, "take", self._taking(StepLoader.take))
            self.finished = train.train_in_group(config, CPU)

    def _build(self, disturb: Disturb | None) -> Callable[..., Backend]:
        def build_backend(config: Config, *_: Any) -> Backend:
            self.backend = PlainBackend(config, disturb)
            self.start = copy.deepcopy(self.backend.model)
            return self.backend

        return build_backend

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def assemble(prepared: Prepared, *rest: Any) -> Any:
            self.train, self.held_out = prepared.train, prepared.held_out
            return original(prepared, *rest)

        return assemble

    def _taking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def take(loader: StepLoader, weights: Any) -> Any:
            plan, batches = original(loader, weights)
            pairs = [pair for p in plan.packs for pair in zip(p.domains, p.samples, strict=True)]
            self.samples.append([(int(domain), int(index)) for domain, index in pairs])
            return plan, batches

        return take

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Of one of its JSONL files."""
        return read_jsonl(self.folder / f"{name}.jsonl")

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.backend.model.lm.named_parameters())


def plain_run(config: Path, *overrides: str, disturb: Disturb | None = None) -> PlainRun:
    """Run the settings of a file, ZeRO stage 0, in the folder that the overrides name."""
    stage_0 = "deepspeed={zero_optimization: {stage: 0}}"
    return PlainRun(load_config(config, [stage_0, *overrides]), disturb)


class Steps:
    """The same training by hand: every sample alone, weighed losses over their weights, torch's AdamW.

    Args:
        run: whose first weights and samples are taken.
        decay: weight decay of matrices.
    """

    def __init__(self, run: PlainRun, decay: float, eps: float) -> None:
        from transformers import AutoModelForCausalLM

        self.run = run
        lm = run.start.lm
        config = copy.deepcopy(lm.config)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.model.load_state_dict(lm.state_dict(), strict=True)
        sizes = [[p for p in self.model.parameters() if (p.ndim >= 2) == many] for many in (True, False)]
        groups = [
            {"params": sizes[0], "weight_decay": decay},
            {"params": sizes[1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=eps)

    def losses(self, cache: Any, index: int) -> torch.Tensor:
        """Losses of the supervised tokens of a sample, in nats."""
        tokens, mask = cache.sample(index)
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = self.model(ids.unsqueeze(0)).logits[0, :-1]
        return cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(mask[1:] > 0)]

    def step(self, samples: Sequence[tuple[int, int]], rate: float) -> SimpleNamespace:
        """One optimizer step; sums by domain before it, and the gradient's norm."""
        sums, counts, weighted, weights = (np.zeros(len(self.run.train)) for _ in range(4))
        total = torch.zeros(())
        for domain, index in samples:
            losses = self.losses(self.run.train[domain], index)
            mask = self.run.train[domain].sample(index)[1][1:]
            weight = torch.from_numpy(mask[mask > 0].astype(np.float64))
            total = total + (losses * weight).sum()
            weighted[domain] += float((losses.detach() * weight).sum())
            weights[domain] += float(weight.sum())
            sums[domain] += float(losses.detach().double().sum())
            counts[domain] += len(losses)
        (total / weights.sum()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return SimpleNamespace(sums=sums, counts=counts, norm=float(norm), weighted=weighted, weights=weights)
