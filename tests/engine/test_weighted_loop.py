"""Data with weights of turns: the loop's steps are those of plain PyTorch with weighed losses."""

from __future__ import annotations

import json

import pytest
import torch
from plain_backend import PlainRun, Steps, plain_run
from small_runs import SMALL_MODEL, prepare_run, sample_settings

STEPS, RATE = 3, 0.2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> PlainRun:
    folder = tmp_path_factory.mktemp("weighted")
    raw = sample_settings(folder)
    architecture = folder / "sample" / "model" / "config.json"
    architecture.write_text(json.dumps({**json.loads(architecture.read_text()), **SMALL_MODEL}))
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"Question {i}?"},
                {"from": "gpt", "value": f"A wrong answer, {i}.", "weight": i % 3 / 4},
                {"from": "human", "value": "Again?"},
                {"from": "gpt", "value": f"Right: {i}."},
            ],
            "weight": 1 + i % 2,
        }
        for i in range(40)
    ]
    path = folder / "weighted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    law, *others = raw["data"]["train"]
    raw["data"]["train"] = [law | {"path": str(path)}, *others]
    raw["batch"] = {"pack_len": 192, "packs_per_step": 3}
    raw["optimizer"] = {"lr": RATE, "eps": 1.0, "schedule": "constant", "warmup_ratio": 0, "max_grad_norm": 0}
    raw["train"] = {"max_steps": STEPS}
    raw["checkpoint"] = {"export_at_end": False}
    return plain_run(prepare_run(folder, raw))


def test_steps_are_those_of_weighed_losses_and_both_losses_are_written_down(run: PlainRun) -> None:
    steps, differing = Steps(run, decay=0.0, eps=1.0), set[str]()
    for line, samples in zip(run.lines("metrics"), run.samples, strict=True):
        found = steps.step(samples, RATE)
        assert line["grad_norm"] == pytest.approx(found.norm, rel=1e-4)
        assert line["loss"] == pytest.approx(found.sums.sum() / found.counts.sum(), rel=1e-5)
        assert line["weighted_loss"] == pytest.approx(found.weighted.sum() / found.weights.sum(), rel=1e-5)
        for i, name in enumerate(line["domain_loss"]):
            if found.counts[i]:
                plain, weighted = found.sums[i] / found.counts[i], found.weighted[i] / found.weights[i]
                assert line["domain_loss"][name] == pytest.approx(plain, rel=1e-5)
                assert line["domain_weighted_loss"][name] == pytest.approx(weighted, rel=1e-5)
                differing |= {name} if abs(plain - weighted) > 1e-4 else set()
            else:
                assert line["domain_loss"][name] is line["domain_weighted_loss"][name] is None
    assert differing == {"law"}
    for name, parameter in steps.model.named_parameters():
        torch.testing.assert_close(run.parameters[name], parameter, rtol=1e-4, atol=1e-6)
