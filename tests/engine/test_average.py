"""The running average of the weights (optimizer.ema_decay): as plain PyTorch's, saved, resumed, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_cases
from safetensors.torch import load_file
from small_runs import cut_back, small_run

from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config
from versatune_ds.engine.backend.optimizer import AVERAGE, average_weights, settle_averages
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import ConfigError

STEPS, CUT, DECAY = 4, 2, 0.75


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return small_run(
        tmp_path_factory.mktemp("average"),
        batch={"pack_len": 192, "packs_per_step": 2},
        train={"max_steps": STEPS},
        optimizer={"lr": 1e-2, "schedule": "constant", "ema_decay": DECAY},
        checkpoint={"every_n_steps": 1, "keep_last": 100, "export_at_end": False},
    )


def zero(stage: int) -> str:
    return f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"


def test_the_average_is_in_host_memory_and_goes_when_it_is_not_asked_for_any_more():
    weights, state = torch.tensor([1.0, 2.0]), {}
    state[weights] = {"exp_avg": torch.zeros(2)}
    for value in (1.0, 5.0, 9.0):
        weights.fill_(value)
        average_weights(state, DECAY)
    assert state[weights][AVERAGE].tolist() == [0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9] * 2
    assert state[weights][AVERAGE].device.type == "cpu"
    settle_averages(state, DECAY)
    assert AVERAGE in state[weights]
    settle_averages(state, None)
    assert list(state[weights]) == ["exp_avg"]


@pytest.mark.parametrize(
    "zero_optimization", ["{stage: 0}", "{stage: 3, offload_optimizer: {device: nvme, nvme_path: /tmp}}"]
)
def test_where_there_are_no_master_weights_it_is_refused(config, zero_optimization):
    settings = load_config(config, [f"deepspeed={{zero_optimization: {zero_optimization}}}"])
    with pytest.raises(ConfigError, match="ema_decay averages fp32 master weights"):
        deepspeed_config(settings, 1)


def exported(run: Path, step: int, *options: str) -> dict[str, torch.Tensor]:
    out = run / f"exported-{step}{len(options)}"
    assert main(["export", str(run), "--step", str(step), "--out", str(out), *options]) == 0
    return load_file(out / "model.safetensors")


def by_hand(run: Path) -> dict[str, torch.Tensor]:
    """The average of what a run's checkpoints hold, with torch's lerp."""
    average = exported(run, 1)
    for step in range(2, STEPS + 1):
        for name, weights in exported(run, step).items():
            average[name].lerp_(weights, 1 - DECAY)
    return average


@pytest.mark.slow
def test_the_average_is_that_of_plain_pytorch_after_resuming_too(config, capsys):
    """Under ZeRO-1 to 3 on 2 ranks, also where they share packs; resumed as it was, and on one rank in
    another stage."""

    def case(name: str, *overrides: str) -> dict:
        return {
            "config": str(config),
            "overrides": [f"run.dir={config.parent / name}", *overrides],
            "sabotage": None,
        }

    run_cases(
        config.parent,
        2,
        [
            *(case(f"stage_{stage}", zero(stage)) for stage in (1, 2, 3)),
            case("shared", zero(3), "batch.sequence_parallel=2"),
            case("offload", "deepspeed={zero_optimization: {stage: 3, offload_optimizer: {device: cpu}}}"),
            case("bf16", zero(3), "model.dtype=bf16"),
            case("without", zero(3), "optimizer.ema_decay=null", "train.max_steps=1"),
        ],
    )
    resumed = {"stage_1": 1, "stage_2": 2, "stage_3": 3}
    for name in resumed:
        cut_back(config.parent / name, config.parent / f"{name}_resumed", CUT)
        cut_back(config.parent / name, config.parent / f"{name}_alone", CUT)
    run_cases(config.parent, 2, [case(f"{name}_resumed", zero(stage)) for name, stage in resumed.items()])
    run_cases(config.parent, 1, [case(f"{name}_alone", zero(4 - stage)) for name, stage in resumed.items()])
    for name in (*resumed, "offload"):
        run = config.parent / name
        ours, expected, last = exported(run, STEPS, "--ema"), by_hand(run), exported(run, STEPS)
        assert ours.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(ours[key], expected[key], rtol=1e-6, atol=1e-8)
            assert not torch.equal(ours[key], last[key])
        if name in resumed:
            again = exported(config.parent / f"{name}_resumed", STEPS, "--ema")
            assert all(torch.equal(again[key], ours[key]) for key in ours)
            alone = exported(config.parent / f"{name}_alone", STEPS, "--ema")
            for key in ours:
                torch.testing.assert_close(alone[key], ours[key], rtol=1e-3, atol=2e-5)
    shared, apart = (exported(config.parent / name, STEPS, "--ema") for name in ("shared", "stage_3"))
    for key in apart:
        torch.testing.assert_close(shared[key], apart[key], rtol=1e-3, atol=2e-5)
    assert exported(config.parent / "bf16", STEPS, "--ema")["model.norm.weight"].dtype == torch.bfloat16
    capsys.readouterr()
    assert main(["export", str(config.parent / "without"), "--ema"]) == constants.EXIT_STATE
    assert "holds no average of the weights; optimizer.ema_decay keeps one" in capsys.readouterr().err
