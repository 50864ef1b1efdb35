"""FLOPs and MFU against numbers worked by hand; the peak table by the names that drivers report."""

from types import SimpleNamespace

import pytest

from versatune_ds.observability.throughput import (
    ModelShape,
    mfu,
    peak_memory_gib,
    peak_tflops,
    step_flops,
    step_flops_6n,
)

SHAPE = ModelShape(
    num_parameters=2000,
    num_parameters_nonembedding=1000,
    num_layers=2,
    attention_width=8,
    hidden_size=10,
    vocab_size=50,
)


def test_flops_by_hand():
    # two samples of 3 and 5 tokens, 4 of the 8 tokens supervised
    linear = 6 * 1000 * 8  # 48,000
    head = 6 * 10 * 50 * 4  # 12,000
    attention = 6 * 2 * 8 * (3 * 3 + 5 * 5)  # 3,264
    flops = step_flops(SHAPE, real_tokens=8, supervised_tokens=4, sum_squared_lengths=34)
    assert flops == linear + head + attention == 63_264


def test_flops_as_most_papers_count_by_hand():
    # 2 packs of 6 slots: (6 x 2000 + 12 x 2 x 8 x 6) x 12 = (12,000 + 1,152) x 12
    assert step_flops_6n(SHAPE, slot_tokens=12, pack_len=6) == 157_824


def test_one_full_sample_with_every_label_differs_by_the_embedding_and_half_of_attention():
    strict = step_flops(SHAPE, real_tokens=6, supervised_tokens=6, sum_squared_lengths=36)
    common = step_flops_6n(SHAPE, slot_tokens=6, pack_len=6)
    assert common - strict == 6 * 500 * 6 + 6 * 2 * 8 * 36  # the embedding has 10 x 50 parameters


def test_packing_more_samples_costs_less_attention_than_one_long_sample():
    packed = step_flops(SHAPE, real_tokens=8, supervised_tokens=4, sum_squared_lengths=4**2 + 4**2)
    single = step_flops(SHAPE, real_tokens=8, supervised_tokens=4, sum_squared_lengths=8**2)
    assert single - packed == 6 * 2 * 8 * 32


def test_mfu_by_hand():
    # 8e14 FLOPs in 2 s on 4 devices of 200 TFLOP/s: 8e14 / (2 x 4 x 2e14) = 0.5
    assert mfu(8e14, 2.0, 4, 200.0) == 0.5


def test_mfu_is_none_without_peak_or_time():
    assert mfu(8e14, 2.0, 4, None) is None
    assert mfu(8e14, 0.0, 4, 200.0) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 3060", None),
        ("cpu", None),
    ],
)
def test_peak_by_device_name(name, peak):
    assert peak_tflops(name) == peak


def test_shape_from_a_model_configuration():
    config = SimpleNamespace(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=3, vocab_size=100, head_dim=32
    )
    shape = ModelShape.from_config(config, 23456, 12345)
    assert (shape.attention_width, shape.num_layers) == (128, 3)
    assert (shape.num_parameters, shape.num_parameters_nonembedding) == (23456, 12345)
    config.head_dim = None  # Llama configurations without it: hidden size / heads
    assert ModelShape.from_config(config, 1, 1).attention_width == 64


def test_peak_memory_is_that_of_this_process():
    memory = peak_memory_gib()
    assert memory is not None and 0.005 < memory < 1000
