"""Reference losses on their way into a run, and models on their way into an evaluation; no model is built."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from prepared import pairs, qwen_like_tokenizer, write_jsonl

from versatune_ds.apps.evaluate.targets import resolve_target
from versatune_ds.apps.reference import best_evaluation, reference_by_training
from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config
from versatune_ds.data.cache.prepare import open_caches
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.tokenizer import load_tokenizer
from versatune_ds.domain.table import DomainTable
from versatune_ds.engine.fingerprints import data_fingerprint, model_fingerprint
from versatune_ds.engine.references import open_reference
from versatune_ds.foundations.errors import ConfigError, DataError, DivergenceError, StateError

TABLE = DomainTable(["law", "code"])


def tiny_model(folder: Path, tokenizer, weights: bytes | None = None) -> Path:
    """config.json and tokenizer of a tiny Llama; `weights` stand for its weight file."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two domains prepared for a run's model and for a proxy with another tokenizer."""
    from versatune_ds.apps.sample import train_tokenizer

    folder = tmp_path_factory.mktemp("reference")
    tiny_model(folder / "large", qwen_like_tokenizer())
    rows = pairs(40)
    vocab_size = train_tokenizer(
        [f"{row['prompt']} {row['completion']}" for row in rows], folder / "small", 300
    )
    from transformers import AutoTokenizer

    proxy_tokenizer = AutoTokenizer.from_pretrained(folder / "small")
    assert len(proxy_tokenizer) == vocab_size
    tiny_model(folder / "small", proxy_tokenizer)
    sources = {}
    for split, count in (("train", 40), ("eval", 12)):
        sources[split] = [
            {"path": str(write_jsonl(folder / f"{split}_{name}.jsonl", pairs(count, start))), "domain": name}
            for name, start in (("law", 0), ("code", 1000))
        ]
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "run": {"dir": str(folder / "run")},
                "model": {"source": str(folder / "large"), "weights": "random", "dtype": "fp32"},
                "data": {**sources, "chat_template": "chatml", "cache_dir": str(folder / "cache")},
                "domains": {"names": ["law", "code"]},
                "batch": {"pack_len": 256, "packs_per_step": 1},
                "train": {"max_steps": 1},
                "reference": {"model": {"source": str(folder / "small"), "weights": "random"}},
            }
        )
    )
    assert main(["prepare", "--config", str(folder / "config.yaml")]) == 0
    return folder


def opened(folder: Path, *overrides: str):
    """`open_reference` as a run calls it."""
    config = load_config(folder / "config.yaml", overrides)
    tokenizer = load_tokenizer(config)
    print_ = ChatEncoder.build(tokenizer, "chatml").fingerprint
    return open_reference(config, TABLE, tokenizer, print_, open_caches(config))


def reference_file(folder: Path, target: Path, **changes) -> str:
    """A reference.json as the proxy would have made it; returned as an override."""
    from versatune_ds.config.derive import proxy_config
    from versatune_ds.data.cache.text_bytes import bytes_per_token

    config = proxy_config(load_config(folder / "config.yaml"))
    tokenizer, caches = load_tokenizer(config), open_caches(config)["eval"]
    content = {
        "format": "versatune_ds.reference",
        "version": 1,
        "losses": {"law": 2.0, "code": 3.0},
        "bytes_per_token": TABLE.by_name(bytes_per_token(caches, TABLE.names, tokenizer)),
        "fingerprints": {
            "model": model_fingerprint(config.model),
            "tokenizer": ChatEncoder.build(tokenizer, "chatml").fingerprint,
            "data": data_fingerprint(caches, TABLE.names),
        },
    }
    content["fingerprints"] |= changes
    target.write_text(json.dumps(content))
    return f"weights.reference={target}"


