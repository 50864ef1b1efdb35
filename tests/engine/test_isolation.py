"""Samples of a pack never see each other, and a model in which they do is found out."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch
from tiny_families import FAMILY_CONFIGS, VOCAB_SIZE, attend_by_sample, family_model
from torch.nn.attention import varlen
from transformers import LlamaConfig

from versatune_ds.config.model import Model
from versatune_ds.engine.backend import deepspeed_backend
from versatune_ds.engine.backend.deepspeed_backend import MAX_ISOLATION_LEAK
from versatune_ds.engine.backend.ranks import Ranks
from versatune_ds.engine.model import attention, packed_lm
from versatune_ds.engine.model.attention import (
    BY_SAMPLE,
    VARLEN,
    choose_attention,
    sample_attention,
    varlen_attention,
)
from versatune_ds.engine.model.families import MIXTURES
from versatune_ds.engine.model.isolation import PROBE_TOKENS, probe_packs
from versatune_ds.engine.model.packed_lm import PackedCausalLM
from versatune_ds.engine.model.recompute import recompute_in_backward
from versatune_ds.engine.model.rope import turning_length
from versatune_ds.foundations.errors import ConfigError

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def tiny(config_class=LlamaConfig, **more):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**SHAPE, **more), attn_implementation="sdpa")


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("kind", FAMILY_CONFIGS)
def test_losses_of_a_sample_are_bit_equal_whatever_its_neighbour(kind, by_sample):
    """With a neighbour whose halves lie on the other side of the lengths that positions depend on."""
    lm = family_model(kind)
    model = PackedCausalLM(attend_by_sample(lm) if by_sample else lm, "auto").eval()
    # an expert's product is over its tokens of all samples, and their number decides how it is summed
    bound = 1e-6 if model.lm.config.model_type in MIXTURES else 0.0
    assert probe_packs(model, VOCAB_SIZE, CPU, 14).leak <= bound


def test_a_mixture_in_bf16_passes_the_probe():
    model = PackedCausalLM(family_model("qwen3_moe").bfloat16(), "auto").eval()
    assert probe_packs(model, VOCAB_SIZE, CPU).leak <= MAX_ISOLATION_LEAK["bf16"]


@pytest.mark.parametrize(
    ("kind", "turn"), [("llama, dynamic rope", 8), ("phi3, longrope", 8), ("ministral3", None)]
)
def test_positions_that_depend_on_length_would_be_found_out(monkeypatch, kind, turn):
    """As transformers computes them, the longest sample chooses the frequencies of all."""
    monkeypatch.setattr(packed_lm, "rotate_by_sample", lambda model: [])
    model = PackedCausalLM(family_model(kind), "auto").eval()
    assert turning_length(model.lm.config) == turn
    assert probe_packs(model, VOCAB_SIZE, CPU, turn or PROBE_TOKENS).leak == 0.0
    leak = probe_packs(model, VOCAB_SIZE, CPU, 2 * (turn or PROBE_TOKENS) - 2).leak
    assert leak > MAX_ISOLATION_LEAK["bf16"] if turn else leak == 0.0


def test_a_length_of_one_kind_of_layer_counts():
    rope = {
        "sliding_attention": {"rope_type": "default"},
        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 4096},
    }
    assert turning_length(SimpleNamespace(rope_parameters=rope, max_position_embeddings=131072)) == 4096
    assert turning_length(SimpleNamespace(rope_parameters=None)) is None


def test_a_run_probes_beyond_the_turning_length(monkeypatch):
    """And no further than a sample can be, which is a pack."""
    asked = []
    monkeypatch.setattr(deepspeed_backend, "probe_packs", lambda *given: asked.append(given[3]) or (0.0, 0.0))
    for kind, pack_len in (("phi3, longrope", 32), ("phi3, longrope", 6), ("mistral", 32)):
        backend = SimpleNamespace(
            model=PackedCausalLM(family_model(kind), "auto"),
            evaluating=contextlib.nullcontext,
            forward=None,
            device=CPU,
            ranks=Ranks.of_world(),
        )
        settings = SimpleNamespace(
            batch=SimpleNamespace(pack_len=pack_len), model=SimpleNamespace(dtype="fp32")
        )
        deepspeed_backend.check_isolation(backend, settings)
    assert asked == [14, 6, PROBE_TOKENS]


@pytest.mark.parametrize("policy", ["off", "all", 2])
def test_isolation_holds_with_recomputed_activations(policy):
    lm = tiny()
    recompute_in_backward(lm, policy)
    recomputed = [layer.gradient_checkpointing for layer in lm.model.layers]
    assert recomputed == {"off": [False, False], "all": [True, True], 2: [True, False]}[policy]
    model = PackedCausalLM(lm, "auto").train()
    assert probe_packs(model, SHAPE["vocab_size"], CPU).leak == 0.0


@pytest.mark.parametrize(("policy", "calls"), [("off", [1, 1]), ("all", [2, 2]), (2, [2, 1])])
def test_checkpointed_layers_run_again_in_backward(policy, calls):
    lm = tiny()
    recompute_in_backward(lm, policy)
    counted = [0, 0]
    for i, layer in enumerate(lm.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: counted.__setitem__(i, counted[i] + 1))
    lm.train()(torch.arange(8).unsqueeze(0), use_cache=False).logits.sum().backward()
    assert counted == calls


def test_a_pack_gives_the_losses_of_its_samples_alone():
    model = PackedCausalLM(tiny(), "auto").eval()
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 7, 4, 12]
    samples = [torch.randint(0, 64, (n,), generator=generator) for n in lengths]

    def losses(parts):
        ids = torch.cat(parts)
        labels = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in parts])
        sizes = torch.tensor([len(part) for part in parts])
        out = model(
            input_ids=ids,
            position_ids=torch.cat([torch.arange(len(part)) for part in parts]),
            labels=labels,
            sample_ids=torch.arange(len(parts)).repeat_interleave(sizes),
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int(),
            max_seqlen=int(sizes.max()),
            num_samples=len(parts),
            num_valid=int((labels != -100).sum()),
            normalizer=1.0,
        )
        return out.sample_loss

    packed = losses(samples)
    alone = torch.cat([losses([part]) for part in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=1e-6)


def test_a_model_that_mixes_samples_is_found_out():
    """Positions that do not restart, or a mask of ones, make transformers attend across samples."""
    model = PackedCausalLM(tiny(), "auto").eval()
    body = model.lm.base_model
    forward = body.forward

    def leaking(*args, attention_mask=None, **kwargs):
        return forward(*args, attention_mask=torch.ones_like(kwargs["input_ids"]), **kwargs)

    body.forward = leaking
    leak = probe_packs(model, SHAPE["vocab_size"], CPU).leak
    assert leak > 10 * max(MAX_ISOLATION_LEAK.values())


def test_cpu_takes_one_sample_after_the_other_and_says_so():
    choice = choose_attention(Model(source="x"), "cpu")
    assert choice.implementation == BY_SAMPLE and "one sample after the other" in choice.reason
    choice = choose_attention(Model(source="x", attention="sdpa"), "cpu")
    assert choice.implementation == "sdpa" and "quadratic" in choice.reason
    with pytest.raises(ConfigError, match="needs CUDA"):
        choose_attention(Model(source="x", attention="varlen"), "cpu")


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_sample_after_the_other_is_the_block_diagonal_mask(kv_heads, window):
    """Outputs and gradients; samples of one token, of a window's length and longer."""
    q, k, v = (torch.randn(1, heads, 14, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    boundaries = torch.tensor([0, 6, 7, 14], dtype=torch.int32)
    sample = torch.arange(3).repeat_interleave(boundaries.diff())
    mask = (sample[:, None] == sample) & torch.ones(14, 14, dtype=torch.bool).tril()
    if window is not None:  # as transformers masks: `kv_idx > q_idx - sliding_window`
        mask &= torch.arange(14) > torch.arange(14)[:, None] - window
    repeated = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=0.3)
    found, weights = sample_attention(
        torch.nn.Identity(), q, k, v, None, 0.3, window, cu_seq_lens_q=boundaries, max_length_q=7
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert weights is None
    upstream = torch.randn_like(found)
    gradients = [
        torch.autograd.grad((out * upstream).sum(), (q, k, v)) for out in (found, expected.transpose(1, 2))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hopper_takes_flash_attention_3_where_it_is_installed(monkeypatch):
    activated = []
    monkeypatch.setattr(attention.attention_kernels, "activate_flash_attention_impl", activated.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # flash-attn is, too
    for major, expected in ((10, "flash_attention_2"), (9, VARLEN)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        choice = choose_attention(Model(source="x"), "cuda")
        assert choice.implementation == expected and ("FlashAttention 3" in choice.reason) == (major == 9)
    assert activated == ["FA3"]
    asked = choose_attention(Model(source="x", attention="flash_attention_2"), "cuda")
    capped = choose_attention(Model(source="x"), "cuda", caps_scores=True)
    assert asked.implementation == capped.implementation == "flash_attention_2" and activated == ["FA3"]


def test_cuda_prefers_flash_attention_and_falls_back_aloud(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "flash_attn" else None)
    assert choose_attention(Model(source="x"), "cuda").implementation == "flash_attention_2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = choose_attention(Model(source="x"), "cuda")
    assert choice.implementation == VARLEN and "not installed" in choice.reason
    with pytest.raises(ConfigError, match="pip install"):
        choose_attention(Model(source="x", attention="flash_attention_2"), "cuda")
    assert choose_attention(Model(source="x", dtype="fp32"), "cuda").implementation == "sdpa"


def test_scores_that_a_model_caps_are_capped_or_refused(monkeypatch):
    for flash, on_cuda in ((None, "eager"), (object(), "flash_attention_2")):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, flash=flash: flash if name == "flash_attn" else None
        )
        chosen = [
            choose_attention(Model(source="x"), device, True).implementation for device in ("cpu", "cuda")
        ]
        assert chosen == ["eager", on_cuda]
    assert choose_attention(Model(source="x", dtype="fp32"), "cuda", True).implementation == "eager"
    for wanted in ("sdpa", "varlen"):
        with pytest.raises(ConfigError, match=f"{wanted} would not cap"):
            choose_attention(Model(source="x", attention=wanted), "cuda", caps_scores=True)
    q = torch.zeros(1, 4, 8, 8)
    options = {"cu_seq_lens_q": torch.tensor([0, 8]), "max_length_q": 8}
    for extra in ({"softcap": 3.0}, {"s_aux": q}):
        with pytest.raises(ConfigError, match="neither caps its scores nor has sinks"):
            varlen_attention(torch.nn.Identity(), q, q, q, None, **options, **extra)


def test_varlen_without_boundaries_is_an_error():
    q = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ConfigError, match="samples would mix"):
        varlen_attention(torch.nn.Identity(), q, q, q, None)


def by_samples(query, key, value, boundaries, scale, window_size):
    """What torch's kernel computes on GPUs: causal attention per sample, grouped heads included.

    Args:
        window_size: flash-attn's: as many keys before the query's own (-1: all), and after it.
    """
    assert window_size[1] == 0
    parts = []
    for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        mask = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            mask = mask.triu(-window_size[0])
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
            ).transpose(0, 1)
        )
    return torch.cat(parts)


def kernel_of_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return by_samples(query, key, value, cu_seq_q, scale, window_size)


def kernel_of_torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    if not enable_gqa and query.size(1) != key.size(1):
        raise ValueError("Expect query and key/value to have the same number of heads")
    return by_samples(query, key, value, cu_seq_q, scale, window_size)


INSTALLED = inspect.signature(varlen.varlen_attn)


def installed_kernel(*args, **kwargs):
    given = INSTALLED.bind(*args, **kwargs).arguments
    names = ("query", "key", "value", "cu_seq_q", "scale", "window_size")
    return by_samples(*(given[name] for name in names))


installed_kernel.__signature__ = INSTALLED  # type: ignore[attr-defined]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kernel", [kernel_of_torch_2_11, kernel_of_torch_2_13, installed_kernel])
def test_varlen_calls_the_kernel_as_its_version_of_torch_wants(
    monkeypatch, kernel, kv_heads, compiled, window
):
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    spec = importlib.util.spec_from_file_location("attention_of_this_torch", attention.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    q = torch.randn(1, 4, 12, 8)
    k, v = torch.randn(2, 1, kv_heads, 12, 8).unbind()
    boundaries = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    options = {"scaling": 0.3, "cu_seq_lens_q": boundaries, "max_length_q": 6, "sliding_window": window}
    torch.compiler.reset()
    call = torch.compile(anew.varlen_attention, backend="eager") if compiled else anew.varlen_attention
    out, weights = call(torch.nn.Identity(), q, k, v, None, **options)
    sample = torch.arange(3).repeat_interleave(boundaries.diff())
    mask = (sample[:, None] == sample) & torch.ones(12, 12, dtype=torch.bool).tril()
    if window is not None:  # as transformers masks: `kv_idx > q_idx - sliding_window`
        mask &= torch.arange(12) > torch.arange(12)[:, None] - window
    repeated = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_on_cuda_equals_the_block_diagonal_mask():
    from transformers import AutoModelForCausalLM

    from versatune_ds.engine.model.attention import register_varlen

    register_varlen()
    device = torch.device("cuda")
    more = {"hidden_size": 128, "head_dim": 32}
    losses = {}
    for name in ("sdpa", VARLEN):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**(SHAPE | more)), attn_implementation=name, dtype=torch.bfloat16
        )
        packed = PackedCausalLM(model.to(device), "auto").eval()
        assert probe_packs(packed, 64, device).leak <= MAX_ISOLATION_LEAK["bf16"]
        n = 24
        ids = (torch.arange(2 * n, device=device) * 7) % 64
        labels = ids.roll(-1)
        with torch.no_grad():
            losses[name] = packed(
                input_ids=ids,
                position_ids=torch.arange(n, device=device).repeat(2),
                labels=labels,
                sample_ids=torch.arange(2, device=device).repeat_interleave(n),
                cu_seqlens=torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device),
                max_seqlen=n,
                num_samples=2,
                num_valid=2 * n,
                normalizer=1.0,
            ).token_loss
    torch.testing.assert_close(losses["sdpa"], losses[VARLEN], rtol=0.05, atol=0.05)
