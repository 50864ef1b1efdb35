"""A pack that ranks share gives the losses, sums and gradients of the whole one."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import sequence_cases as cases
import torch
from launching import launch_soundly
from safetensors.torch import load_file
from tiny_families import family_config
from transformers import AutoConfig, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from versatune_ds.config.model import Model
from versatune_ds.data.collate import rows_of
from versatune_ds.engine.backend import deepspeed_backend
from versatune_ds.engine.backend.ranks import Group, Ranks
from versatune_ds.engine.model import isolation
from versatune_ds.engine.model.attention import BY_SAMPLE, VARLEN, choose_attention
from versatune_ds.engine.model.sequence import check_heads
from versatune_ds.engine.model.source import load_architecture
from versatune_ds.foundations.errors import ConfigError, VersaTuneError


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sequence")
    launch_soundly(Path(cases.__file__), cases.RANKS, [str(folder)])
    return {case: load_file(folder / f"{case}.safetensors") for case in cases.CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.CASES)
def test_a_shared_pack_is_the_whole_one(case, found):
    """Samples cross the cuts, one-token samples stand at them, one rank of four has padding only."""
    names = {name.removeprefix("whole ") for name in found[case] if name.startswith("whole ")}
    assert any(name.startswith("gradient") for name in names)
    for name in names:
        shared, whole = found[case][f"shared {name}"], found[case][f"whole {name}"]
        torch.testing.assert_close(
            shared, whole, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert case.startswith("empty") or found[case]["whole loss"] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama by 2", "llama by 4", "wide by 3", "recomputed by 2", "qwen3 by 4"])
def test_bytes_sent_are_those_of_the_formula(case, found):
    """(n - 1) / n x T / n x (2 H + 2 K') d s in forward, in backward, and where a layer is computed again."""
    kind, n, more = cases.CASES[case]
    config = family_config(kind, **more)
    heads, kv = config["num_attention_heads"], math.lcm(config["num_key_value_heads"], n)
    rows = rows_of(cases.PACK_LEN, n) // n
    once = rows * (2 * heads + 2 * kv) * config["head_dim"] * 4 * (n - 1) / n
    passes = 3 if case.startswith("recomputed") else 2
    assert int(found[case]["sent"]) == config["num_hidden_layers"] * passes * once


def test_heads_that_cannot_be_shared_are_refused_with_the_numbers_that_can():
    check_heads(28, 7)
    with pytest.raises(ConfigError, match=r"is 8, and the model's 28 .* use one of 1, 2, 4, 7, 14, 28$"):
        check_heads(28, 8)


def test_shared_packs_take_kernels_that_are_made_for_them():
    assert choose_attention(Model(source="x"), "cpu", False, True).implementation == BY_SAMPLE
    assert choose_attention(Model(source="x"), "cuda", False, True).implementation == VARLEN
    with pytest.raises(ConfigError, match=r"with model\.attention flash_attention_2"):
        choose_attention(Model(source="x", attention="flash_attention_2"), "cuda", False, True)
    with pytest.raises(ConfigError, match="a model that caps its scores"):
        choose_attention(Model(source="x"), "cuda", True, True)


def test_a_model_that_mixes_tokens_outside_of_attention_is_refused(monkeypatch):
    """Found by computing a probe both ways; here on the last of two ranks, which lacks the rows before."""

    def losses(mixes):
        def forward(input_ids, **rest):
            values = input_ids.float()
            return SimpleNamespace(token_loss=values.cumsum(0) if mixes else values)

        return forward

    for mixes in (False, True):
        error = isolation.probe_packs(losses(mixes), 64, torch.device("cpu"), 8, (1, 2)).error
        assert error > 0.1 if mixes else error == 0.0
    backend = SimpleNamespace(
        model=SimpleNamespace(lm=SimpleNamespace(config=Qwen2Config(**family_config("qwen2")))),
        evaluating=contextlib.nullcontext,
        forward=losses(False),
        device=torch.device("cpu"),
        ranks=Ranks(Group(0, 1), Group(0, 2)),
    )
    monkeypatch.setattr(deepspeed_backend, "probe_packs", lambda *probe: (0.0, 0.5))
    settings = SimpleNamespace(model=SimpleNamespace(dtype="bf16"))
    with pytest.raises(VersaTuneError, match="a layer of qwen2 mixes tokens outside of its attention"):
        deepspeed_backend.check_isolation(backend, settings)


def test_yarn_is_that_of_a_configuration_with_it(tmp_path):
    """Cosines and sines of positions, and what other programs will read in the export's config.json."""
    plain, stretched = Qwen2Config(**family_config("qwen2")), {"factor": 4.0}
    stretched["original_max_position_embeddings"] = 16
    plain.save_pretrained(tmp_path / "plain")
    ours = load_architecture(Model(source=str(tmp_path / "plain"), yarn=stretched))
    theirs = Qwen2Config(
        **family_config("qwen2", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, **stretched})
    )
    ours.save_pretrained(tmp_path / "ours")
    ours = load_architecture(Model(source=str(tmp_path / "ours"), yarn=stretched))  # as of an export
    assert ours.rope_parameters == AutoConfig.from_pretrained(tmp_path / "ours").rope_parameters
    assert ours.max_position_embeddings == 64
    x, positions = torch.zeros(1), torch.arange(64).unsqueeze(0)
    (cos, sin), expected = (Qwen2RotaryEmbedding(config)(x, positions) for config in (ours, theirs))
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])
    assert not torch.equal(cos, Qwen2RotaryEmbedding(plain)(x, positions)[0])


@pytest.mark.parametrize("kind", ["llama, dynamic rope", "gemma3_text"])
def test_yarn_on_other_positions_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(family_config(kind)))
    yarn = {"factor": 2.0, "original_max_position_embeddings": 8}
    with pytest.raises(ConfigError, match=r"model\.yarn stretches plain RoPE"):
        load_architecture(Model(source=str(tmp_path), yarn=yarn))
