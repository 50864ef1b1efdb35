"""What may be put around the body of the model: kernels of liger-kernel, and torch.compile."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from versatune_ds.apps.doctor import backends
from versatune_ds.config.model import Model
from versatune_ds.engine.model.attention import choose_attention
from versatune_ds.engine.model.isolation import probe_packs
from versatune_ds.engine.model.packed_lm import apply_liger, build_model

VOCAB_SIZE = 64


def tiny():
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa")


# ---- liger-kernel -------------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch):
    """A liger-kernel that knows qwen2 and notes how it is called."""
    calls = []

    def patch_qwen2(
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        rms_norm=True,
        swiglu=True,
        model=None,
    ):
        switches = dict(locals())
        calls.append((switches.pop("model"), {k: v for k, v in switches.items() if k != "calls"}))

    package, transformers = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkey_patch = types.ModuleType("liger_kernel.transformers.monkey_patch")
    monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": patch_qwen2}
    transformers.monkey_patch = monkey_patch
    for module in (package, transformers, monkey_patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 9.9")
    return calls


def test_liger_gives_norms_swiglu_and_rope_but_never_its_loss(liger):
    lm = tiny()
    said = apply_liger(lm, "auto", "cuda")
    assert "rms_norm, swiglu, rope" in said and "9.9" in said
    ((patched, switches),) = liger
    assert patched is lm
    assert switches == {
        "rope": True,
        "rms_norm": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }


def test_liger_leaves_out_what_would_overwrite_kept_products(liger):
    assert "rms_norm, swiglu (" in apply_liger(tiny(), "auto", "cuda", ("rope",))
    ((_, switches),) = liger
    assert not switches["rope"] and switches["swiglu"]


@pytest.mark.parametrize(
    ("choice", "device", "reason"), [("off", "cuda", "asked for"), ("auto", "cpu", "needs CUDA")]
)
def test_liger_stays_off_and_says_why(liger, choice, device, reason):
    assert reason in apply_liger(tiny(), choice, device)
    assert liger == []


def test_liger_that_is_not_installed_or_does_not_know_the_model_is_no_error(liger, monkeypatch):
    lm = tiny()
    lm.config.model_type = "unheard_of"
    assert "no kernels for unheard_of" in apply_liger(lm, "auto", "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in apply_liger(tiny(), "auto", "cuda")
    assert liger == []


def test_the_doctor_speaks_of_liger():
    (finding,) = [finding for finding in backends() if finding.topic == "liger"]
    assert finding.text.startswith("off (") or "RMSNorm" in finding.text


# ---- torch.compile ------------------------------------------------------------------------------


def _packs(num_packs):
    """Packs of 24 tokens with a growing number of samples."""
    g = torch.Generator().manual_seed(0)
    for num_samples in range(1, num_packs + 1):
        ids = torch.sort(torch.randint(0, num_samples, (24,), generator=g)).values
        ids[:num_samples] = torch.arange(num_samples)
        ids = torch.sort(ids).values
        lengths = torch.bincount(ids, minlength=num_samples)
        labels = torch.randint(0, VOCAB_SIZE, (24,), generator=g)
        labels[::5] = -100
        yield {
            "input_ids": torch.randint(0, VOCAB_SIZE, (24,), generator=g),
            "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()]),
            "labels": labels,
            "sample_ids": ids,
            "cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
            "max_seqlen": int(lengths.max()),
            "num_samples": num_samples,
            "num_valid": int((labels != -100).sum()),
            "normalizer": 20.0,
        }


def noting(graphs):
    """A compiler that notes what it is given."""
    from torch._dynamo.backends.debugging import aot_eager

    def compile_graph(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return compile_graph


@pytest.mark.parametrize("policy", ["off", "all"])
def test_compiled_layers_give_the_same_losses_and_gradients(monkeypatch, tmp_path, policy):
    """With the compiler that traces and generates no code; the head runs as it is, behind the layers."""
    compile_function, graphs = torch.compile, []
    compiler = noting(graphs)

    def trace_only(function):
        return compile_function(function, backend=compiler, fullgraph=True)

    monkeypatch.setattr(torch, "compile", trace_only)
    torch._dynamo.reset()
    tiny().save_pretrained(tmp_path)
    results = []
    for choice in ("off", "layers"):
        settings = Model(
            source=str(tmp_path),
            dtype="fp32",
            attention="sdpa",
            compile=choice,
            activation_checkpointing=policy,
        )
        model = build_model(settings, choose_attention(settings, "cpu"), seed=0).train()
        if choice == "layers":
            model.compile_layers()
        numbers = []
        for pack in _packs(4):
            model.zero_grad()
            out = model(**pack)
            out.loss.backward()
            numbers += [out.loss.detach(), out.sample_loss]
            numbers += [p.grad.clone() for p in model.parameters()]
        results.append(numbers)
        # of a pack of one sample, without a mask, and of others; not of each layer
        assert len(graphs) == (2 if choice == "layers" else 0)
        assert probe_packs(model, VOCAB_SIZE, torch.device("cpu")).leak == 0.0
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
