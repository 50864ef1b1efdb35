"""`model.kl_to_base` in whole runs: what it does, what is said of it, a resume, and refusals.

That its steps are those of plain PyTorch: `test_step.py`.
"""

from __future__ import annotations

import pytest
import torch
import yaml
from plain_backend import plain_run
from small_runs import cut_back, small_run

from versatune_ds.config.load import load_config
from versatune_ds.engine.model.source import load_lm
from versatune_ds.engine.preflight.dry_run import dry_run
from versatune_ds.foundations.errors import ConfigError

ADAPTER = {"kind": "lora", "rank": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl")
    file = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 2},
        optimizer={"lr": 0.02, "warmup_ratio": 0.0},
        train={"max_steps": 4},
        evaluation={"every_n_steps": 2, "max_samples_per_domain": 1},
        checkpoint={"every_n_steps": 1, "keep_last": 9, "export_at_end": False},
    )
    raw = yaml.safe_load(file.read_text())
    load_lm(load_config(file).model, seed=0).save_pretrained(raw["model"]["source"])
    raw["model"] |= {"adapter": ADAPTER, "weights": "pretrained"}
    file.write_text(yaml.safe_dump(raw))
    return file


def run(config, folder, kl):
    return plain_run(config, f"run.dir={folder}", f"model.kl_to_base={kl}")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    return run(config, tmp_path_factory.mktemp("whole") / "run", "{coefficient: 100.0, share: 0.6}")


def test_it_holds_the_model_near_its_base_and_is_told_by_domain(config, whole, tmp_path):
    weak = run(config, tmp_path / "weak", "{coefficient: 1.0e-9, share: 0.6}")
    held, free = (r.lines("metrics") for r in (whole, weak))
    assert held[0]["base_kl"] == pytest.approx(0, abs=1e-9)  # B is 0: the model is its base
    assert 0 < held[-1]["base_kl"] < 0.8 * free[-1]["base_kl"]
    for line in held[1:]:
        known = [kl for kl in line["domain_base_kl"].values() if kl is not None]
        assert known and min(known) <= line["base_kl"] <= max(known)
    assert held[-1]["loss"] > free[-1]["loss"]


def test_losses_that_are_shown_are_cross_entropies_and_none_is_compared_in_evaluations(
    config, whole, tmp_path
):
    plain = run(config, tmp_path / "plain", "null")
    first, without = whole.lines("metrics")[0], plain.lines("metrics")[0]
    assert first["domain_loss"] == without["domain_loss"] and without["base_kl"] is None
    assert whole.lines("eval")[0]["domain_loss"] == plain.lines("eval")[0]["domain_loss"]


def test_a_resumed_run_compares_what_the_whole_one_does(config, whole, tmp_path):
    cut_back(whole.folder, tmp_path / "resumed", 2)
    resumed = run(config, tmp_path / "resumed", "{coefficient: 100.0, share: 0.6}")
    assert all(torch.equal(p, whole.parameters[name]) for name, p in resumed.parameters.items())
    told = [[line["domain_base_kl"] for line in r.lines("metrics")] for r in (resumed, whole)]
    assert told[0] == told[1]


def test_the_model_is_whole_again_behind_the_base_and_a_rehearsal_leaves_nothing(whole):
    model = whole.backend.model
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    with model.base_kl.base(model.lm):
        assert all(layer.disable_adapters and not layer.training for layer in layers)
        assert not torch.is_grad_enabled()
    assert layers and not any(layer.disable_adapters or not layer.training for layer in layers)
    adapted = [p for name, p in model.named_parameters() if "lora_" in name]
    assert all(p.requires_grad for p in adapted)
    dry_run(whole.backend, whole.config)
    assert model.base_kl.take().kl.min() > 0  # all of the full pack was compared
    assert all(p.grad is None for p in adapted)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.adapter=null"], "second copy of the model in memory. Give model.adapter"),
        (["model.neftune_alpha=5"], "would compare noise"),
        (["batch.sequence_parallel=2"], "the base sees whole samples"),
        (["model.kl_to_base={coefficient: 1.0, share: 0}"], "share"),
        (["model.kl_to_base={coefficient: 0}"], "coefficient"),
    ],
)
def test_what_it_cannot_do_is_refused(config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config, ["model.kl_to_base={coefficient: 1.0}", *overrides])
