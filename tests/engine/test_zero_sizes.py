"""Buffers of DeepSpeed by the size of the model: a layer, within bounds; what the user says stays."""

from __future__ import annotations

import pytest

from versatune_ds.apps.bench.shapes import _llama, find_shape
from versatune_ds.config.model import Adapter
from versatune_ds.engine.backend.zero_sizes import LARGEST, SMALLEST, describe_sizes, with_sizes
from versatune_ds.engine.model.families import planned_shape

MIDDLE = planned_shape(_llama(1024, 4096, 12, 16, 16, 32000), "test")


@pytest.mark.parametrize(
    ("shape", "bucket"),
    [(find_shape("tiny"), SMALLEST), (MIDDLE, 16_779_264), (find_shape("qwen2.5-32b"), LARGEST)],
)
def test_a_bucket_is_a_layer_within_bounds(shape, bucket):
    made = with_sizes({"stage": 3}, shape, None)
    assert made["reduce_bucket_size"] == made["stage3_prefetch_bucket_size"] == bucket
    assert SMALLEST <= bucket <= LARGEST and made["overlap_comm"] is True
    text = describe_sizes(made)
    assert "communication on" in text and f"gradients {bucket / 1e6:.4g} M" in text and "group 200 M" in text


@pytest.mark.parametrize(
    ("adapter", "bucket"),
    [
        (Adapter(rank=16), SMALLEST),
        (Adapter(rank=64), 64 * 131_072),
        (Adapter(rank=1024, targets=["q_proj", "not_known"]), 1024 * 10_240),
    ],
)
def test_beside_a_frozen_model_only_the_adapter_has_gradients(adapter, bucket):
    """Qwen2.5-32B: H 5120, heads 5120 and 1024, MLP 27648; a layer's inputs and outputs are 131,072 wide."""
    made = with_sizes({"stage": 3}, find_shape("qwen2.5-32b"), adapter)
    assert made["reduce_bucket_size"] == bucket and made["stage3_prefetch_bucket_size"] == LARGEST


@pytest.mark.parametrize("stage", [1, 2])
def test_lower_stages_get_no_key_that_is_refused_there(stage):
    assert set(with_sizes({"stage": stage}, find_shape("tiny"), None)) == {
        "stage",
        "overlap_comm",
        "reduce_bucket_size",
    }


def test_what_the_file_gives_stays_and_stage_0_gets_nothing():
    given = {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 7, "sub_group_size": 8}
    made = with_sizes(given, find_shape("tiny"), None)
    assert given.items() <= made.items() and "communication off" in describe_sizes(made)
    assert with_sizes({"stage": 0}, find_shape("tiny"), None) == {"stage": 0}
