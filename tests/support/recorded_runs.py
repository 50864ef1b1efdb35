"""Fixtures of the tests of observability and report: a step's record, and small runs with known numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from versatune_ds.config.schema import Metrics
from versatune_ds.observability.records import EvalRecord, StepRecord
from versatune_ds.observability.sinks import open_sinks


def step_record(step: int, names: Sequence[str] = ("law", "code"), **changes: Any) -> StepRecord:
    """A step of 1,000 real in 1,024 slot tokens, 500 supervised, in 2 s; losses fall by 0.01 a step."""
    k = len(names)
    shares = {name: 1 / k for name in names}
    values: dict[str, Any] = {
        "step": step,
        "loss": 4.0 - 0.01 * step,
        "lr": 1e-4,
        "grad_norm": 1.5,
        "real_tokens": 1000,
        "slot_tokens": 1024,
        "supervised_tokens": 500,
        "samples": 10,
        "domain_loss": {name: 3.0 + i - 0.01 * step for i, name in enumerate(names)},
        "domain_supervised_tokens": {name: 500 // k for name in names},
        "weights": shares,
        "target_shares": shares,
        "achieved_shares": {unit: shares for unit in ("samples", "tokens", "supervised_tokens")},
        "step_s": 2.0,
        "data_wait_s": 0.1,
        "plan_s": 0.05,
        "unix_time_s": 1.7e9 + 2 * step,
    }
    return StepRecord(**{**values, **changes})


@pytest.fixture
def make_step() -> Callable[..., StepRecord]:
    return step_record


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder with the project's own sinks."""

    def make(
        name: str = "run",
        names: Sequence[str] = ("law", "code"),
        steps: int = 20,
        evaluations: bool = True,
        updates: bool = True,
        guard: Any = None,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        info = {
            "name": name,
            "domains": list(names),
            "total_steps": 20,
            "world_size": 2,
            "num_parameters": 7_615_616_512,
            "versions": {"torch": "2.13.0"},
        }
        (folder / "run.json").write_text(json.dumps(info))
        (folder / "resolved.yaml").write_text("weights: {strategy: fostering}\n")
        sinks = open_sinks(folder, Metrics())
        for step in range(1, steps + 1):
            sinks.step(step_record(step, names, **changes))
        tokens = dict.fromkeys(names, 100)
        for step, loss in ((0, 5.25), (steps, 2.125)) if evaluations else ():
            losses = {domain: loss + i for i, domain in enumerate(names)}
            sinks.evaluation(
                EvalRecord(step=step, domain_loss=losses, domain_supervised_tokens=tokens, eval_s=1.0)
            )
        if updates:
            share = {domain: 1 / len(names) for domain in names}
            sinks.weight_update(
                {
                    "step": 10,
                    "gamma": dict.fromkeys(names, 0.25),
                    "phi": dict.fromkeys(names, 0.0),
                    "before": share,
                    "after": share,
                    "applied": True,
                    "reasons": [f"{names[0]} was absent"],
                    "alarms": ["spread of gamma is below 0.001"],
                    **({"guard": guard} if guard is not None else {}),
                }
            )
        sinks.close()
        return folder

    return make
