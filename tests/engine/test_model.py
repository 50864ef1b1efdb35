"""Models that cannot be trained as they lie are refused with a reason; buffers keep their precision."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from versatune_ds.config.schema import Model
from versatune_ds.engine.backend.parameters import parameter_counts
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.packed_lm import (
    PackedCausalLM,
    build_model,
    float32_buffers,
    load_architecture,
    restore_buffers,
)
from versatune_ds.foundations.errors import ConfigError
from versatune_kernels import backends, resolve_backend

SDPA = AttentionChoice("sdpa", "test")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def folder(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    return tmp_path


def test_the_default_loss_is_the_triton_kernel_on_cuda(monkeypatch):
    """As on a machine whose GPU and Triton have no problem; here it falls back, and says so."""
    default = Model(source="any").loss_backend
    assert default == "auto"
    assert resolve_backend(default, "cpu").name == "chunked"
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    monkeypatch.setattr(backends, "_gpu_problem", lambda: "no GPU that Triton knows")
    assert resolve_backend(default, "cuda") == ("chunked", "auto: no GPU that Triton knows")
    monkeypatch.setattr(backends, "_gpu_problem", lambda: None)
    assert resolve_backend(default, "cuda").name == "triton"


def build(folder, **more):
    return build_model(Model(source=str(folder), dtype="fp32", **more), SDPA, seed=0)


def test_a_sound_folder_loads_with_the_loss_in_its_head(folder):
    model = build(folder)
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm.lm_head.weight, saved["lm_head.weight"])
    total, outside = parameter_counts(model)
    assert total - outside == 2 * 64 * 32 and total == sum(t.numel() for t in saved.values())


def test_a_missing_weight_is_an_error_and_not_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights.*layers\.1\.mlp\.up_proj"):
        build(folder)


def test_weights_of_another_shape_are_an_error(folder):
    LlamaConfig(**(SHAPE | {"intermediate_size": 64})).save_pretrained(folder)
    with pytest.raises(ConfigError):
        build(folder)


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build(folder)


def test_a_missing_folder_is_named():
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        load_architecture(Model(source="./nowhere"))


def test_random_weights_follow_the_seed(folder):
    first, second = (build(folder, weights="random") for _ in range(2))
    other = build_model(Model(source=str(folder), dtype="fp32", weights="random"), SDPA, seed=1)
    assert torch.equal(first.lm.lm_head.weight, second.lm.lm_head.weight)
    assert not torch.equal(first.lm.lm_head.weight, other.lm.lm_head.weight)


def test_an_output_bias_is_refused():
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE))
    lm.lm_head = torch.nn.Linear(32, 64, bias=True)
    with pytest.raises(ConfigError, match="without bias"):
        PackedCausalLM(lm, "auto")


def test_rotary_frequencies_survive_a_cast(folder):
    model = build(folder)
    before = float32_buffers(model)
    assert any("inv_freq" in name for name in before)
    model.bfloat16()
    restore_buffers(model, before)
    after = dict(model.named_buffers())
    assert all(
        after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before
    )
    assert model.lm.lm_head.weight.dtype == torch.bfloat16
