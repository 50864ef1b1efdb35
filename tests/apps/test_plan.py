"""The plan's arithmetic: the search, the verdict, the bound, and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest

from versatune_ds.apps.bench.shapes import find_shape, write_model_folder
from versatune_ds.apps.plan.gpus import GPUS, find_gpu
from versatune_ds.apps.plan.memory import layer_activations, memory_plan, saved_activations, total
from versatune_ds.apps.plan.plan import (
    CHECKPOINTING,
    OFFLOAD,
    Machine,
    checkpoint_bytes,
    compute_bound,
    make_plan,
    option,
    options,
    remedies,
)
from versatune_ds.apps.plan.setup import GIB, Setup
from versatune_ds.cli.main import main
from versatune_ds.config.model import Adapter
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.observability.throughput import PEAK_TFLOPS

H100 = Machine(gpu=find_gpu("h100-80g"))


def test_models_by_hub_name_and_folder(tmp_path):
    assert find_shape("Qwen/Qwen2.5-32B-Instruct") == find_shape("qwen2.5-32b")
    assert find_shape("meta-llama/Meta-Llama-3-8B") == find_shape("llama-3-8b")
    write_model_folder(tmp_path, "llama-2-7b")
    assert find_shape(str(tmp_path)) == find_shape("llama-2-7b")
    with pytest.raises(ConfigError, match=r"did you mean 'qwen2.5-32b'"):
        find_shape("qwen2.5-23b")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match="unknown model family 'mixtral'"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ConfigError, match="lacks intermediate_size"):
        find_shape(str(tmp_path))


def test_an_average_lies_in_host_memory_and_muon_has_one_momentum():
    """Of Qwen2.5-32B's 32.76 G parameters 31.2 G lie in matrices of the layers."""
    shape, plain = find_shape("qwen2.5-32b"), Setup(gpus=8)
    averaged, muon = (dataclasses.replace(plain, **{name: True}) for name in ("has_average", "has_muon"))
    n = shape.parameters
    of_layers = shape.layers * 2 * (5120 * 5120 + 5120 * 1024) + shape.layers * 3 * 5120 * 27648
    host = total(memory_plan(shape, averaged).host) - total(memory_plan(shape, plain).host)
    assert host == pytest.approx(8 * n / 8, rel=1e-6)
    held = total(memory_plan(shape, plain).held) - total(memory_plan(shape, muon).held)
    assert held == pytest.approx(6 * of_layers / 8, rel=1e-6)  # 2 in place of 8 bytes each
    sizes = [checkpoint_bytes(shape, setup) for setup in (plain, averaged, muon)]
    assert sizes == [12 * n, 16 * n, 12 * n - 6 * of_layers]


def test_state_of_a_32b_model_is_16_bytes_a_parameter_over_the_ranks():
    shape = find_shape("qwen2.5-32b")
    plan = memory_plan(shape, Setup(gpus=32, checkpointing="all"))
    state = {"parameters", "master weights", "moments", "gradients"}
    held = sum(part.bytes for part in plan.held if part.name in state)
    assert held == pytest.approx(16 * shape.parameters / 32, rel=1e-6)
    # one [8192, 5120] bf16 tensor per layer: 64 x 84 MB
    assert saved_activations(shape, Setup(gpus=32, checkpointing="all")) == pytest.approx(5.4e9, rel=0.06)


def test_every_nth_layer_lies_between_all_and_none():
    shape = find_shape("llama-3-8b")
    sizes = [saved_activations(shape, Setup(gpus=8, checkpointing=policy)) for policy in ("all", 2, 4, "off")]
    assert sizes == sorted(sizes)
    one = layer_activations(shape, Setup(gpus=8))
    assert sizes[3] - sizes[1] == 16 * (one - 8192 * 4096 * 2)


def test_activations_grow_with_the_pack_and_states_shrink_with_the_ranks():
    shape = find_shape("qwen2.5-7b")
    few, many = (memory_plan(shape, Setup(gpus=n, packs_per_step=128)) for n in (8, 64))
    assert total(many.held) < total(few.held) / 4
    assert total(many.forward_backward) == total(few.forward_backward)
    short = saved_activations(shape, Setup(gpus=8, pack_len=4096))
    assert saved_activations(shape, Setup(gpus=8, pack_len=8192)) == 2 * short


def test_offload_moves_states_to_the_host():
    shape = find_shape("qwen2.5-7b")
    none, optimizer, everything = (
        memory_plan(shape, Setup(gpus=8, offload=kind)) for kind in ("none", "optimizer", "all")
    )
    assert total(everything.held) < total(optimizer.held) < total(none.held)
    assert total(none.host) < total(optimizer.host) < total(everything.host)


