"""Models that cannot be trained as they lie are refused with a reason; buffers keep their precision."""

from __future__ import annotations

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
from export_memory import NoCompanions
from safetensors.torch import load_file, save_file
from saved_checkpoints import write_checkpoint
from tiny_families import image_text_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from versatune_ds.config.model import Model
from versatune_ds.engine.backend.parameters import parameter_counts
from versatune_ds.engine.checkpointing.hf_export import export_checkpoint, export_model
from versatune_ds.engine.model import source
from versatune_ds.engine.model.attention import AttentionChoice
from versatune_ds.engine.model.packed_lm import (
    PackedCausalLM,
    build_model,
    float32_buffers,
    restore_buffers,
)
from versatune_ds.engine.model.source import check_files, load_architecture
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
    with pytest.raises(ConfigError, match=r"model.safetensors cannot be loaded .*get it again"):
        build(folder)


def test_a_missing_shard_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00002.safetensors cannot be loaded"):
        check_files(Model(source=str(folder)))


def test_a_pointer_of_git_lfs_is_named_whatever_stands_for(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ConfigError, match=r"model.safetensors: a Git LFS pointer .*; run git lfs pull"):
        check_files(Model(source=str(folder)))
    check_files(Model(source=str(folder), weights="random"))
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "tokenizer.json").write_text(pointer)
    with pytest.raises(ConfigError, match=r"tokenizers: tokenizer.json: a Git LFS pointer"):
        check_files(Model(source=str(folder), weights="random", tokenizer=str(folder / "tokenizers")))
    (folder / "tokenizer.json").write_text(pointer)
    with pytest.raises(ConfigError, match=r"tokenizer.json: a Git LFS pointer"):
        check_files(Model(source=str(folder), weights="random"))


def test_a_folder_with_pickled_weights_only_is_refused_with_a_command_that_works(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only in .bin files.*as safetensors once: python -c") as error:
        build(folder)
    *_, code = shlex.split(str(error.value)[str(error.value).index("python -c") :])
    exec(code)
    assert torch.equal(build(folder).lm.lm_head.weight, model.lm_head.weight)


# --- tied or not --------------------------------------------------------------------------------------------


def says_tied(folder, tied=True):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))


def exported(model, folder):
    """What transformers loads from the model's export."""
    export_model(
        SimpleNamespace(model=model, parameters=model.named_parameters), NoCompanions(), folder, 1000
    )
    return LlamaForCausalLM.from_pretrained(folder)


def test_a_head_that_the_files_hold_is_trained_and_exported_though_the_configuration_ties_it(
    folder, tmp_path, caplog
):
    theirs = LlamaForCausalLM.from_pretrained(folder)
    says_tied(folder)
    caplog.set_level("WARNING", "versatune_ds")
    model = build(folder)
    assert not model.tied and "its files hold a head of its own" in caplog.text
    again = exported(model, tmp_path / "out")
    assert not again.config.tie_word_embeddings
    for name, parameter in theirs.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    weights = {f"lm.{name}": p.detach() for name, p in theirs.named_parameters()}
    write_checkpoint(tmp_path / "step", weights, stage=3, ranks=2)
    architecture = load_architecture(Model(source=str(folder)))
    export_checkpoint(tmp_path / "step", architecture, NoCompanions(), tmp_path / "late", "fp32", 1000)
    assert torch.equal(
        LlamaForCausalLM.from_pretrained(tmp_path / "late").lm_head.weight, theirs.lm_head.weight
    )


def test_a_checkpoint_of_a_tied_model_is_exported_tied(folder, tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    model.save_pretrained(folder)
    weights = {f"lm.{name}": p for name, p in model.state_dict().items()}  # one tensor under both names
    assert "lm.lm_head.weight" in weights
    write_checkpoint(tmp_path / "step", weights, stage=0, ranks=1)
    architecture = load_architecture(Model(source=str(folder)))
    export_checkpoint(tmp_path / "step", architecture, NoCompanions(), tmp_path / "late", "fp32", 1000)
    again, info = LlamaForCausalLM.from_pretrained(tmp_path / "late", output_loading_info=True)
    assert again.config.tie_word_embeddings and not info["missing_keys"]
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("changed_row", [0, 63, None])
def test_a_head_is_compared_to_its_last_row(folder, monkeypatch, changed_row):
    monkeypatch.setattr(source, "ROWS", 16)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if changed_row is not None:
        weights["lm_head.weight"][changed_row, -1] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert source.holds_own_head(folder) == (changed_row is not None)


@pytest.mark.parametrize("kept", ["both, equal", "model.embed_tokens.weight", "lm_head.weight"])
def test_one_matrix_under_either_name_or_both_is_tied(folder, tmp_path, kept):
    says_tied(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    dropped = {"lm_head.weight", "model.embed_tokens.weight"} - {kept} if kept in weights else set()
    kept_weights = {name: weight for name, weight in weights.items() if name not in dropped}
    save_file(kept_weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = build(folder)
    assert model.tied
    again = exported(model, tmp_path / "out")
    assert again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, weights["lm_head.weight"])


# --- models of more than text -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_text_part_of_a_model_of_images_is_trained_and_exported(tmp_path, kind, caplog):
    lm = image_text_model(kind)
    lm.save_pretrained(tmp_path / "whole")
    caplog.set_level("WARNING", "versatune_ds")
    model = build(tmp_path / "whole")
    assert "have no place in" in caplog.text and "multi_modal_projector" in caplog.text
    ids = torch.arange(3, 20)[None]
    expected = lm(input_ids=ids).logits
    export_model(
        SimpleNamespace(model=model, parameters=model.named_parameters),
        NoCompanions(),
        tmp_path / "out",
        1000,
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(ids).logits, expected)
    architecture = load_architecture(Model(source=str(tmp_path / "whole")))
    assert architecture.architectures == again.config.architectures == [type(again).__name__]


def test_a_text_part_that_cannot_stand_alone_is_refused(tmp_path):
    AutoConfig.for_model("qwen2_5_vl").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"qwen2_5_vl model of more than text, whose text part \(qwen2_5_vl_text\)"
    ):
        load_architecture(Model(source=str(tmp_path)))


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
