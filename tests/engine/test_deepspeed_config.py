"""Our settings become DeepSpeed's, and nothing is set in two places."""

from __future__ import annotations

import json

import pytest

from versatune_ds.config.load import validate_config
from versatune_ds.engine.backend.deepspeed_config import (
    OWNED_KEYS,
    deepspeed_config,
    known_keys,
    offloads_optimizer,
    zero_stage,
)
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


@pytest.mark.parametrize(
    "key", ["optimizer", "train_batch_size", "bf16", "bfloat16", "gradient_clipping", "checkpoint"]
)
def test_a_key_that_we_own_is_refused(key):
    with pytest.raises(ConfigError, match=f"'{key}' is set by"):
        deepspeed_config(config(deepspeed={key: 1}), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"zero_optimizaton": {"stage": 1}},
            "unknown key 'zero_optimizaton'; did you mean 'zero_optimization'",
        ),
        ({"foo": 3, "zero_optimization": {"stage": 1}}, "unknown key 'foo'"),
        ({"sequence_parallel_size": 2}, "unknown key 'sequence_parallel_size'"),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucketsize": 10}},
            "unknown key of zero_optimization 'reduce_bucketsize'; did you mean 'reduce_bucket_size'",
        ),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_params": 1}}, "'stage3_max_live_parameters'"),
        ({"zero_optimization": {"stage": 7}}, "DeepSpeedZeroConfig: stage: .*found 7"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "offload_optimizer.devise: Extra inputs",
        ),
        ({"zero_optimization": True}, "zero_optimization is True; it must be an object"),
        ({"comms_logger": {"enabeld": True}}, "enabeld"),
        ({"nebula": {"enabled": True}}, "Nebula checkpointing has been removed"),
        ({"communication_data_type": "int8"}, "Invalid communication_data_type"),
    ],
)
def test_what_deepspeed_does_not_take_is_a_mistake_of_the_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config(deepspeed=settings), 1)


def test_known_keys_are_those_that_deepspeed_reads():
    known = known_keys()
    sections = {"zero_optimization", "activation_checkpointing", "aio", "comms_logger", "flops_profiler"}
    scalars = {"wall_clock_breakdown", "communication_data_type", "prescale_gradients", "dump_state"}
    assert sections | scalars | (OWNED_KEYS.keys() - {"train_batch_size"}) <= set(known)
    assert "nebula" not in known and "device" not in known  # no longer taken; of an inner section


def test_sections_of_deepspeed_pass_through():
    given = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "comms_logger": {"enabled": False}}
    made = deepspeed_config(config(deepspeed=given | {"wall_clock_breakdown": False}), 1)
    assert {key: made[key] for key in given} == given


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
