"""Our settings become DeepSpeed's, and nothing is set in two places."""

from __future__ import annotations

import json

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from versatune_ds.config.load import validate_config
from versatune_ds.engine.backend.deepspeed_config import (
    OWNED_KEYS,
    PASSED_KEYS,
    STAGES,
    WITHOUT_EFFECT,
    ZERO_WITHOUT_EFFECT,
    deepspeed_config,
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
    "key",
    [
        "optimizer",
        "train_batch_size",
        "bf16",
        "bfloat16",
        "gradient_clipping",
        "checkpoint",
        "timers",
        "gradient_allreduce_op",
        "tensorboard",
    ],
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


def test_a_section_that_is_none_is_told_whatever_reads_it_first():
    settings = config(deepspeed={"zero_optimization": True}, optimizer={"states": "bf16_moments"})
    with pytest.raises(ConfigError, match="zero_optimization is True; it must be an object"):
        deepspeed_config(settings, 1)


class Noting(dict):
    """A dict that notes the keys that are looked up in it, be they there or not.

    DeepSpeedConfig first asks for keys that it no longer takes, then reads all others from a copy: with the
    copy the notes begin anew.
    """

    def __init__(self, values):
        super().__init__(values)
        self.asked = set()

    def __copy__(self):
        self.asked.clear()
        return self

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self  # DeepSpeed asks `key in settings.keys()`


def test_every_key_that_deepspeed_reads_has_one_place_in_the_tables():
    """A new DeepSpeed with a new key: decide what the key does here."""
    noting = Noting({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(noting)
    tables = (list(OWNED_KEYS), list(WITHOUT_EFFECT), list(PASSED_KEYS))
    assert sorted(noting.asked) == sorted(key for table in tables for key in table)


def test_the_keys_of_the_zero_section_exist():
    known = {name for key, f in DeepSpeedZeroConfig.model_fields.items() for name in (key, f.alias)}
    assert set(ZERO_WITHOUT_EFFECT) | set(STAGES) <= known


@pytest.mark.parametrize("key", sorted(WITHOUT_EFFECT))
def test_a_key_without_effect_is_refused_with_the_reason(key):
    with pytest.raises(ConfigError, match=f"{key} is of no use here: it .*Remove it"):
        deepspeed_config(config(deepspeed={key: {}}), 1)


ON_DISK = {"device": "nvme", "nvme_path": "/local"}


@pytest.mark.parametrize(
    ("stage", "zero", "others", "message"),
    [
        (2, {"offload_param": {"device": "cpu"}}, {}, "offload_param .* works at ZeRO stage 3; this is 2"),
        (1, {"stage3_max_live_parameters": 10}, {}, "stage3_max_live_parameters .* this is 1"),
        (2, {"zero_hpz_partition_size": 8}, {}, "zero_hpz_partition_size .* stage 3"),
        (3, {"round_robin_gradients": True}, {}, "round_robin_gradients .* stage 1 or 2; this is 3"),
        (0, {"offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer .* this is 0"),
        (2, {"cpu_offload": True}, {}, "set offload_optimizer: {device: cpu}"),
        (3, {"stage3_gather_16bit_weights_on_model_save": True}, {}, "the trainer's needs no key"),
        (3, {"zero_quantized_nontrainable_weights": True}, {}, "a call that the trainer does not make"),
        (3, {"offload_param": {"device": "nvme"}}, {}, "offload_param needs both device: nvme and nvme_path"),
        (3, {"offload_optimizer": {"device": "cpu", "nvme_path": "/x"}}, {}, "both device: nvme and"),
        (3, {"offload_param": {"device": "cpu", "max_in_cpu": 9}}, {}, "max_in_cpu is of no use .* nvme"),
        (2, {"offload_optimizer": ON_DISK}, {}, "nvme works at ZeRO stage 3; this is 2"),
        (3, {}, {"aio": {"queue_depth": 8}}, "aio is of no use here"),
        (3, {"offload_optimizer": ON_DISK}, {"aio": {"queue_dept": 8}}, "key of aio 'queue_dept'; did"),
        (3, {"reduce_scatter": False}, {"gradient_predivide_factor": 2.0}, "predivide_factor .* is 3"),
        (2, {}, {"prescale_gradients": True}, "prescale_gradients .* stage 0 or 1; this is 2"),
        (3, {}, {"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype .* model.dtype"),
    ],
)  # fmt: skip
def test_what_would_change_nothing_within_a_section_is_refused(stage, zero, others, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config(deepspeed={"zero_optimization": {"stage": stage, **zero}, **others}), 1)


@pytest.mark.parametrize(
    ("stage", "zero", "others"),
    [
        (3, {"offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 10}, {}),
        (2, {"round_robin_gradients": True, "offload_optimizer": {"device": "cpu"}}, {}),
        (3, {"offload_optimizer": {**ON_DISK, "buffer_count": 5}}, {"aio": {"queue_depth": 8}}),
        (3, {"zero_hpz_partition_size": 8, "zero_quantized_weights": True}, {}),
        (1, {}, {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}),
        (1, {}, {"prescale_gradients": True}),
    ],
)
def test_what_has_an_effect_passes(stage, zero, others):
    given = {"zero_optimization": {"stage": stage, **zero}, **others}
    made = deepspeed_config(config(deepspeed=given), 1)
    assert {key: made[key] for key in given} == given


@pytest.mark.parametrize(
    ("dtype", "sent_as", "message"),
    [
        ("bf16", None, "reads gradients as fp16 whatever they are"),
        ("fp32", None, "reads gradients as fp16 whatever they are"),
        ("bf16", "fp16", "loses gradients below 6e-8 when model.dtype is bf16"),
        ("fp16", "bf16", "reads gradients as fp16 whatever they are"),
        ("fp16", None, None),
        ("fp16", "fp16", None),
    ],
)
def test_gradients_are_quantised_in_fp16_only(dtype, sent_as, message):
    settings = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}
    if sent_as is not None:
        settings["communication_data_type"] = sent_as
    made = config(deepspeed=settings, model={"source": "m", "dtype": dtype})
    if message is None:
        assert deepspeed_config(made, 1)["zero_optimization"]["zero_quantized_gradients"]
    else:
        with pytest.raises(ConfigError, match=message):
            deepspeed_config(made, 1)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gradients_are_not_sent_as_fp16_without_a_loss_scale(dtype):
    settings = {"zero_optimization": {"stage": 2}, "communication_data_type": "fp16"}
    with pytest.raises(ConfigError, match="only fp16 runs scale the loss"):
        deepspeed_config(config(deepspeed=settings, model={"source": "m", "dtype": dtype}), 1)


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
