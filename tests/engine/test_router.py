"""Routers of a mixture of experts: their loss against transformers', their counts, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import read_jsonl, run_cases
from safetensors.torch import load_file
from small_runs import SMALL_MODEL, prepare_run, sample_settings
from tiny_families import family_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from versatune_ds.cli.main import main
from versatune_ds.config.model import Adapter, Model
from versatune_ds.engine.model.attention import choose_attention
from versatune_ds.engine.model.packed_lm import build_model
from versatune_ds.engine.model.router import Routers, balance
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.statistics import StepStatistics
from versatune_ds.foundations.errors import ConfigError

CPU = torch.device("cpu")


def logits(tokens: int = 9, experts: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tokens, experts, generator=generator, requires_grad=True) for _ in range(3))


def test_the_loss_is_that_of_transformers_without_padding():
    ours, theirs, real = logits(), logits(), torch.arange(9) < 7
    found = balance(ours, 2, real)
    expected = load_balancing_loss_func(theirs, 6, 2, real.float())
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    expected.backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert found.load.sum(1).tolist() == [14, 14, 14]
    assert float(balance(ours, 2, torch.zeros(9, dtype=torch.bool)).loss) == 0.0


def test_even_routers_have_the_loss_of_their_choices():
    even = tuple(
        50.0 * torch.eye(6)[torch.arange(12) % 6] + torch.eye(6)[(torch.arange(12) + 1) % 6] for _ in range(2)
    )
    found = balance(even, 2, torch.ones(12, dtype=torch.bool))
    assert float(found.loss) == pytest.approx(2.0)
    routers = Routers(SimpleNamespace(model_type="qwen3_moe", num_experts=6, num_experts_per_tok=2,
                                      router_aux_loss_coef=0.25), None)  # fmt: skip
    assert float(routers.observe(even, torch.ones(12, dtype=torch.bool))) == pytest.approx(0.5)
    measures = routers.measures(routers.take().numpy(), packs=1)
    assert measures["router_loss"] == pytest.approx(2.0)
    assert list(measures["expert_load"].values()) == pytest.approx([1 / 6] * 6)
    assert measures["expert_load_max"] == pytest.approx(1.0)


def test_the_busiest_expert_of_a_layer_is_told():
    sums = np.array([6.0, 3, 1, 1, 3])  # two layers of two experts: mean loads are even, no layer is
    routers = Routers(SimpleNamespace(model_type="mixtral", num_local_experts=2, num_experts_per_tok=1,
                                      router_aux_loss_coef=0.1), None)  # fmt: skip
    measures = routers.measures(sums, packs=4)
    assert measures == {"router_loss": 1.5, "expert_load": {"0": 0.5, "1": 0.5}, "expert_load_max": 1.5}


def test_counts_of_a_rehearsal_are_dropped_and_those_of_a_step_go_with_its_sums():
    config = SimpleNamespace(
        model_type="olmoe", num_experts=6, num_experts_per_tok=2, router_aux_loss_coef=0.0
    )
    routers = Routers(config, None)
    routers.observe(logits(), torch.ones(9, dtype=torch.bool))
    statistics = StepStatistics(2, CPU, routers)
    routers.observe(logits(), torch.arange(9) < 4)
    totals = statistics.reduce()
    assert totals.routers[1:].sum() == 3 * 4 * 2 and not totals.flags.stop
    assert StepStatistics(2, CPU).reduce().routers is None


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    family_model("qwen3_moe").save_pretrained(folder)
    return folder


def build(folder, **more):
    settings = Model(source=str(folder), dtype="fp32", **more)
    return build_model(settings, choose_attention(settings, "cpu"), seed=0)


def test_frozen_routers_train_nothing_and_add_nothing(experts):
    frozen = {name for name, p in build(experts, router="frozen").named_parameters() if not p.requires_grad}
    assert frozen == {f"lm.model.layers.{i}.mlp.gate.weight" for i in range(4)}
    assert build(experts, router="frozen").routers.coefficient == 0.0
    adapted = build(experts, adapter=Adapter())
    assert adapted.routers.coefficient == 0.0
    assert not any("gate" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert build(experts).routers.coefficient == 0.5
    assert build(experts, router_aux_loss=0.0).routers.coefficient == 0.0
    assert all(p.requires_grad for p in build(experts).parameters())


def test_an_evaluation_counts_nothing(experts):
    model = build(experts).eval()
    model.routers.observe = None
    ids = torch.arange(8)
    model(ids, ids, ids.clamp(3), ids * 0, torch.tensor([0, 8], dtype=torch.int32), 8, 1, 8, 1.0)


def test_settings_of_routers_that_would_do_nothing_are_refused(experts):
    dense, mixture = (
        SimpleNamespace(model_type="llama"),
        SimpleNamespace(model_type="qwen3_moe", num_experts=8),
    )
    for settings in ({"router": "frozen"}, {"router_aux_loss": 0.1}):
        with pytest.raises(ConfigError, match=rf"model.{next(iter(settings))}: llama has no routers"):
            preflight.check_router(Model(source="x", **settings), dense)
        preflight.check_router(Model(source="x", **settings), mixture)
        with pytest.raises(ConfigError, match=rf"model.{next(iter(settings))}: with model.adapter routers"):
            preflight.check_router(Model(source="x", adapter=Adapter(), **settings), mixture)
    with pytest.raises(ConfigError, match=r"need no model\.router_aux_loss"):
        preflight.check_router(Model(source="x", router="frozen", router_aux_loss=0.1), mixture)


# --- whole runs ---------------------------------------------------------------------------------------------

STEPS = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """On two ranks under ZeRO-3: `whole`, and `parts`, which stopped on the way and went on."""
    folder = tmp_path_factory.mktemp("runs")
    raw = sample_settings(folder)
    architecture = folder / "sample" / "model" / "config.json"
    experts = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 64,
               "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.1}  # fmt: skip
    architecture.write_text(json.dumps(json.loads(architecture.read_text()) | SMALL_MODEL | experts))
    raw |= {"batch": {"pack_len": 192, "packs_per_step": 4}, "train": {"max_steps": STEPS}}
    raw["checkpoint"] = {"every_n_steps": STEPS}
    config = prepare_run(folder, raw)
    names = (("whole", None), ("parts", "stop in step 3"), ("parts", None))
    run_cases(
        folder,
        2,
        [
            {"config": str(config), "overrides": [f"run.dir={folder / name}"], "sabotage": sabotage}
            for name, sabotage in names
        ],
    )
    return folder


@pytest.mark.slow
def test_a_run_with_experts_stops_goes_on_and_tells_their_loads(runs):
    fields = ("step", "loss", "grad_norm", "router_loss", "expert_load", "expert_load_max")
    whole, parts = (read_jsonl(runs / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [[line[f] for f in fields] for line in whole] == [[line[f] for f in fields] for line in parts]
    assert len(whole) == STEPS
    for line in whole:
        assert (
            line["router_loss"] > 2 and line["expert_load_max"] >= 64 * max(line["expert_load"].values()) > 1
        )
        assert sum(line["expert_load"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_the_export_has_every_expert_apart_and_a_checkpoint_gives_the_same(runs):
    exports = [runs / name / "model" for name in ("whole", "parts")]
    assert main(["export", str(runs / "whole"), "--out", str(runs / "again")]) == 0
    first, *others = (load_file(folder / "model.safetensors") for folder in (*exports, runs / "again"))
    assert "model.layers.1.mlp.experts.63.down_proj.weight" in first
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    _, info = AutoModelForCausalLM.from_pretrained(exports[0], output_loading_info=True)
    assert not any(info.values())
