"""The plan's arithmetic: shapes against built models, the search, the verdict, and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from versatune_ds.cli.main import main
from versatune_ds.engine import bench_shapes
from versatune_ds.engine.plan import Machine, candidate, candidates, make_plan, remedies, step_times
from versatune_ds.engine.plan_gpus import GPUS, find_gpu
from versatune_ds.engine.plan_memory import (
    GIB,
    Setup,
    _vectors,
    layer_activations,
    memory_plan,
    saved_activations,
    total,
)
from versatune_ds.engine.plan_shape import Decoder, find_decoder
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.observability.throughput import PEAK_TFLOPS

H100 = Machine(gpu=find_gpu("h100-80g"))
SMALL = bench_shapes._llama(64, 160, 3, 4, 2, 512)
SHAPES = {
    "llama": SMALL,
    "llama with biases": {**SMALL, "attention_bias": True},
    "qwen2": bench_shapes._qwen2(64, 160, 3, 4, 2, 512),
    "qwen2 tied": bench_shapes._qwen2(64, 160, 3, 4, 2, 512) | {"tie_word_embeddings": True},
    "qwen3": {**SMALL, "model_type": "qwen3", "head_dim": 32},
    "qwen3 without head_dim": {**SMALL, "model_type": "qwen3"},
    "qwen3 with biases": {**SMALL, "model_type": "qwen3", "head_dim": 32, "attention_bias": True},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_parameters_are_those_of_the_built_model(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(SHAPES[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    shape = Decoder.from_config(SHAPES[kind], kind)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    vectors = [p.numel() for p in model.parameters() if p.dim() == 1]
    assert sorted(_vectors(shape)) == sorted(vectors)
    assert shape.layer_parameters == sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("name", [name for name in bench_shapes.SHAPES if name != "tiny"])
def test_named_shapes_agree_with_the_benchmark(name):
    shape = find_decoder(name)
    assert shape.parameters == bench_shapes.total_parameters(name)
    assert shape.nonembedding_parameters == bench_shapes.nonembedding_parameters(name)


def test_models_by_hub_name_and_folder(tmp_path):
    assert find_decoder("Qwen/Qwen2.5-32B-Instruct") == find_decoder("qwen2.5-32b")
    assert find_decoder("meta-llama/Meta-Llama-3-8B") == find_decoder("llama-3-8b")
    bench_shapes.write_model_folder(tmp_path, "llama-2-7b")
    assert find_decoder(str(tmp_path)) == find_decoder("llama-2-7b")
    with pytest.raises(ConfigError, match=r"did you mean 'qwen2.5-32b'"):
        find_decoder("qwen2.5-23b")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match="unknown model family 'mixtral'"):
        find_decoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ConfigError, match="lacks intermediate_size"):
        find_decoder(str(tmp_path))


def test_state_of_a_32b_model_is_16_bytes_a_parameter_over_the_ranks():
    shape = find_decoder("qwen2.5-32b")
    plan = memory_plan(shape, Setup(gpus=32, checkpointing="all"))
    state = {"parameters", "master weights", "moments", "gradients"}
    held = sum(part.bytes for part in plan.held if part.name in state)
    assert held == pytest.approx(16 * shape.parameters / 32, rel=1e-6)
    # one [8192, 5120] bf16 tensor per layer: 64 x 84 MB
    assert saved_activations(shape, Setup(gpus=32, checkpointing="all")) == pytest.approx(5.4e9, rel=0.06)


def test_every_nth_layer_lies_between_all_and_none():
    shape = find_decoder("llama-3-8b")
    sizes = [saved_activations(shape, Setup(gpus=8, checkpointing=policy)) for policy in ("all", 2, 4, "off")]
    assert sizes == sorted(sizes)
    one = layer_activations(shape, Setup(gpus=8))
    assert sizes[3] - sizes[1] == 16 * (one - 8192 * 4096 * 2)


def test_activations_grow_with_the_pack_and_states_shrink_with_the_ranks():
    shape = find_decoder("qwen2.5-7b")
    few, many = (memory_plan(shape, Setup(gpus=n, packs_per_step=128)) for n in (8, 64))
    assert total(many.held) < total(few.held) / 4
    assert total(many.forward_backward) == total(few.forward_backward)
    short = saved_activations(shape, Setup(gpus=8, pack_len=4096))
    assert saved_activations(shape, Setup(gpus=8, pack_len=8192)) == 2 * short


def test_offload_moves_states_to_the_host():
    shape = find_decoder("qwen2.5-7b")
    none, optimizer, everything = (
        memory_plan(shape, Setup(gpus=8, offload=kind)) for kind in ("none", "optimizer", "all")
    )
    assert total(everything.held) < total(optimizer.held) < total(none.held)
    assert total(none.host) < total(optimizer.host) < total(everything.host)


def test_fastest_fitting_settings_come_first_and_fit():
    setup = Setup(gpus=16)
    found = candidates(find_decoder("qwen2.5-32b"), setup, H100)
    best = found[0]
    assert best.verdict == "fits" and best.memory.peak <= 80e9
    fitting = [c for c in found if c.verdict == "fits"]
    assert best.tokens_per_s == max(c.tokens_per_s for c in fitting)
    assert found[: len(fitting)] == fitting
    assert any(c.verdict == "does not fit" for c in found)


def test_between_fit_and_misfit_lies_tight():
    shape, setup = find_decoder("qwen2.5-7b"), Setup(gpus=8)
    plan = memory_plan(shape, setup)
    for size, verdict in ((plan.peak, "fits"), (plan.tensors, "tight"), (plan.tensors - 1, "does not fit")):
        machine = dataclasses.replace(H100, gpu=H100.gpu._replace(memory_gb=size / 1e9))
        assert candidate(shape, setup, machine).verdict == verdict
    full = dataclasses.replace(H100, host_gib=1.0)
    assert candidate(shape, setup, full).verdict == "does not fit"


def test_a_shorter_pack_is_a_remedy():
    setup, machine = Setup(gpus=1, packs_per_step=64, pack_len=65536), Machine(gpu=find_gpu("a100-40g"))
    shape = find_decoder("qwen2.5-32b")
    assert candidates(shape, setup, machine)[0].verdict != "fits"
    (text,) = remedies(shape, setup, machine)  # activations of such a pack are too large for any number
    assert "batch.pack_len 16384 fits" in text
    for pack_len, fits in ((32768, False), (16384, True)):
        best = candidates(shape, dataclasses.replace(setup, pack_len=pack_len), machine)[0]
        assert (best.verdict == "fits") is fits


def test_more_gpus_are_a_remedy():
    setup = Setup(gpus=1, packs_per_step=64)
    shape, machine = find_decoder("llama-2-7b"), dataclasses.replace(H100, host_gib=60.0)
    assert candidates(shape, setup, machine)[0].verdict != "fits"
    (text,) = remedies(shape, setup, machine)
    gpus = int(text.split()[0])
    assert f"{gpus} GPUs fit" in text
    for count, fits in ((gpus // 2, False), (gpus, True)):
        best = candidates(shape, dataclasses.replace(setup, gpus=count), machine)[0]
        assert (best.verdict == "fits") is fits


def test_speed_is_the_assumed_mfu_where_nothing_else_costs():
    shape = find_decoder("llama-2-7b")
    setup = Setup(gpus=1, packs_per_step=64)
    free = dataclasses.replace(H100, gpu=H100.gpu._replace(memory_gb_per_s=1e12))
    times = step_times(shape, setup, free)
    flops = 64 * (
        6 * shape.nonembedding_parameters * 8192 + 6 * 4096 * 32000 * 4096 + 6 * 32 * 4096 * 8192**2
    )
    assert times.step == pytest.approx(flops / (989.4e12 * 0.5), rel=1e-6)
    recomputing = step_times(shape, dataclasses.replace(setup, checkpointing="all"), free)
    assert recomputing.step == pytest.approx(times.step * 4 / 3, rel=1e-6)


def test_totals_follow_from_the_step():
    plan = make_plan(
        find_decoder("llama-2-7b"), Setup(gpus=8), H100, search=True, tokens=1e9, price_per_gpu_hour=2.0
    )
    run = plan["run"]
    assert run["steps"] == -(-(10**9) // (8192 * 128))
    assert run["hours"] == pytest.approx(run["steps"] * plan["time"]["step_s"] / 3600)
    assert run["cost"] == pytest.approx(run["hours"] * 16)
    bases = {p["basis"] for part in plan["memory"].values() if isinstance(part, list) for p in part}
    assert bases == {"checked", "model"}
    assert all(p["basis"] == "model" for p in plan["memory"]["margin"])


def test_every_gpu_has_a_peak():
    assert {gpu.peak_name for gpu in GPUS.values()} <= set(PEAK_TFLOPS)
    with pytest.raises(ConfigError, match=r"did you mean 'h100-80g'"):
        find_gpu("h100-80gb")


def test_command_chooses_and_prints_json(capsys):
    arguments = ["plan", "--model", "qwen2.5-32b", "--gpus", "16", "--gpu", "h100-80g", "--seq-len", "8192"]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"]["chosen"] and plan["verdict"] == "fits"
    assert plan["settings"]["packs_per_step"] == 128
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert f"verdict: fits - {plan['memory']['peak_bytes'] / GIB:.1f} of" in text


def test_command_says_what_would_fit_and_leaves_with_1(capsys):
    arguments = ["plan", "--model", "llama-2-7b", "--gpus", "1", "--gpu", "h100-80g"]
    assert main([*arguments, "--zero", "2"]) == 1
    text = capsys.readouterr().out
    assert "verdict: does not fit" in text and "Also fits:" in text and "offload" in text
    assert main([*arguments, "--host-gib", "60"]) == 1
    text = capsys.readouterr().out
    assert "verdict: does not fit" in text and "What would fit:" in text
    assert main([*arguments, "--checkpointing", "some"]) == 2
    assert main(["plan", "--model", "llama-2-7b", "--gpus", "3", "--gpu", "l4", "--packs-per-step", "8"]) == 2


def test_command_reads_a_runs_settings(capsys):
    arguments = ["--gpus", "32", "--gpu", "h100-80g", "--json"]
    assert main(["plan", "--config", "configs/qwen2.5-32b.yaml", *arguments, "batch.pack_len=4096"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"] == {
        "gpus": 32,
        "zero_stage": 3,
        "dtype": "bf16",
        "pack_len": 4096,
        "packs_per_step": 128,
        "checkpointing": "all",
        "offload": "none",
        "chosen": False,
    }
    assert any("ZeRO++" in part["what"] for part in plan["memory"]["always"])


def test_a_published_mfu_in_both_conventions():
    """KempnerForge: 8B on one H200, samples of 4,096 tokens, 10,471 tokens/s, reported as 57.8 %."""
    from versatune_ds.engine.plan_shape import find_decoder
    from versatune_ds.observability.throughput import mfu, peak_tflops, step_flops, step_flops_6n

    shape, tokens, length = find_decoder("llama-3-8b").flops_shape(), 10_471, 4096
    peak = peak_tflops("NVIDIA H200")
    common = step_flops_6n(shape, slot_tokens=tokens, pack_len=length)
    strict = step_flops(
        shape, real_tokens=tokens, supervised_tokens=tokens, sum_squared_lengths=tokens * length
    )
    assert mfu(common, 1.0, 1, peak) == pytest.approx(0.578, abs=5e-4)
    assert mfu(strict, 1.0, 1, peak) == pytest.approx(0.511, abs=5e-4)
