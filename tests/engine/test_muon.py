"""Muon (optimizer.kind): what it refuses, whose parameters it takes, and that a run with it resumes.

Its steps are held against plain PyTorch in `test_step.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import run_cases
from safetensors.torch import load_file
from small_runs import cut_back, small_run

from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config, validate_config
from versatune_ds.config.schema import Optimizer
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config
from versatune_ds.engine.backend.optimizer import set_learning_rate
from versatune_ds.engine.preflight.checks import check_optimizer
from versatune_ds.foundations.errors import ConfigError

STEPS, CUT = 4, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return small_run(
        tmp_path_factory.mktemp("muon"),
        batch={"pack_len": 192, "packs_per_step": 4},
        train={"max_steps": STEPS},
        optimizer={"kind": "muon", "muon_lr": 2e-2, "lr": 1e-3, "max_grad_norm": 0},
        checkpoint={"every_n_steps": CUT, "keep_last": 100},
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "muon", "max_grad_norm": 0}, "kind: muon and muon_lr need each other"),
        ({"muon_lr": 0.02}, "kind: muon and muon_lr need each other"),
        ({"kind": "muon", "muon_lr": 0.02}, "set max_grad_norm: 0"),
    ],
)
def test_settings_that_cannot_be_meant(settings, text):
    with pytest.raises(ValueError, match=text):
        Optimizer(**settings)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["deepspeed={zero_optimization: {stage: 0}}"], "ZeRO stage 0"),
        (
            ["deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"],
            "zero_optimization.offload_optimizer",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 3, reduce_scatter: true}}"],
            "zero_optimization.reduce_scatter: true",
        ),
        (
            ["deepspeed={zero_optimization: {stage: 1}, data_types: {grad_accum_dtype: fp32}}"],
            "data_types.grad_accum_dtype",
        ),
    ],
)
def test_what_muon_does_not_go_with_is_refused(config, overrides, text):
    settings = load_config(config, overrides)
    with pytest.raises(ConfigError, match=f"muon does not go with {text}"):
        deepspeed_config(settings, 1)


def test_adapters_and_experts_are_refused_before_the_model_is_read(config):
    with pytest.raises(ConfigError, match=r"whole matrices, not for the factors of model\.adapter"):
        load_config(config, ["model.adapter={rank: 2}"])
    settings = load_config(config).optimizer
    check_optimizer(settings, SimpleNamespace(model_type="llama"))
    with pytest.raises(ConfigError, match=r"muon: qwen3_moe has experts, .* use adamw"):
        check_optimizer(settings, SimpleNamespace(model_type="qwen3_moe", num_experts=8))


def test_deepspeed_s_reduce_scatter_is_off_where_muon_needs_that(config):
    settings = load_config(config)
    assert deepspeed_config(settings, 1)["zero_optimization"] == {"stage": 3, "reduce_scatter": False}
    raw = settings.model_dump(mode="json")
    raw["optimizer"] = {}
    assert deepspeed_config(validate_config(raw, "test"), 1)["zero_optimization"] == {"stage": 3}


def test_its_matrices_have_a_learning_rate_of_their_own():
    groups = [{"use_muon": True}, {"use_muon": False}, {}]
    optimizer = type("Wrapped", (), {"param_groups": groups})
    set_learning_rate(optimizer, 0.5, muon_factor=20.0)
    assert [group["lr"] for group in groups] == [10.0, 0.5, 0.5]


@pytest.mark.slow
def test_a_run_with_muon_resumes_bit_for_bit_and_is_refused_elsewhere(config, capsys):
    """Under ZeRO-1 to 3 on 2 ranks, and in bf16 under ZeRO-2 and 3; its checkpoints can be exported."""
    runs = {f"stage_{stage}": (stage, "fp32") for stage in (1, 2, 3)}
    runs |= {f"bf16_{stage}": (stage, "bf16") for stage in (2, 3)}

    def case(name: str, of: str, *overrides: str) -> dict:
        stage, dtype = runs[of]
        zero = f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"
        settings = [f"run.dir={config.parent / name}", f"model.dtype={dtype}", zero, *overrides]
        return {"config": str(config), "overrides": settings, "sabotage": "leave uncompiled"}

    run_cases(config.parent, 2, [case(name, name) for name in runs])
    for name in runs:
        cut_back(config.parent / name, config.parent / f"{name}_resumed", CUT)
        cut_back(config.parent / name, config.parent / f"{name}_elsewhere", CUT)
    run_cases(config.parent, 2, [case(f"{name}_resumed", name) for name in runs])
    other = [case(f"{name}_elsewhere", name) for name in ("stage_2", "stage_3")]
    adamw = ("optimizer.kind=adamw", "optimizer.muon_lr=null")
    run_cases(config.parent, 1, [*other, case("stage_1_elsewhere", "stage_1", *adamw)])
    for name in runs:
        whole, again = (
            load_file(config.parent / n / "model" / "model.safetensors") for n in (name, f"{name}_resumed")
        )
        assert all(torch.equal(whole[key], again[key]) for key in whole)
        out = config.parent / name / "exported"
        assert main(["export", str(config.parent / name), "--out", str(out)]) == 0
        saved = load_file(out / "model.safetensors")
        assert all(torch.equal(whole[key], saved[key]) for key in whole)
        metrics = [
            json.loads(line) for line in (config.parent / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.02
    for name, text in (("stage_2", "Muon's momentum"), ("stage_1", "another optimizer cannot go on")):
        outcome = json.loads((config.parent / f"{name}_elsewhere" / "outcome_rank_0.json").read_text())
        assert outcome["type"] == "StateError" and text in outcome["text"]
    capsys.readouterr()