def test_settings_that_fit_come_first_with_the_least_extra_work_of_all():
    found = options(find_shape("qwen2.5-32b"), Setup(gpus=16), H100)
    best = found[0]
    assert best.verdict == "fits" and best.memory.peak <= 80e9
    fitting = [c for c in found if c.verdict == "fits"]
    assert found[: len(fitting)] == fitting
    offloads = [OFFLOAD.index(c.setup.offload) for c in fitting]
    assert offloads == sorted(offloads)
    small = options(find_shape("qwen2.5-7b"), Setup(gpus=16, pack_len=2048), H100)
    recomputes = [CHECKPOINTING.index(c.setup.checkpointing) for c in small if c.setup.offload == "none"]
    assert recomputes == sorted(recomputes) and set(recomputes) == {0, 1, 2, 3}
    assert [c.setup.zero_stage for c in small[:3]] == sorted(c.setup.zero_stage for c in small[:3])
    rest = [c for c in found if c.verdict == "does not fit"]
    assert rest and [c.memory.peak for c in rest] == sorted(c.memory.peak for c in rest)


def test_between_fit_and_misfit_lies_tight():
    shape, setup = find_shape("qwen2.5-7b"), Setup(gpus=8)
    plan = memory_plan(shape, setup)
    for size, verdict in ((plan.peak, "fits"), (plan.tensors, "tight"), (plan.tensors - 1, "does not fit")):
        machine = dataclasses.replace(H100, gpu=H100.gpu._replace(memory_gb=size / 1e9))
        assert option(shape, setup, machine).verdict == verdict
    full = dataclasses.replace(H100, host_gib=1.0)
    assert option(shape, setup, full).verdict == "does not fit"


def test_a_shorter_pack_is_a_remedy():
    setup, machine = Setup(gpus=1, packs_per_step=64, pack_len=65536), Machine(gpu=find_gpu("a100-40g"))
    shape = find_shape("qwen2.5-32b")
    assert options(shape, setup, machine)[0].verdict != "fits"
    (text,) = remedies(shape, setup, machine)  # activations of such a pack are too large for any number
    assert "batch.pack_len 16384 fits" in text
    for pack_len, fits in ((32768, False), (16384, True)):
        best = options(shape, dataclasses.replace(setup, pack_len=pack_len), machine)[0]
        assert (best.verdict == "fits") is fits


