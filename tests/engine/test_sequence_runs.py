"""Whole runs whose packs are shared by two ranks: as if each rank had packs of its own, to fp32 tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import read_jsonl, run_cases
from safetensors.torch import load_file
from small_runs import cut_back, small_run
from transformers import AutoConfig, AutoModelForCausalLM

STEPS, CUT = 5, 2
SHARED = "batch.sequence_parallel=2"
STAGE = {stage: f"deepspeed={{zero_optimization: {{stage: {stage}}}}}" for stage in (1, 2, 3)}
# name: overrides; the first is the yardstick
RUNS = {
    "whole": (STAGE[3],),
    "shared": (STAGE[3], SHARED),
    "shared_stage_1": (STAGE[1], SHARED),
    "shared_stage_2": (STAGE[2], SHARED),
    "rehearsed": (STAGE[3], SHARED, "train.rehearse=on"),
    "whole_to_shared": (STAGE[3], SHARED),
    "shared_to_whole": (STAGE[3],),
}
SPIKE = ("train.max_steps=14", "train.spike_factor=1.5", "checkpoint.every_n_steps=100")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Weights that move by held-out losses, packs of an odd length, evaluation, checkpoints."""
    folder = tmp_path_factory.mktemp("sequence_runs")
    config = small_run(
        folder,
        batch={"pack_len": 191, "packs_per_step": 4},
        train={"max_steps": STEPS},
        optimizer={"lr": 2e-3},
        weights={"every_n_steps": 2, "loss_source": "probe", "probe_samples": 4},
        evaluation={"every_n_steps": 2, "max_samples_per_domain": 5},
        checkpoint={"every_n_steps": CUT, "keep_last": 100},
    )

    model = folder / "sample" / "model"  # saved weights: ZeRO-3 draws random ones in another way
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)

    def case(name: str, *overrides: str, sabotage: str | None = None) -> dict:
        return {
            "config": str(config),
            "overrides": [f"run.dir={folder / name}", "model.weights=pretrained", *overrides],
            "sabotage": sabotage,
            "dump": [STEPS],
        }

    run_cases(folder, 2, [case(name, *RUNS[name]) for name in RUNS if "_to_" not in name])
    cut_back(folder / "whole", folder / "whole_to_shared", CUT)
    cut_back(folder / "shared", folder / "shared_to_whole", CUT)
    cases = [case(name, *RUNS[name]) for name in RUNS if "_to_" in name]
    cases.append(case("spike", *SPIKE, SHARED, sabotage="spike in step 12"))
    cases.append(case("too_many", "batch.sequence_parallel=4"))
    run_cases(folder, 2, cases)
    return folder


def close(ours: dict, expected: dict) -> bool:
    return ours.keys() == expected.keys() and all(
        (value is None and expected[name] is None)
        or value == pytest.approx(expected[name], rel=3e-5, abs=1e-9)
        for name, value in ours.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "whole"])
def test_a_run_with_shared_packs_is_the_run_without(runs, name):
    """Losses, sums, weights and held-out losses of every step, and all parameters and moments at the end."""
    for file, keys in {
        "metrics": ("domain_loss", "weights", "domain_supervised_tokens", "epochs"),
        "eval": ("domain_loss", "domain_stderr", "domain_supervised_tokens"),
    }.items():
        ours, expected = (read_jsonl(runs / run / f"{file}.jsonl") for run in (name, "whole"))
        assert [line["step"] for line in ours] == [line["step"] for line in expected]
        for mine, theirs in zip(ours, expected, strict=True):
            assert all(close(mine[key], theirs[key]) for key in keys), (mine, theirs)
    norms = [
        [line["grad_norm"] for line in read_jsonl(runs / run / "metrics.jsonl")] for run in (name, "whole")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    ours, expected = (load_file(runs / run / f"whole_{STEPS}_trained.safetensors") for run in (name, "whole"))
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            ours[key], value, rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.slow
def test_a_skipped_step_names_each_sample_once(runs):
    """A spike in the rows of one of the two ranks; both know the loss of every sample of the pack."""
    (skipped,) = read_jsonl(runs / "spike" / "skipped_steps.jsonl")
    named = [(sample["domain"], sample["sample"]) for sample in skipped["samples"]]
    assert skipped["step"] == 13 and len(set(named)) == len(named) > 1
    assert [line["skipped"] for line in read_jsonl(runs / "spike" / "metrics.jsonl")][-2:] == [True, False]


@pytest.mark.slow
def test_ranks_that_cannot_form_groups_are_refused(runs):
    for rank in (0, 1):
        outcome = json.loads((runs / "too_many" / f"outcome_rank_{rank}.json").read_text())
        assert outcome["type"] == "ConfigError"
        assert "batch.sequence_parallel is 4, and 2 ranks are no multiple of it" in outcome["text"]
