"""Families of models: counts against built models, logits against transformers' forward, FLOPs by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from export_memory import NoCompanions
from safetensors.torch import load_file
from tiny_families import FAMILY_CONFIGS, VOCAB_SIZE, attend_by_sample, family_config, family_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from versatune_ds.apps.bench.shapes import _llama, find_shape
from versatune_ds.apps.plan.memory import trained_parameters
from versatune_ds.config.load import validate_config
from versatune_ds.config.model import Adapter, Model
from versatune_ds.engine.backend.deepspeed_backend import build_for_evaluation
from versatune_ds.engine.backend.parameters import live_shape, parameter_size
from versatune_ds.engine.checkpointing.hf_export import export_model
from versatune_ds.engine.model import packed_lm
from versatune_ds.engine.model.adapters import add_adapter
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.families import (
    FAMILIES,
    PLANNED,
    REQUIRED,
    built_shape,
    logit_rule,
    planned_shape,
)
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.engine.model.router import Routers, experts_of
from versatune_ds.engine.model.shape import ModelShape
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.observability.throughput import mfu, peak_tflops


def test_every_family_is_compared_with_a_built_model():
    assert {kind.split(",")[0] for kind in FAMILY_CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("kind", [kind for kind in FAMILY_CONFIGS if kind.split(",")[0] in PLANNED])
def test_parameters_are_those_of_the_built_model(kind):
    config = family_config(kind)
    model = family_model(kind)
    shape = planned_shape(config, kind)
    total = sum(p.numel() for p in model.parameters())
    assert shape.parameters == total
    vectors = [p.numel() for p in model.parameters() if p.dim() == 1]
    assert sorted((*shape.vectors * shape.layers, shape.hidden)) == sorted(vectors)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert shape.layer_parameters == max(layers)
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.lm_head)}
    assert shape.nonembedding_parameters == total - sum(embeddings.values())
    built = built_shape(model.config, (shape.parameters, shape.nonembedding_parameters))
    assert built.step_flops_6n(slot_tokens=3, pack_len=2) == shape.step_flops_6n(slot_tokens=3, pack_len=2)


def test_what_config_json_leaves_out_is_what_transformers_takes():
    short = {key: _llama(64, 160, 3, 4, 2, 512)[key] for key in REQUIRED}
    assert planned_shape({**short, "model_type": "qwen3"}, "test").head_size == 128
    assert planned_shape({**short, "model_type": "gemma3_text"}, "test").tied
    assert planned_shape({**short, "model_type": "mistral"}, "test").kv_heads == 8
    wrapped = {"model_type": "gemma3", "text_config": {**short, "model_type": "gemma3_text"}}
    assert planned_shape(wrapped, "test").family == "gemma3_text"
    with pytest.raises(ConfigError, match=r"(?s)test: .*num_hidden_layers"):
        planned_shape({**short, "model_type": "qwen3", "layer_types": ["full_attention"]}, "test")


# --- losses -------------------------------------------------------------------------------------------------

LENGTHS = (13, 9, 1, 7)


def pack_of(lengths: tuple[int, ...]) -> dict:
    """A pack of random tokens; the last of each sample has no label."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB_SIZE, (sum(lengths),), generator=generator)
    sizes = torch.tensor(lengths)
    labels = tokens.roll(-1)
    labels[sizes.cumsum(0) - 1] = -100
    return {
        "input_ids": tokens,
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "labels": labels,
        "sample_ids": torch.arange(len(lengths)).repeat_interleave(sizes),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int(),
        "max_seqlen": max(lengths),
        "num_samples": len(lengths),
        "num_valid": sum(lengths) - len(lengths),
        "normalizer": 10.0,
    }


