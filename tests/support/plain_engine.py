"""A stand-in for DeepSpeed's engine in plain PyTorch, whole runs with it, and the same steps by hand.

One rank, fp32, no ZeRO. All else of a run is real, so the loop runs in the tests' own process in a second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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
from versatune_ds.engine.attention import choose_attention
from versatune_ds.engine.build import Engine
from versatune_ds.engine.model import build_model
from versatune_ds.engine.optimizer import build_optimizer

CPU = torch.device("cpu")
STAGE_0 = {"zero_optimization": {"stage": 0}}


class PlainEngine:
    """What the loop uses of DeepSpeed's engine.

    Attributes:
        rates: learning rates that the optimizer was stepped with.
        boundaries: at each backward, whether it was said to be the last of its step.
        disturb: called with the number of the step (from 0) and the output of each training pass.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self.module, self.optimizer, self.max_norm = model, optimizer, max_norm
        self.rates: list[float] = []
        self.boundaries: list[bool] = []
        self.disturb: Callable[[int, Any], Any] = lambda step, out: out
        self.checkpoint_engine: Any = None
        self._is_boundary = self._applied = False
        self._norm = 0.0

    def __call__(self, **inputs: Any) -> Any:
        out = self.module(**inputs)
        return self.disturb(sum(self.boundaries), out) if self.module.training else out

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._is_boundary = is_boundary

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas, "DeepSpeed would divide by the accumulation steps"
        loss.backward()
        self.boundaries.append(self._is_boundary)

    def step(self) -> None:
        self._applied = self._is_boundary
        if not self._is_boundary:
            return
        (rate,) = {group["lr"] for group in self.optimizer.param_groups}
        self.rates.append(rate)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self._norm = float(norm)
        if self.max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def was_step_applied(self) -> bool:
        return self._applied

    def get_global_grad_norm(self) -> float:
        return self._norm

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoint_engine.save(state, Path(folder) / tag / "plain.pt")

    def load_checkpoint(self, folder: str, tag: str, **_: Any) -> tuple[str, dict[str, Any]]:
        path = Path(folder) / tag / "plain.pt"
        state = torch.load(path)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return str(path), {}


class PlainRun:
    """A whole run with a `PlainEngine`.

    Attributes:
        engine: it, after the run; `built` with model and device around it.
        start: the transformers model before the first step.
        samples: of every step in turn, (domain, index) of each sample.
        train, held_out: token caches by domain.
    """

    def __init__(self, config: Config, disturb: Callable[[int, Any], Any] | None = None) -> None:
        self.config = config
        self.folder = config.run.dir
        self.samples: list[list[tuple[int, int]]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "build_engine", self._build(disturb))
            patch.setattr(run_module, "open_held_out", self._noting(run_module.open_held_out))
            patch.setattr(StepLoader, "take", self._taking(StepLoader.take))
            self.finished = train.train_in_group(config, CPU)

    def _build(self, disturb: Callable[[int, Any], Any] | None) -> Callable[..., Engine]:
        def build_engine(config: Config, device: torch.device) -> Engine:
            attention = choose_attention(config.model, device.type)
            model = build_model(config.model, attention, config.run.seed)
            optimizer = build_optimizer(model, config.optimizer, offload=False)
            self.engine = PlainEngine(model, optimizer, config.optimizer.max_grad_norm)
            if disturb is not None:
                self.engine.disturb = disturb
            self.start = copy.deepcopy(model)
            self.built = Engine(self.engine, model, device, attention, STAGE_0)
            return self.built

        return build_engine

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def open_held_out(config: Config, table: Any, caches: Any, *rest: Any) -> Any:
            self.held_out = caches
            return original(config, table, caches, *rest)

        return open_held_out

    def _taking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def take(loader: StepLoader, weights: Any) -> Any:
            plan, batches = original(loader, weights)
            self.train = loader._caches
            pairs = [pair for p in plan.packs for pair in zip(p.domains, p.samples, strict=True)]
            self.samples.append([(int(domain), int(index)) for domain, index in pairs])
            return plan, batches

        return take

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Of one of its JSONL files."""
        return read_jsonl(self.folder / f"{name}.jsonl")

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.engine.module.lm.named_parameters())


def plain_run(config: Path, *overrides: str, disturb: Callable[[int, Any], Any] | None = None) -> PlainRun:
    """Run the settings of a file, ZeRO stage 0, in the folder that the overrides name."""
    stage_0 = "deepspeed={zero_optimization: {stage: 0}}"
    return PlainRun(load_config(config, [stage_0, *overrides]), disturb)


class Steps:
    """The same training by hand: every sample alone, summed losses over their number, torch's AdamW.

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
        return cross_entropy(logits, ids[1:], reduction="none")[torch.from_numpy(mask[1:].copy())]

    def step(self, samples: Sequence[tuple[int, int]], rate: float) -> SimpleNamespace:
        """One optimizer step; sums by domain before it, and the gradient's norm."""
        sums, counts = (np.zeros(len(self.run.train)) for _ in range(2))
        total = torch.zeros(())
        for domain, index in samples:
            losses = self.losses(self.run.train[domain], index)
            total = total + losses.sum()
            sums[domain] += float(losses.detach().double().sum())
            counts[domain] += len(losses)
        (total / counts.sum()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return SimpleNamespace(sums=sums, counts=counts, norm=float(norm))
