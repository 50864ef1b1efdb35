"""Moments and master weights in bf16: what rounding does, and whole runs that stop, move and go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import read_jsonl, run_cases
from safetensors.torch import load_file
from small_runs import cut_back, small_run

from versatune_ds.apps.plan.memory import memory_plan
from versatune_ds.apps.plan.plan import checkpoint_bytes
from versatune_ds.apps.plan.setup import Setup
from versatune_ds.config.load import validate_config
from versatune_ds.engine.backend.deepspeed_config import deepspeed_config
from versatune_ds.engine.backend.rounded_adamw import RoundedAdamW, rounded
from versatune_ds.foundations.errors import ConfigError

STEPS, CUT = 6, 2
ZERO = {stage: f"deepspeed={{zero_optimization: {{stage: {stage}}}}}" for stage in (1, 2, 3)}
WHOLE = {
    # name: (stage, settings)
    "fp32": (3, ("model.dtype=bf16",)),
    "moments_fp32": (3, ("model.dtype=fp32", "optimizer.states=bf16_moments")),
    "moments": (2, ("model.dtype=bf16", "optimizer.states=bf16_moments")),
    "stochastic": (1, ("model.dtype=bf16", "optimizer.states=bf16_stochastic")),
    "stochastic_sharded": (3, ("model.dtype=bf16", "optimizer.states=bf16_stochastic")),
}
MOVED = {
    # name: (from, stage, settings) on one rank
    "moments_moved": ("moments", 3, WHOLE["moments"][1]),
    "stochastic_moved": ("stochastic_sharded", 2, WHOLE["stochastic"][1]),
    "fp32_to_moments": ("fp32", 3, WHOLE["moments"][1]),
}


# --- rounding -----------------------------------------------------------------------------------------------


def test_rounding_is_right_on_average_and_goes_to_a_neighbour():
    torch.manual_seed(0)
    for value in (1.001, -3.14159, 1e-30):
        found = rounded(torch.full((200_000,), value))
        assert torch.equal(found, found.bfloat16().float())
        near = torch.tensor(value).bfloat16().float()
        assert (found - value).abs().max() <= 2**-7 * abs(value) and len(found.unique()) == 2
        assert near in found.unique()
        assert found.double().mean() == pytest.approx(value, rel=2e-5)
    assert torch.equal(rounded(torch.tensor([0.0, 1.0, -2.5])), torch.tensor([0.0, 1.0, -2.5]))


def steps_of(make, dtype, rate, steps=200):
    """Weights after steps towards a target under noisy gradients."""
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.linspace(0.5, 2, 4096).to(dtype))
    target, optimizer = torch.linspace(-1, 1, 4096), make([{"params": [weight], "weight_decay": 0.1}], rate)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        noise = torch.randn(4096, generator=generator)
        weight.grad = (weight.detach().float() - target + noise).to(dtype)
        optimizer.step()
    return weight.detach().float()


def plain(groups, rate):
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)


def ours(groups, rate):
    return RoundedAdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)


def test_bf16_moments_follow_torchs_adamw():
    start = torch.linspace(0.5, 2, 4096)
    expected, found = (steps_of(make, torch.float32, 1e-3) for make in (plain, ours))
    moved = (expected - start).norm()
    assert moved > 1 and 0 < (found - expected).norm() < 0.01 * moved


def test_updates_smaller_than_a_bf16_step_are_not_lost():
    """At 1e-5 a weight of 1 moves by less than bf16 can say: torch's AdamW on bf16 weights stands still."""
    start = torch.linspace(0.5, 2, 4096).bfloat16().float()
    expected = steps_of(plain, torch.float32, 1e-5) - torch.linspace(0.5, 2, 4096)
    lost, found = (steps_of(make, torch.bfloat16, 1e-5) - start for make in (plain, ours))
    assert found.mean() == pytest.approx(float(expected.mean()), rel=0.1)
    assert abs(float(lost.mean())) < 0.5 * abs(float(expected.mean()))


