"""What was built apart, together: an adapter of a mixture of experts with DFT, noise, recomputation, an
average of the weights and a best checkpoint, on two ranks.

Each alone is in `test_adapters.py`, `test_router.py`, `test_average.py` and `test_best_checkpoint.py`, steps
against plain PyTorch in `test_step.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import read_jsonl, run_cases
from safetensors.torch import load_file
from small_runs import SMALL_MODEL, cut_back, prepare_run, sample_settings
from transformers import AutoConfig, AutoModelForCausalLM

from versatune_ds.cli.main import main

STEPS, BEST, CUT, DECAY = 5, 4, 2, 0.75
EXPERTS = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16,
           "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.1}  # fmt: skip
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """`whole` under ZeRO-3; from its second step on `resumed` there, and `elsewhere` under ZeRO-2."""
    folder = tmp_path_factory.mktemp("combined")
    raw = sample_settings(folder)
    base = folder / "sample" / "model"
    shape = json.loads((base / "config.json").read_text()) | SMALL_MODEL | EXPERTS
    (base / "config.json").write_text(json.dumps(shape))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    raw["model"] |= {"weights": "pretrained", "dtype": "fp32", "adapter": {"rank": 4}, "objective": "dft",
                     "neftune_alpha": 5, "activation_checkpointing": "all"}  # fmt: skip
    raw |= {"batch": {"pack_len": 192, "packs_per_step": 4}, "train": {"max_steps": STEPS}}
    raw["optimizer"] = {"lr": 1e-2, "schedule": "constant", "ema_decay": DECAY}
    raw["evaluation"] = {"every_n_steps": 1, "max_samples_per_domain": 1, "select": "overall"}
    raw["checkpoint"] = {"every_n_steps": 1, "keep_last": 100}
    config = prepare_run(folder, raw)

    def case(name: str, stage: int) -> dict:
        zero = f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"
        settings = [f"run.dir={folder / name}", zero]
        return {"config": str(config), "overrides": settings, "sabotage": f"lowest after step {BEST}"}

    run_cases(folder, 2, [case("whole", 3)])
    for name in ("resumed", "elsewhere"):
        cut_back(folder / "whole", folder / name, CUT)
    run_cases(folder, 2, [case("resumed", 3), case("elsewhere", 2)])
    return folder


def exported(run: Path, *options: str) -> dict[str, torch.Tensor]:
    out = run / "-".join(["exported", *(option.strip("-") for option in options)])
    assert main(["export", str(run), "--out", str(out), *options]) == 0
    return load_file(out / ("model.safetensors" if "--merge" in options else "adapter_model.safetensors"))


def average(run: Path, last: int) -> dict[str, torch.Tensor]:
    """Of the adapters in a run's checkpoints, with torch's lerp."""
    found = exported(run, "--step", "1")
    for step in range(2, last + 1):
        for name, weights in exported(run, "--step", str(step)).items():
            found[name].lerp_(weights, 1 - DECAY)
    return found


def close(ours: dict, expected: dict, **tolerance: float) -> None:
    assert ours.keys() == expected.keys() and ours
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, **tolerance)


@pytest.mark.slow
def test_it_resumes_bit_for_bit_and_exports_its_best_adapter(runs):
    fields = ("step", "loss", "domain_loss", "grad_norm", "router_loss", "expert_load")
    whole, resumed = (read_jsonl(runs / name / "metrics.jsonl") for name in ("whole", "resumed"))
    assert [[line[f] for f in fields] for line in whole] == [[line[f] for f in fields] for line in resumed]
    assert len(whole) == STEPS
    best, last = (
        load_file(runs / "whole" / "model" / "adapter_model.safetensors"),
        exported(runs / "whole", "--newest"),
    )
    assert all(".self_attn." in name for name in best)
    assert any(not torch.equal(best[name], tensor) for name, tensor in last.items())
    for name in ("whole", "resumed"):
        close(load_file(runs / name / "model" / "adapter_model.safetensors"), best, rtol=0, atol=0)
        close(exported(runs / name), best, rtol=0, atol=0)
        close(exported(runs / name, "--step", str(STEPS)), last, rtol=0, atol=0)


@pytest.mark.slow
def test_the_average_of_the_adapter_is_that_of_the_step_that_is_exported(runs, capsys):
    whole = runs / "whole"
    of_best = average(whole, BEST)
    close(exported(whole, "--ema"), of_best, rtol=1e-6, atol=1e-8)
    close(exported(whole, "--ema", "--step", str(STEPS)), average(whole, STEPS), rtol=1e-6, atol=1e-8)
    close(exported(runs / "resumed", "--ema"), exported(whole, "--ema"), rtol=0, atol=0)
    close(exported(runs / "elsewhere", "--ema"), of_best, rtol=1e-3, atol=2e-5)
    a, b = (of_best[f"base_model.model.{Q_PROJ}.lora_{part}.weight"] for part in "AB")
    base = load_file(runs / "sample" / "model" / "model.safetensors")
    merged = exported(whole, "--ema", "--merge")
    assert merged.keys() == base.keys()
    expected = base[f"{Q_PROJ}.weight"] + 32 / 4 * b @ a
    torch.testing.assert_close(merged[f"{Q_PROJ}.weight"], expected, rtol=1e-5, atol=1e-7)
    experts = [name for name in base if ".mlp." in name]
    assert len(experts) > 30 and all(torch.equal(merged[name], base[name]) for name in experts)
    capsys.readouterr()
