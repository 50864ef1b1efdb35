"""Our settings become DeepSpeed's, and nothing is set in two places."""

from __future__ import annotations

import json

import pytest

from versatune_ds.config.load import validate_config
from versatune_ds.engine.deepspeed_config import deepspeed_config, offloads_optimizer, zero_stage
from versatune_ds.foundations.errors import ConfigError


def config(**changes):
    raw = {
        "run": {"dir": "x"},
        "model": {"source": "m"},
        "data": {"train": [{"path": "a", "domain": "law"}]},
        "domains": {"names": ["law"]},
        "batch": {"packs_per_step": 12},
        "train": {"max_steps": 1},
    }
    return validate_config(raw | changes, "test")


def test_batch_precision_and_clipping_come_from_our_sections():
    made = deepspeed_config(config(optimizer={"max_grad_norm": 0.5}), world_size=4)
    assert made["gradient_accumulation_steps"] == 3 and made["train_micro_batch_size_per_gpu"] == 1
    assert made["bf16"] == {"enabled": True} and "fp16" not in made
    assert made["gradient_clipping"] == 0.5
    assert zero_stage(made) == 3 and not offloads_optimizer(made)


@pytest.mark.parametrize("key", ["optimizer", "train_batch_size", "bf16", "gradient_clipping", "checkpoint"])
def test_a_key_that_we_own_is_refused(key):
    with pytest.raises(ConfigError, match=f"'{key}' is set by"):
        deepspeed_config(config(deepspeed={key: 1}), 1)


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6, 12 ranks"):
        deepspeed_config(config(), 5)


def test_the_file_is_read_and_not_changed(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    made = deepspeed_config(config(deepspeed=str(path)), 1)
    assert offloads_optimizer(made)
    assert "bf16" not in json.loads(path.read_text())


@pytest.mark.parametrize(("text", "expected"), [("{", "not valid JSON"), ("[]", "JSON object")])
def test_a_broken_file_is_named(tmp_path, text, expected):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        deepspeed_config(config(deepspeed=str(path)), 1)
    with pytest.raises(ConfigError, match="no file"):
        deepspeed_config(config(deepspeed=str(tmp_path / "none.json")), 1)