@pytest.mark.parametrize("kind", FAMILY_CONFIGS)
def test_a_pack_has_the_losses_and_gradients_of_transformers_and_is_exported(kind, tmp_path):
    """Each sample alone in a model that has seen no other; then the export, loaded by transformers."""
    lm = family_model(kind)
    capped = lm.config._attn_implementation
    routers = Routers(lm.config, None) if experts_of(lm.config) else None
    pack, model = pack_of(LENGTHS), PackedCausalLM(attend_by_sample(lm), "chunked", routers=routers)
    losses, expected = [], {}
    for ids in pack["input_ids"].split(LENGTHS):
        lm = family_model(kind)
        if len(ids) == 1:  # their loss of one token is 0 / 0
            losses.append(0.0)
            continue
        loss = lm(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)
        losses.append(loss.item())
        (loss / 10).backward()
        for name, parameter in lm.named_parameters():
            expected[name] = expected.get(name, 0) + parameter.grad
    if routers is not None:
        lm = family_model(kind)
        each = [
            lm(input_ids=ids[None], output_router_logits=True).router_logits
            for ids in pack["input_ids"].split(LENGTHS)
        ]
        together = tuple(torch.cat(layer) for layer in zip(*each, strict=True))
        (0.5 / 3 * load_balancing_loss_func(together, 8, 2)).backward()
        for name, parameter in lm.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected[name] + parameter.grad
    out = model(**pack, passes=3)
    assert out.sample_loss.tolist() == pytest.approx(losses, rel=1e-5)
    out.loss.backward()
    for name, parameter in model.lm.named_parameters():
        error = (parameter.grad - expected[name]).abs().max()
        assert error <= 1e-4 * expected[name].abs().max() + 1e-6, name

    backend = SimpleNamespace(model=model, parameters=model.named_parameters)
    export_model(backend, NoCompanions(), tmp_path / "model", 1 << 30)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation=capped, output_loading_info=True
    )
    assert not any(info.values())
    ids = pack["input_ids"][None, :13]
    theirs = family_model(kind)
    if routers is None:
        assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    else:
        torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits)
        theirs.save_pretrained(tmp_path / "theirs")
    saved = [load_file(folder / "model.safetensors") for folder in tmp_path.iterdir()]
    assert all(names.keys() == saved[0].keys() for names in saved)


@pytest.mark.parametrize("kind", ["llama, dynamic rope", "phi3, longrope"])
def test_positions_that_depend_on_length_do_not_depend_on_what_came_before(kind):
    model = PackedCausalLM(family_model(kind), "chunked")
    first = model(**pack_of((5, 20))).sample_loss
    model(**pack_of((25,)))
    assert torch.equal(model(**pack_of((5, 20))).sample_loss, first)


def test_a_field_that_the_family_does_not_read_is_refused():
    with pytest.raises(ConfigError, match=r"hyperclovax models change their logits \(logits_scaling: 4.0\)"):
        logit_rule(SimpleNamespace(model_type="hyperclovax", logits_scaling=4.0))
    with pytest.raises(ConfigError, match=r"granite models change their logits \(logit_scale"):
        logit_rule(SimpleNamespace(model_type="granite", logits_scaling=4.0, logit_scale=2.0))
    assert logit_rule(SimpleNamespace(model_type="qwen2", logits_scaling=1.0)) == (1.0, 0.0)


def test_token_weights_reach_the_loss_and_no_sum():
    model, pack = PackedCausalLM(family_model("llama"), "chunked"), pack_of((5, 7))
    plain = model(**pack)
    weight = torch.linspace(0, 2, 12)
    weighted = model(**pack, token_weight=weight)
    assert weighted.loss.item() == pytest.approx(float((weight * plain.token_loss).sum()) / 10, rel=1e-5)
    assert torch.equal(weighted.sample_loss, plain.sample_loss)
    assert plain.loss.item() == pytest.approx(float(plain.sample_loss.sum()) / 10, rel=1e-5)


def test_16_bit_logits_reach_the_triton_loss_and_are_refused_elsewhere(tmp_path, monkeypatch):
    family_model("llama").save_pretrained(tmp_path)
    section = {"source": str(tmp_path), "dtype": "bf16", "logits_dtype": "compute"}
    asked = []
    monkeypatch.setattr(packed_lm, "linear_cross_entropy", lambda *_, **options: asked.append(options))
    packed_lm.build_model(Model(**section), AttentionChoice("sdpa", "test"), seed=0)(**pack_of((5, 7)))
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
    vectors=(), counted=(2000, 1000),
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


