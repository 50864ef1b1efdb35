"""Families of models: counts against built models, logits against transformers' forward, FLOPs by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from versatune_ds.apps.bench.shapes import _llama, _qwen2, find_shape
from versatune_ds.config.load import validate_config
from versatune_ds.config.schema import Model
from versatune_ds.engine.backend.deepspeed_backend import build_for_evaluation
from versatune_ds.engine.model import packed_lm
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.families import FAMILIES, PLANNED, built_shape, logit_rule, planned_shape
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.observability.throughput import mfu, peak_tflops

LLAMA = _llama(64, 160, 3, 4, 2, 512)
QWEN2 = _qwen2(64, 160, 3, 4, 2, 512)
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32}
CONFIGS = {
    "llama": LLAMA,
    "llama with biases": {**LLAMA, "attention_bias": True},
    "llama with biases everywhere": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama of one layer": {**LLAMA, "num_hidden_layers": 1},
    "qwen2": QWEN2,
    "qwen2 of one layer": {**QWEN2, "num_hidden_layers": 1},
    "qwen2 tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen3": QWEN3,
    "qwen3 without head_dim": {**LLAMA, "model_type": "qwen3"},
    "qwen3 with biases": {**QWEN3, "attention_bias": True},
}


def test_every_planned_family_is_compared_with_a_built_model():
    assert {config["model_type"] for config in CONFIGS.values()} == set(PLANNED)


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_those_of_the_built_model(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[kind]))
    shape = planned_shape(CONFIGS[kind], kind)
    total = sum(p.numel() for p in model.parameters())
    assert shape.parameters == total
    vectors = [p.numel() for p in model.parameters() if p.dim() == 1]
    assert sorted((*shape.vectors * shape.layers, shape.hidden)) == sorted(vectors)
    assert shape.layer_parameters == sum(p.numel() for p in model.model.layers[0].parameters())
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.lm_head)}
    assert shape.nonembedding_parameters == total - sum(embeddings.values())
    built = built_shape(model.config, shape.parameters, shape.nonembedding_parameters)
    assert built.step_flops_6n(slot_tokens=3, pack_len=2) == shape.step_flops_6n(slot_tokens=3, pack_len=2)


# --- logits -------------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
ALTERED = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_implementation": "eager"},  # its scores are capped too
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
}


def tiny(kind: str, attn_implementation: str = "sdpa", **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY, **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


def two_samples() -> dict:
    """A pack of 5 and 7 tokens; the last of each has no label."""
    tokens = torch.arange(3, 15)
    labels = tokens.roll(-1)
    labels[[4, 11]] = -100
    return {
        "input_ids": tokens,
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)]),
        "labels": labels,
        "sample_ids": torch.tensor([0] * 5 + [1] * 7),
        "cu_seqlens": torch.tensor([0, 5, 12], dtype=torch.int32),
        "max_seqlen": 7,
        "num_samples": 2,
        "num_valid": 10,
        "normalizer": 10.0,
    }


def test_every_family_that_alters_its_logits_is_compared_with_transformers():
    rules = {name for name, row in FAMILIES.items() if row.softcap or row.logit_factor or row.logit_divisor}
    assert set(ALTERED) == rules


@pytest.mark.parametrize("kind", ALTERED)
def test_altered_logits_have_the_loss_and_gradients_of_transformers(kind):
    lm, pack = tiny(kind, **ALTERED[kind]), two_samples()
    ids, labels = (pack[name].split([5, 7]) for name in ("input_ids", "labels"))
    logits = [lm(input_ids=part[None]).logits[0] for part in ids]
    losses = [
        torch.nn.functional.cross_entropy(z.float(), target, reduction="sum")
        for z, target in zip(logits, labels, strict=True)
    ]
    (sum(losses) / 10).backward()
    expected = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    model = PackedCausalLM(lm, "chunked")
    out = model(**pack)
    assert out.sample_loss.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    out.loss.backward()
    for name, parameter in model.lm.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_a_field_that_the_family_does_not_read_is_refused():
    with pytest.raises(ConfigError, match=r"hyperclovax models change their logits \(logits_scaling: 4.0\)"):
        logit_rule(SimpleNamespace(model_type="hyperclovax", logits_scaling=4.0))
    with pytest.raises(ConfigError, match=r"granite models change their logits \(logit_scale"):
        logit_rule(SimpleNamespace(model_type="granite", logits_scaling=4.0, logit_scale=2.0))
    assert logit_rule(SimpleNamespace(model_type="qwen2", logits_scaling=1.0)) == (1.0, 0.0)


def test_token_weights_reach_the_loss_and_no_sum():
    model, pack = PackedCausalLM(tiny("llama"), "chunked"), two_samples()
    plain = model(**pack)
    weight = torch.linspace(0, 2, 12)
    weighted = model(**pack, token_weight=weight)
    assert float(weighted.loss) == pytest.approx(float((weight * plain.token_loss).sum()) / 10, rel=1e-5)
    assert torch.equal(weighted.sample_loss, plain.sample_loss)
    assert float(plain.loss) == pytest.approx(float(plain.sample_loss.sum()) / 10, rel=1e-5)


def test_16_bit_logits_reach_the_triton_loss_and_are_refused_elsewhere(tmp_path, monkeypatch):
    tiny("llama").save_pretrained(tmp_path)
    section = {"source": str(tmp_path), "dtype": "bf16", "logits_dtype": "compute"}
    asked = []
    monkeypatch.setattr(packed_lm, "linear_cross_entropy", lambda *_, **options: asked.append(options))
    packed_lm.build_model(Model(**section), AttentionChoice("sdpa", "test"), seed=0)(**two_samples())
    assert asked[0]["logits_dtype"] == "compute"
    monkeypatch.undo()
    raw = {
        "run": {"dir": str(tmp_path / "run")},
        "model": section,
        "data": {"train": [{"path": "x.jsonl", "domain": "law"}]},
        "domains": {"names": ["law"]},
        "batch": {"pack_len": 16, "packs_per_step": 1},
        "train": {"max_steps": 1},
    }
    with pytest.raises(ConfigError, match=r"logits_dtype compute: only the triton loss .* takes chunked"):
        build_for_evaluation(validate_config(raw, "test"), torch.device("cpu"))


# --- FLOPs --------------------------------------------------------------------------------------------------

SHAPE = ModelShape(
    family="none", hidden=10, mlp=20, layers=2, heads=2, kv_heads=2, head_size=4, vocab=50, tied=False,
    vectors=(), head_norms=False, counted=(2000, 1000),
)  # fmt: skip


def test_flops_by_hand():
    # two samples of 3 and 5 tokens, 4 of the 8 tokens supervised
    linear = 6 * 1000 * 8  # 48,000
    head = 6 * 10 * 50 * 4  # 12,000
    attention = 6 * 2 * 8 * (3 * 3 + 5 * 5)  # 3,264
    flops = SHAPE.step_flops(real_tokens=8, supervised_tokens=4, sum_squared_lengths=34)
    assert flops == linear + head + attention == 63_264


def test_flops_as_most_papers_count_by_hand():
    # 2 packs of 6 slots: (6 x 2000 + 12 x 2 x 8 x 6) x 12 = (12,000 + 1,152) x 12
    assert SHAPE.step_flops_6n(slot_tokens=12, pack_len=6) == 157_824


def test_one_full_sample_with_every_label_differs_by_the_embedding_and_half_of_attention():
    strict = SHAPE.step_flops(real_tokens=6, supervised_tokens=6, sum_squared_lengths=36)
    common = SHAPE.step_flops_6n(slot_tokens=6, pack_len=6)
    assert common - strict == 6 * 500 * 6 + 6 * 2 * 8 * 36  # the embedding has 10 x 50 parameters


def test_packing_more_samples_costs_less_attention_than_one_long_sample():
    packed = SHAPE.step_flops(real_tokens=8, supervised_tokens=4, sum_squared_lengths=4**2 + 4**2)
    single = SHAPE.step_flops(real_tokens=8, supervised_tokens=4, sum_squared_lengths=8**2)
    assert single - packed == 6 * 2 * 8 * 32


def test_shape_from_a_model_configuration():
    config = SimpleNamespace(
        model_type="unheard_of",
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=100,
        head_dim=32,
    )
    shape = built_shape(config, 23456, 12345)
    assert (shape.query_width, shape.layers) == (128, 3)
    assert (shape.parameters, shape.nonembedding_parameters) == (23456, 12345)
    config.head_dim = None  # Llama configurations without it: hidden size / heads
    assert built_shape(config, 1, 1).query_width == 64


def test_a_published_mfu_in_both_conventions():
    """KempnerForge: 8B on one H200, samples of 4,096 tokens, 10,471 tokens/s, reported as 57.8 %."""
    shape, tokens, length = find_shape("llama-3-8b"), 10_471, 4096
    peak = peak_tflops("NVIDIA H200")
    common = shape.step_flops_6n(slot_tokens=tokens, pack_len=length)
    strict = shape.step_flops(
        real_tokens=tokens, supervised_tokens=tokens, sum_squared_lengths=tokens * length
    )
    assert mfu(common, 1.0, 1, peak) == pytest.approx(0.578, abs=5e-4)
    assert mfu(strict, 1.0, 1, peak) == pytest.approx(0.511, abs=5e-4)