def test_prepare_serves_the_proxy_too(folder, capsys):
    assert main(["prepare", "--config", str(folder / "config.yaml")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    from versatune_ds.config.derive import proxy_config

    config = load_config(folder / "config.yaml")
    ours, theirs = open_caches(config)["eval"][0], open_caches(proxy_config(config))["eval"][0]
    assert ours.num_tokens != theirs.num_tokens


def test_another_tokenizer_is_refused_unless_bytes_are_compared(folder, tmp_path):
    override = reference_file(folder, tmp_path / "reference.json")
    with pytest.raises(ConfigError, match=r"another tokenizer.*loss_unit: byte"):
        opened(folder, override)
    reference = opened(folder, override, "weights.loss_unit=byte")
    from versatune_ds.config.derive import proxy_config
    from versatune_ds.data.cache.text_bytes import bytes_per_token

    config = load_config(folder / "config.yaml")
    sizes = [
        bytes_per_token(open_caches(c)[split], TABLE.names, load_tokenizer(c))
        for c, split in ((config, "train"), (proxy_config(config), "eval"))
    ]
    np.testing.assert_allclose(reference.losses, np.array([2.0, 3.0]) * sizes[0] / sizes[1], rtol=1e-12)
    assert abs(reference.losses[0] - 2.0) > 0.03
    probed = opened(folder, override, "weights.loss_unit=byte", "weights.loss_source=probe")
    assert not np.array_equal(probed.losses, reference.losses)  # bytes of what the losses are measured on


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model": "another"}, r"another model.*reference\.model"),
        ({"data": "another"}, "another data.*data.eval"),
    ],
)
def test_another_model_or_other_data_are_refused(folder, tmp_path, changes, text):
    override = reference_file(folder, tmp_path / "reference.json", **changes)
    with pytest.raises(ConfigError, match=text):
        opened(folder, override, "weights.loss_unit=byte")


def test_the_model_counts_only_if_the_settings_name_one(folder, tmp_path):
    override = reference_file(folder, tmp_path / "reference.json", model="another")
    assert opened(folder, override, "weights.loss_unit=byte", "reference={}") is not None


def test_a_run_does_not_need_the_proxy_itself(folder, tmp_path):
    override = reference_file(folder, tmp_path / "reference.json")
    gone = f"reference.model={{source: {tmp_path / 'gone'}}}"
    assert opened(folder, override, "weights.loss_unit=byte", gone) is not None
    assert opened(folder, gone) is None


def test_given_numbers_become_a_file_that_a_run_takes(folder, tmp_path, capsys):
    config = ["--config", str(folder / "config.yaml"), "--out", str(tmp_path)]
    assert main(["reference", *config, "--losses", "law=1.9, code=0.01"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"use it: weights.reference={tmp_path / 'reference.json'}"
    assert "reference_near_zero: code" in err
    reference = opened(folder, f"weights.reference={tmp_path / 'reference.json'}", "reference={}")
    np.testing.assert_array_equal(reference.losses, [1.9, 0.01])
    assert reference.method == "given"


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ("law=1.9", "no value for code"),
        ("law=1.9,code", "'code' is not NAME=NATS"),
        ("law=1.9,code=x", "'code=x' is not NAME=NATS"),
        ("law=1.9,code=1,law=2", "law stands twice"),
        ("law=1.9,code=1,tort=2", "unknown domain 'tort'"),
        ("law=1.9,code=-1", "code is -1.0; it must be > 0"),
        ("law=1.9,code=nan", "code is nan; it must be > 0"),
    ],
)
def test_given_numbers_are_checked(folder, tmp_path, capsys, losses, text):
    config = ["--config", str(folder / "config.yaml"), "--out", str(tmp_path / "out")]
    assert main(["reference", *config, "--losses", losses]) in (2, 3)
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "reference.json").exists()


def test_a_domain_without_held_out_data_is_named(folder, tmp_path):
    law = folder / "eval_law.jsonl"
    config = load_config(
        folder / "config.yaml", [f"data.eval=[{{path: {law}, domain: law}}]", "reference={}"]
    )
    with pytest.raises(DataError, match="no held-out data for code"):
        reference_by_training(config, tmp_path, None)


def test_a_foreign_folder_is_not_touched(folder, tmp_path):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "thesis.txt").write_text("mine")
    config = load_config(folder / "config.yaml", ["reference={}"])
    with pytest.raises(StateError, match="not of a reference measurement"):
        reference_by_training(config, tmp_path, None)
    assert (tmp_path / "law" / "thesis.txt").read_text() == "mine"