def test_small_gradients_add_up_in_a_second_moment():
    """Each step adds less than half the distance of two bf16 numbers; to the nearest it stands still."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = RoundedAdamW([{"params": [weight]}], lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    torch.manual_seed(0)
    for step in range(1500):
        weight.grad = torch.full((4096,), 1.0 if step < 500 else 2.0)
        optimizer.step()
    expected = (1 - 0.999**500) * 0.999**1000 + 4 * (1 - 0.999**1000)
    assert optimizer.state[weight]["exp_avg_sq"].double().mean() == pytest.approx(expected, rel=0.01)


def test_moments_that_are_loaded_in_fp32_become_bf16_again():
    weight = torch.nn.Parameter(torch.ones(8))
    first, second = (ours([{"params": [weight]}], 0.1) for _ in range(2))
    weight.grad = torch.ones(8)
    first.step()
    second.load_state_dict(first.state_dict())
    second.step()
    state = second.state[weight]
    assert state["step"] == 2 and state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


# --- settings -----------------------------------------------------------------------------------------------


def settings(states: str, zero: dict, dtype="bf16", **deepspeed):
    raw = {
        "run": {"dir": "x"},
        "model": {"source": "m", "dtype": dtype},
        "data": {"train": [{"path": "a", "domain": "law"}]},
        "domains": {"names": ["law"]},
        "batch": {"packs_per_step": 12},
        "optimizer": {"states": states},
        "train": {"max_steps": 1},
        "deepspeed": {"zero_optimization": zero, **deepspeed},
    }
    return validate_config(raw, "test")


@pytest.mark.parametrize(
    ("zero", "more", "message"),
    [
        ({"stage": 0}, {}, "stage 0 has no states"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}, "CPU Adam"),
        ({"stage": 1}, {"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype"),
    ],
)
@pytest.mark.parametrize("states", ["bf16_moments", "bf16_stochastic"])
def test_where_only_fp32_states_can_be_held_others_are_refused(states, zero, more, message):
    with pytest.raises(ConfigError, match=f"optimizer.states other than fp32: .*{message}"):
        deepspeed_config(settings(states, zero, **more), 1)


def test_bf16_masters_are_for_bf16_models():
    with pytest.raises(ConfigError, match="bf16_stochastic needs"):
        settings("bf16_stochastic", {"stage": 3}, dtype="fp32")


def test_the_plan_of_8b_on_one_gpu_is_that_of_the_arithmetic():
    """16, 12 and 10 bytes a parameter with weight and gradient."""
    from versatune_ds.apps.bench.shapes import find_shape

    shape = find_shape("llama-3-8b")
    for states, held, saved in (("fp32", 16, 12), ("bf16_moments", 12, 8), ("bf16_stochastic", 10, 6)):
        setup = Setup(gpus=1, states=states)
        parts = {part.name: part.bytes for part in memory_plan(shape, setup).held}
        names = ("parameters", "gradients", "moments", "master weights")
        assert sum(parts[name] for name in names) == held * shape.parameters
        assert checkpoint_bytes(shape, setup) == saved * shape.parameters


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 4},
        train={"max_steps": STEPS},
        optimizer={"lr": 2e-3, "weight_decay": 0.1},
        checkpoint={"every_n_steps": 2, "keep_last": 100, "export_at_end": False},
    )

    def case(name: str, stage: int, overrides: tuple[str, ...], *dump: int) -> dict:
        chosen = [f"run.dir={folder / name}", ZERO[stage], *overrides]
        return {"config": str(config), "overrides": chosen, "sabotage": None, "dump": dump}

    run_cases(folder, 2, [case(name, *how, CUT) for name, how in WHOLE.items()])
    for name in WHOLE:
        cut_back(folder / name, folder / f"{name}_resumed", CUT)
    for name, (source, *_) in MOVED.items():
        cut_back(folder / source, folder / name, CUT)
    run_cases(folder, 2, [case(f"{name}_resumed", *how) for name, how in WHOLE.items()])
    run_cases(folder, 1, [case(name, stage, how, CUT) for name, (_, stage, how) in MOVED.items()])
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.slow
class TestRuns:
    @pytest.mark.parametrize("name", WHOLE)
    def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(self, runs, name):
        assert losses(runs / f"{name}_resumed") == losses(runs / name) and len(losses(runs / name)) == STEPS

    @pytest.mark.parametrize("name", ["moments", "stochastic", "stochastic_sharded"])
    def test_losses_are_near_those_of_fp32_states(self, runs, name):
        found, expected = losses(runs / name), losses(runs / "fp32")
        assert expected[-1] < 0.985 * expected[0] and found != expected
        assert found == pytest.approx(expected, rel=5e-3)

    @pytest.mark.parametrize("name", ["moments_moved", "stochastic_moved"])
    def test_states_arrive_on_another_number_of_ranks_and_in_another_stage(self, runs, name):
        source = MOVED[name][0]
        saved = load_file(runs / source / f"whole_{CUT}_trained.safetensors")
        loaded = load_file(runs / name / f"whole_{CUT}_loaded.safetensors")
        assert saved.keys() == loaded.keys()
        different = [k for k in saved if not torch.equal(saved[k].flatten(), loaded[k].flatten())]
        assert not different
        moments = [tensor.float() for key, tensor in saved.items() if key.startswith("exp_avg")]
        assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in moments)
        assert any(tensor.abs().max() > 0 for tensor in moments)
        assert losses(runs / name) == pytest.approx(losses(runs / source), rel=5e-3)

    def test_a_run_with_fp32_states_goes_on_with_less(self, runs):
        saved = load_file(runs / "fp32" / f"whole_{CUT}_trained.safetensors")
        loaded = load_file(runs / "fp32_to_moments" / f"whole_{CUT}_loaded.safetensors")
        for name, tensor in saved.items():
            expected = tensor.bfloat16() if name.startswith("exp_avg") else tensor
            assert torch.equal(loaded[name].flatten(), expected.flatten()), name
        assert losses(runs / "fp32_to_moments") == pytest.approx(losses(runs / "fp32"), rel=5e-3)
