"""What is refused before a model is built, and what is only said."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from versatune_ds.config.load import validate_config
from versatune_ds.config.model import Model
from versatune_ds.config.weights import Weights
from versatune_ds.data.plan.corpus import Corpus, PlannerSettings
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.reference import load_reference
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.foundations.errors import ConfigError, DataError, StateError

TABLE = DomainTable(["law", "code"])


def config(tmp_path="unused", **sections):
    raw = {
        "run": {"dir": str(tmp_path)},
        "model": {"source": "m"},
        "data": {"train": [{"path": "a", "domain": "law"}]},
        "domains": {"names": ["law", "code"]},
        "batch": {"packs_per_step": 1},
        "train": {"max_steps": 1},
    }
    return validate_config(raw | sections, "test")


def corpus(*sizes: int, length: int = 10) -> Corpus:
    lengths = [np.full(size, length, np.int32) for size in sizes]
    return Corpus(lengths=lengths, supervised=lengths, names=TABLE.names)


def controller(settings) -> WeightController:
    reference = load_reference(settings.weights.reference, TABLE)
    return WeightController(TABLE, settings.domains, settings.weights, reference)


REFERENCE = {"law": 1.0, "code": 1.0}
ONLY_LAW = {"names": ["law", "code"], "initial": {"law": 1, "code": 0}}


@pytest.mark.parametrize(
    ("domains", "weights", "reason"),
    [
        ({"names": ["law", "code"]}, {}, "weight is above 0"),
        (ONLY_LAW | {"min_weight": 0.1}, {}, "weight is above 0"),
        (ONLY_LAW, {"strategy": "doremi", "reference": REFERENCE}, "smoothing"),
        (ONLY_LAW, {"strategy": "expansion", "reference": REFERENCE, "target": "code"}, "weights.target"),
        (
            ONLY_LAW,
            {"strategy": "manual", "schedule": [{"step": 5, "weights": {"law": 0.5, "code": 0.5}}]},
            "weights.schedule",
        ),
    ],
)
def test_a_domain_without_data_may_not_get_a_weight(domains, weights, reason):
    settings = config(domains=domains, weights=weights)
    with pytest.raises(DataError, match=rf"domain code has no training data, and .*{reason}"):
        preflight.check_domains_have_data(settings, TABLE, corpus(3, 0), controller(settings))


@pytest.mark.parametrize("weights", [{}, {"strategy": "fostering", "reference": REFERENCE}])
def test_a_domain_without_data_and_weight_is_fine(weights):
    settings = config(domains=ONLY_LAW, weights=weights)
    preflight.check_domains_have_data(settings, TABLE, corpus(3, 0), controller(settings))


@pytest.mark.parametrize(("steps", "enough"), [(9, True), (10, True), (11, False)])
def test_max_epochs_must_last_for_all_steps(steps, enough):
    """95 samples of 10 tokens, one pass, 100 tokens a step: 9.5 steps; the tenth is part empty, and fine."""
    settings = config()
    planner = PlannerSettings(pack_len=100, packs_per_step=1, max_epochs=(1.0, 1.0))
    check = (corpus(50, 45), planner, controller(settings), steps)
    if enough:
        preflight.check_supply(*check)
    else:
        with pytest.raises(ConfigError, match=r"lasts for 10 steps .* and 11 are asked for"):
            preflight.check_supply(*check)


TOKENIZER = SimpleNamespace(get_vocab=lambda: {f"t{i}": i for i in range(100)})


def architecture(**more):
    return SimpleNamespace(**({"model_type": "x", "vocab_size": 100, "max_position_embeddings": 64} | more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"logit_scale": 0.06}, "change their logits"),
        ({"logits_scaling": 8.0}, "change their logits"),
        ({"final_logit_softcapping": 30.0}, "change their logits"),
        ({"n_routed_experts": 8}, "mixture of experts whose routers are not known here"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights"),
        ({"vocab_size": 99}, r"ids up to 99 \(t99\), and the model's embedding has 99 rows"),
    ],
)
def test_models_that_would_train_wrongly_are_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        preflight.check_architecture(architecture(**more), TOKENIZER, corpus(1, 1))


def test_samples_beyond_the_positions_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(preflight.log, "warning", lambda text, *args: told.append(text % args))
    neutral = architecture(logit_scale=1.0, logits_scaling=1.0, final_logit_softcapping=None)
    preflight.check_architecture(neutral, TOKENIZER, corpus(1, 1, length=64))
    assert not told
    preflight.check_architecture(neutral, TOKENIZER, corpus(1, 1, length=65))
    assert "65 tokens" in told[0] and "64 positions" in told[0]


def test_folders_that_hold_a_run_are_not_overwritten(tmp_path):
    preflight.check_folder(config(tmp_path / "new"))
    (tmp_path / "run.json").write_text('{"config_fingerprint": "0"}')
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    preflight.check_folder(config(tmp_path))  # a run that died before its first checkpoint
    with pytest.raises(StateError, match=r"run\.resume is never"):
        preflight.check_folder(config(tmp_path, run={"dir": str(tmp_path), "resume": "never"}))
    (tmp_path / "model").mkdir()
    with pytest.raises(StateError, match="finished run without checkpoints"):
        preflight.check_folder(config(tmp_path))


def test_missing_trackers_are_named_early(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    preflight.check_trackers(config())
    for package, extra, settings in (
        ("wandb", "tracking", {"wandb_project": "p"}),
        ("tensorboard", "tracking", {"tensorboard": True}),
        ("mlflow", "mlflow", {"mlflow_experiment": "p"}),
        ("swanlab", "swanlab", {"swanlab_project": "p"}),
        ("trackio", "trackio", {"trackio_project": "p"}),
    ):
        with pytest.raises(ConfigError, match=rf"{package} is asked for.*versatune-ds\[{extra}\]"):
            preflight.check_trackers(config(metrics=settings))


def test_settings_without_effect_are_listed():
    weights = {"target": "law", "schedule": [{"step": 1, "weights": {"law": 1, "code": 0}}], "eta": 2.0}
    settings = config(weights=weights, evaluation={"max_samples_per_domain": 3})
    assert [text.split(" ")[0] for text in preflight.ignored_settings(settings)] == [
        "weights.target",
        "weights.eta",
        "weights.schedule",
        "evaluation.max_samples_per_domain",
    ]
    assert preflight.ignored_settings(config()) == []


def test_how_often_weights_are_updated_by_default():
    lengths = (None, 7, 60, 5000)
    assert [Weights(strategy="raw_loss").interval(n) for n in lengths] == [100, 1, 3, 100]
    assert [Weights(guard={}).interval(n) for n in lengths] == [100, 1, 3, 100]
    assert [Weights().interval(n) for n in lengths] == [100] * 4
    assert Weights(strategy="raw_loss", every_n_steps=7).interval(60) == 7


@pytest.mark.parametrize(
    ("every", "steps", "said"),
    # a cosine falls to half its peak in the middle
    [(None, 60, None), (None, 5000, None), (10, 60, None), (12, 60, "4 updates in 60 steps, 2 of them"),
     (60, 60, "0 updates"), (None, 5, "4 updates in 5 steps, 2 of them")],
)  # fmt: skip
def test_weights_that_would_move_when_the_learning_rate_is_gone(every, steps, said):
    moving = {"strategy": "raw_loss", "every_n_steps": every}
    optimizer = {"schedule": "cosine", "min_lr_ratio": 0.0, "warmup_ratio": 0.0}
    late = preflight.late_weights(config(weights=moving, optimizer=optimizer), steps)
    assert (late is None) if said is None else (said in late)
    assert preflight.late_weights(config(weights=moving | {"strategy": "uniform"}), steps) is None


@pytest.mark.parametrize(
    ("version", "stage", "recompute"),
    [("2.11.0", 3, "all"), ("2.11.0", 2, "all"), ("2.11.0", 3, "off"), ("2.13.0+cpu", 3, 2)],
)
def test_compiled_layers_are_not_recomputed_under_zero_3_by_an_older_torch(
    monkeypatch, version, stage, recompute
):
    monkeypatch.setattr(preflight.metadata, "version", lambda name: version)
    settings = Model(source="x", compile="layers", activation_checkpointing=recompute)
    deepspeed = {"zero_optimization": {"stage": stage}}
    if (version, stage, recompute) == ("2.11.0", 3, "all"):
        with pytest.raises(ConfigError, match=r"needs torch 2\.13 or newer; set one of the two off"):
            preflight.check_compile(settings, deepspeed)
    else:
        preflight.check_compile(settings, deepspeed)