def test_evaluations_without_a_number_are_no_reference(tmp_path):
    def line(step, loss):
        return {
            "step": step, "domain_loss": {"law": loss}, "domain_stderr": {"law": 0.1},
            "domain_samples": {"law": 2}, "domain_supervised_tokens": {"law": 9},
        }  # fmt: skip

    losses = [None, 3.0, 2.5, 2.7, None]
    write_jsonl(tmp_path / "eval.jsonl", [line(step, loss) for step, loss in enumerate(losses)])
    best = best_evaluation(tmp_path, "law")
    assert (best["loss"], best["step"], best["loss_before"], best["last_step"]) == (2.5, 2, 3.0, 4)
    assert not best["still_falling"]
    write_jsonl(tmp_path / "eval.jsonl", [line(0, None)])
    with pytest.raises(DivergenceError, match="finite held-out loss"):
        best_evaluation(tmp_path, "law")


def test_fingerprints_tell_models_and_data_apart(folder, tmp_path):
    from versatune_ds.config.model import Model

    tokenizer = qwen_like_tokenizer()
    one = tiny_model(tmp_path / "one", tokenizer, b"weights" * 1000)
    same = tiny_model(tmp_path / "moved", tokenizer, b"weights" * 1000)
    other = tiny_model(tmp_path / "other", tokenizer, b"weights" * 999 + b"weightS")
    prints = [model_fingerprint(Model(source=str(path))) for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    drawn = [model_fingerprint(Model(source=str(path), weights="random")) for path in (one, other)]
    assert drawn[0] == drawn[1] != prints[0]
    caches = open_caches(load_config(folder / "config.yaml"))["eval"]
    assert data_fingerprint(caches, TABLE.names) != data_fingerprint(caches[::-1], TABLE.names)
    assert data_fingerprint([None, None], TABLE.names) is None


def test_models_are_told_by_what_lies_in_a_folder(folder, tmp_path, monkeypatch):
    config = load_config(folder / "config.yaml")
    run = tmp_path / "run"
    model = tiny_model(run / "model", qwen_like_tokenizer(), b"w")
    (run / "resolved.yaml").write_text("x: 1")
    assert resolve_target(str(run), config) == (str(model), run)
    assert resolve_target(str(model), config) == (str(model), run)
    lone = tiny_model(tmp_path / "Qwen", qwen_like_tokenizer(), b"w")
    assert resolve_target(str(lone), config) == (str(lone), folder / "run" / "evaluations" / "Qwen")
    assert resolve_target("Qwen/Qwen2.5", config).out.parent == folder / "run" / "evaluations"
    for name, error, text in (
        (str(folder / "large"), ConfigError, "no weights"),
        (str(tmp_path), ConfigError, "neither a Hugging Face folder"),
        (str(tmp_path / "none"), ConfigError, "is not a folder"),
    ):
        with pytest.raises(error, match=text):
            resolve_target(name, config)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "resolved.yaml").write_text("x: 1")
    with pytest.raises(StateError, match="neither model/ nor a checkpoint"):
        resolve_target(str(tmp_path / "young"), config)


def test_another_vocabulary_is_refused(folder, tmp_path):
    from versatune_ds.apps.evaluate.held_out import measure

    config = load_config(folder / "config.yaml")
    other = load_tokenizer(load_config(folder / "config.yaml", [f"model.source={folder / 'small'}"]))
    foreign = tiny_model(tmp_path / "foreign", other, b"w")
    with pytest.raises(ConfigError, match=r"another vocabulary.*model\.tokenizer="):
        measure(config, str(foreign), None)
    # an embedding that is too small for the tokenizer
    small = tiny_model(tmp_path / "tight", qwen_like_tokenizer(), b"w")
    raw = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**raw, "vocab_size": 100}))
    with pytest.raises(ConfigError, match="embedding has 100 rows"):
        measure(config, str(small), None)