def test_more_gpus_are_a_remedy():
    setup = Setup(gpus=1, packs_per_step=64)
    shape, machine = find_shape("llama-2-7b"), dataclasses.replace(H100, host_gib=60.0)
    assert options(shape, setup, machine)[0].verdict != "fits"
    (text,) = remedies(shape, setup, machine)
    gpus = int(text.split()[0])
    assert f"{gpus} GPUs fit" in text
    for count, fits in ((gpus // 2, False), (gpus, True)):
        best = options(shape, dataclasses.replace(setup, gpus=count), machine)[0]
        assert (best.verdict == "fits") is fits


def test_shared_packs_divide_what_grows_with_tokens_and_are_a_remedy(capsys):
    shape = find_shape("qwen2.5-32b")
    setups = [Setup(gpus=32, packs_per_step=32, pack_len=65536, sequence_parallel=n) for n in (1, 2, 4, 8)]
    layers = [layer_activations(shape, setup) for setup in setups]
    # with 8 key-value heads nothing is held twice but attention's output, [T / n, 40 x 128] in bf16
    assert layers[1:] == [layers[0] / n + 65536 / n * 40 * 128 * 2 for n in (2, 4, 8)]
    held = [total(memory_plan(shape, setup).held) for setup in setups]
    assert len(set(held)) == 1
    longer = dataclasses.replace(setups[0], pack_len=131072)
    text = next(text for text in remedies(shape, longer, H100) if "sequence_parallel" in text)
    assert text.startswith("batch.sequence_parallel 4 fits with ZeRO-3")
    arguments = ["plan", "--model", "qwen2.5-32b", "--gpus", "32", "--gpu", "h100-80g", "--seq-len", "131072"]
    assert main([*arguments, "--sequence-parallel", "4"]) == 0
    assert "packs of 131072, each shared by 4 GPUs" in capsys.readouterr().out
    for wrong, reason in (("16", "40 attention heads cannot"), ("5", "32 ranks are no multiple")):
        assert main([*arguments, "--sequence-parallel", wrong]) == 2
        assert reason in capsys.readouterr().err


def test_the_bound_is_the_peak_over_the_work():
    shape, setup = find_shape("llama-2-7b"), Setup(gpus=2, packs_per_step=64)
    a_pack = 6 * shape.nonembedding_parameters * 8192 + 6 * 4096 * 32000 * 4096 + 6 * 32 * 4096 * 8192**2
    bound = compute_bound(shape, setup, H100.gpu)
    assert bound == pytest.approx(2 * 989.4e12 / (a_pack / 8192), rel=1e-6)
    recomputing = compute_bound(shape, dataclasses.replace(setup, checkpointing="all"), H100.gpu)
    twice = a_pack + (a_pack - 6 * 4096 * 32000 * 4096) / 3  # the head is not computed again
    assert recomputing == pytest.approx(bound * a_pack / twice, rel=1e-6)


def test_an_adapter_leaves_the_weights_and_takes_their_gradients_and_states():
    """And the head's gradient, of Qwen2.5-32B 1.6 GB."""
    shape = find_shape("qwen2.5-32b")
    full, lora = (Setup(gpus=8, checkpointing="all", adapter=adapter) for adapter in (None, Adapter(rank=16)))
    parts = {part.name: part.bytes for part in memory_plan(shape, lora).held}
    assert parts["frozen model"] == shape.parameters * 2 // 8
    # rank 16 on q, k, v, o, gate, up and down of 64 layers
    widths = [(5120, 5120), (5120, 1024), (5120, 1024), (5120, 5120), *[(5120, 27648)] * 2, (27648, 5120)]
    trained = 64 * 16 * sum(a + b for a, b in widths)
    assert parts["master weights"] + parts["moments"] == trained // 8 * 12
    assert checkpoint_bytes(shape, lora) == 12 * trained
    gradients = [
        part.bytes
        for setup in (full, lora)
        for part in memory_plan(shape, setup).forward_backward
        if part.name.startswith("loss: gradient")
    ]
    assert gradients[0] - gradients[1] == shape.head_parameters * 2


def test_kl_to_the_base_needs_hidden_states_twice_and_logits_twice():
    """Labels on 1024 of 2048 tokens of width 4096: 2 x 2 bytes and 4 of the gradient; 512 rows of logits."""
    shape = find_shape("llama-2-7b")
    lora = Setup(gpus=8, pack_len=2048, adapter=Adapter(), logits_dtype="compute")
    without, compared = (
        {part.name: part.bytes for part in memory_plan(shape, setup).forward_backward}
        for setup in (lora, dataclasses.replace(lora, compares=True))
    )
    assert compared.pop("KL to the base: hidden states") == 1024 * 4096 * 8
    assert compared.pop("loss: logits of a chunk") == 2 * 512 * 32000 * 4
    assert without.pop("loss: logits of a chunk") == 1024 * 32000 * 2
    rest = "backward of one layer, beyond the loss buffer"  # which is larger
    assert compared.pop(rest, 0) < without.pop(rest)
    assert compared == without


def test_4_bits_are_held_whole_by_every_rank():
    shape, qlora = find_shape("qwen2.5-32b"), Setup(gpus=2, adapter=Adapter(kind="qlora"))
    assert {c.setup.zero_stage for c in options(shape, qlora, H100)} == {1, 2}
    frozen = memory_plan(shape, dataclasses.replace(qlora, zero_stage=2)).held[0]
    assert frozen.name == "frozen model" and frozen.bytes / 1e9 == pytest.approx(16.1 + 3.1, abs=0.2)


def test_reduced_states_are_not_offloaded():
    """DeepSpeed's CPU Adam holds fp32 states, so a run of these settings is refused."""
    shape = find_shape("qwen2.5-32b")
    assert {c.setup.offload for c in options(shape, Setup(gpus=2), H100)} == {"none", "optimizer", "all"}
    assert {c.setup.offload for c in options(shape, Setup(gpus=2, states="bf16_moments"), H100)} == {"none"}


def test_every_part_says_what_it_rests_on():
    plan = make_plan(find_shape("llama-2-7b"), Setup(gpus=8), H100, search=True)
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
    assert f"at most {plan['bound_tokens_per_s']:,.0f} tokens/s" in text


def test_command_plans_an_adapter(capsys):
    arguments = ["plan", "--model", "qwen2.5-32b", "--gpus", "2", "--gpu", "h100-80g"]
    assert main(arguments) == 0 and "offload optimizer" in capsys.readouterr().out
    assert main([*arguments, "--adapter", "lora", "--rank", "64"]) == 0
    text = capsys.readouterr().out
    assert "frozen, 536.9 M of lora of rank 64 trained, on 2 GPUs" in text and "offload none" in text


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
    assert main([*arguments, "--rank", "8"]) == 2


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[]", "is a JSON object")])
def test_a_broken_deepspeed_file_is_named(tmp_path, capsys, text, said):
    path = tmp_path / "ds.json"
    path.write_text(text)
    arguments = ["--gpus", "8", "--gpu", "h100-80g", f"deepspeed={path}"]
    assert main(["plan", "--config", "configs/qwen2.5-7b.yaml", *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told and str(path) in told and "Traceback" not in told


def test_command_reads_a_runs_settings(capsys):
    arguments = ["--gpus", "32", "--gpu", "h100-80g", "--json"]
    assert main(["plan", "--config", "configs/qwen2.5-32b.yaml", *arguments, "batch.pack_len=4096"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"] == {
        "gpus": 32,
        "zero_stage": 3,
        "dtype": "bf16",
        "pack_len": 4096,
        "sequence_parallel": 1,
        "packs_per_step": 128,
        "checkpointing": "all",
        "offload": "none",
        "states": "fp32",
        "chosen": False,
    }
    assert any("ZeRO++" in part["what"] for part in plan["memory"]["always"])