def test_a_frozen_model_has_no_product_for_the_gradients_of_its_weights():
    """Forward and the input's gradient of 1,000 weights; all three of the adapter's 70. Layers run twice cost
    another forward; attention has no weights and costs what it did."""
    frozen = dataclasses.replace(SHAPE, trained=70)
    counts = {"real_tokens": 8, "supervised_tokens": 4, "sum_squared_lengths": 34}
    expected = 4 * 1000 * 8 + 6 * 70 * 8 + 4 * 10 * 50 * 4 + 3_264
    assert frozen.step_flops(**counts) == expected
    assert frozen.step_flops(**counts, recomputed=0.5) == expected + 1070 * 8 + 3_264 / 6
    assert frozen.step_flops_6n(slot_tokens=12, pack_len=6) == (4 * 2000 + 6 * 70 + 12 * 2 * 8 * 6) * 12


@pytest.mark.parametrize("name", ["qwen2", "phi3", "qwen3_moe, some layers dense"])
def test_an_adapters_parameters_by_formula_are_those_of_peft(name):
    """All linear layers but the head; of a mixture the attention's. So does a run count its model."""
    adapter = Adapter(rank=3, kind="dora")
    planned, lm = planned_shape(family_config(name), name), family_model(name)
    add_adapter(lm, adapter, seed=0)
    live = live_shape(PackedCausalLM(lm, "chunked"))
    assert live.trained == trained_parameters(planned, adapter) > 0
    assert (live.parameters, live.nonembedding_parameters) == (
        planned.parameters,
        planned.nonembedding_parameters,
    )


def test_weights_in_4_bits_count_as_what_they_stand_for():
    weight = torch.nn.Parameter(torch.zeros(50, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = SimpleNamespace(shape=torch.Size([10, 10]))
    assert parameter_size(weight) == 100


def test_one_full_sample_with_every_label_differs_by_the_embedding_and_half_of_attention():
    strict = SHAPE.step_flops(real_tokens=6, supervised_tokens=6, sum_squared_lengths=36)
    common = SHAPE.step_flops_6n(slot_tokens=6, pack_len=6)
    assert common - strict == 6 * 500 * 6 + 6 * 2 * 8 * 36  # the embedding has 10 x 50 parameters


def test_packing_more_samples_costs_less_attention_than_one_long_sample():
    packed = SHAPE.step_flops(real_tokens=8, supervised_tokens=4, sum_squared_lengths=4**2 + 4**2)
    single = SHAPE.step_flops(real_tokens=8, supervised_tokens=4, sum_squared_lengths=8**2)
    assert single - packed == 6 * 2 * 8 * 32


def test_only_experts_that_a_token_reaches_count():
    """Qwen3-30B-A3B: its card says 30.5 B parameters, 3.3 B of them activated."""
    config = _llama(2048, 6144, 48, 32, 4, 151936) | {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    shape = planned_shape(config, "test")
    assert shape.idle_parameters == 48 * 120 * 3 * 2048 * 768
    assert shape.parameters / 1e9 == pytest.approx(30.5, abs=0.05)
    assert (shape.parameters - shape.idle_parameters) / 1e9 == pytest.approx(3.3, abs=0.06)
    linear = 6 * (shape.nonembedding_parameters - 48 * 120 * 3 * 2048 * 768)
    assert shape.step_flops(real_tokens=1, supervised_tokens=0, sum_squared_lengths=0) == linear
    dense = planned_shape(config | {"mlp_only_layers": [0], "decoder_sparse_step": 2}, "test")
    assert dense.idle_parameters == shape.idle_parameters / 2


def test_shape_from_a_model_configuration():
    config = SimpleNamespace(
        model_type="unheard_of",
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=100,
        head_dim=32,
    )
    shape = built_shape(config, (23456, 12345))
    assert (shape.query_width, shape.layers) == (128, 3)
    assert (shape.parameters, shape.nonembedding_parameters) == (23456, 12345)
    config.head_dim = None  # Llama configurations without it: hidden size / heads
    assert built_shape(config, (1, 1)).query_width == 64


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
