"""Settings that follow from a run's settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import REPOSITORY

from versatune_ds.config.derive import (
    LARGE_MODEL,
    proxy_config,
    reference_adapter,
    single_domain_config,
    with_model,
)
from versatune_ds.config.load import load_config
from versatune_ds.config.model import Adapter
from versatune_ds.foundations.errors import ConfigError, DataError


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.chdir(REPOSITORY)

    def load(*overrides):
        return load_config("configs/quickstart.yaml", overrides)

    return load


def test_one_domain_alone_with_early_stopping(quickstart):
    config = quickstart(
        "reference.packs_per_step=4", "reference.max_epochs=5", "reference.evaluations_per_epoch=2",
        "reference.patience=7", "reference.lr=1e-4", "domains.max_epochs=1",
        "train={max_steps: 100, profile: {steps: [60, 61]}}",
        "reference.model={source: small, dtype: bf16}",
    )  # fmt: skip
    derived = single_domain_config(config, "law", Path("out/law"), 10 * 4 * 256)  # 10 steps a pass
    assert derived.domains.initial == {name: float(name == "law") for name in config.domains.names}
    assert derived.domains.min_weight == 0 and derived.domains.max_epochs is None
    assert derived.weights.strategy == "constant" and derived.weights.reference is None
    assert (derived.train.max_steps, derived.train.epochs, derived.train.profile) == (50, None, None)
    assert (derived.evaluation.every_n_steps, derived.evaluation.patience) == (5, 7)
    assert derived.evaluation.domains == ["law"]
    assert (derived.model.source, derived.model.dtype, derived.optimizer.lr) == ("small", "bf16", 1e-4)
    assert derived.batch.packs_per_step == 4 and not derived.checkpoint.export_at_end
    assert derived.run.dir == Path("out/law") and derived.run.seed == config.run.seed
    assert derived.data == config.data  # so the same caches are read


def test_an_adapter_is_trained_by_adamw_and_no_average_is_kept(quickstart):
    muon = "optimizer={kind: muon, muon_lr: 0.02, max_grad_norm: 0, lr: 1e-4, ema_decay: 0.9}"
    config = quickstart("reference={lr: 3e-4}", muon)
    alone, adapted = (
        single_domain_config(config, "law", Path("out"), 9, adapter).optimizer
        for adapter in (None, Adapter())
    )
    assert (alone.kind, alone.muon_lr, alone.lr, alone.ema_decay) == ("muon", 0.02, 3e-4, None)
    assert (adapted.kind, adapted.muon_lr, adapted.lr, adapted.ema_decay) == ("adamw", None, 3e-4, None)


def test_a_damaged_adapter_is_named(quickstart, tmp_path):
    muon = "optimizer={kind: muon, muon_lr: 0.02, max_grad_norm: 0}"  # of the whole model that was trained
    config, file = quickstart(muon), tmp_path / "adapter_config.json"
    sound = {"r": 2, "lora_alpha": 4, "target_modules": ["v", "q"], "base_model_name_or_path": "base"}
    file.write_text(json.dumps(sound))
    adapter = with_model(config, str(tmp_path)).model.adapter
    assert (adapter.rank, adapter.alpha, adapter.targets) == (2, 4.0, ["q", "v"])
    for text, said in (
        ('{"r": 2', "not JSON, or cut short"),
        ("[]", "holds a list; expected an object"),
        (json.dumps(sound | {"target_modules": ".*proj"}), r"target_modules is '\.\*proj'; was this adapter"),
        (json.dumps({**sound, "r": None}), "r is None; was this adapter written by peft"),
        ("{}", "r is None"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=f"adapter_config.json: {said}"):
            with_model(config, str(tmp_path))


def test_without_a_reference_section_the_run_itself_is_the_example(quickstart):
    config = quickstart("reference={}", "evaluation.max_samples_per_domain=3")
    derived = single_domain_config(config, "code", Path("out"), 100)
    assert derived.model == config.model and derived.optimizer == config.optimizer
    assert derived.batch == config.batch
    assert derived.evaluation.every_n_steps == 1  # a domain smaller than a step
    assert derived.evaluation.max_samples_per_domain == 3


PRETRAINED = "reference.model={source: large}"


@pytest.mark.parametrize(
    ("overrides", "parameters", "adapter", "rate"),
    [
        ([PRETRAINED], LARGE_MODEL, None, 1),
        ([PRETRAINED], LARGE_MODEL + 1, Adapter(), 10),
        ([PRETRAINED, "reference.lr=0.5"], LARGE_MODEL + 1, Adapter(), 0.5),
        ([PRETRAINED, "reference.adapter=off"], LARGE_MODEL + 1, None, 1),
        ([PRETRAINED, "reference.adapter={rank: 4}"], 9, Adapter(rank=4), 10),
        (["reference.model={source: x, weights: random}"], LARGE_MODEL + 1, None, 1),
        (["model.adapter={rank: 8}", "reference={}"], 9, Adapter(rank=8), 1),
        (["model.adapter={rank: 8}", "reference.adapter=off"], 9, None, 0.1),
    ],
)
def test_large_references_are_trained_as_adapters(quickstart, overrides, parameters, adapter, rate):
    """10 times the run's learning rate, where the run's own is for all of a model."""
    config = quickstart("optimizer.lr=1", *overrides)
    chosen = reference_adapter(config, parameters)
    derived = single_domain_config(config, "law", Path("out"), 100, chosen)
    assert chosen == derived.model.adapter == adapter and derived.optimizer.lr == pytest.approx(rate)


def test_another_model_keeps_the_tokenizer(quickstart):
    config = quickstart()
    derived = with_model(config, "elsewhere/model")
    assert derived.model.weights == "pretrained" and derived.model.tokenizer == config.model.source
    assert proxy_config(config) is config


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["evaluation.patience=3", "evaluation.every_n_steps=null"], "patience .* give every_n_steps"),
        (["evaluation.select=law", "evaluation.every_n_steps=null"], "select .* give every_n_steps"),
        (["evaluation.patience=3"], r"not the best ones; set evaluation.select \(overall, say\)"),
        (["evaluation.select=lore"], r"evaluation.select: unknown domains \['lore'\]; known: overall"),
        (["evaluation.select={law: 1, code: 0}"], "greater than 0"),
        (["evaluation.select=law", "evaluation.domains=[code]"], "select names law, which `domains` leaves"),
        (["evaluation.domains=[law, lore]"], r"evaluation.domains: unknown domains \['lore'\]"),
        (["weights.loss_unit=byte"], "needs the bytes per token"),
        (["reference.patiense=3"], "did you mean patience"),
    ],
)
def test_settings_that_cannot_be_meant(quickstart, overrides, text):
    with pytest.raises(ConfigError, match=text):
        quickstart(*overrides)
