"""Adapters: what is refused, how saved ones are combined, and whole runs that stop, move, and are evaluated.

Steps against peft in plain PyTorch are in `test_step.py`, exports and merges in `test_export.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import case_file, launch_soundly, read_jsonl, run_cases
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_runs import cut_back, small_run
from tiny_families import family_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from versatune_ds.config.model import Adapter, Model
from versatune_ds.engine.fingerprints import model_fingerprint
from versatune_ds.engine.model.adapters import add_adapter
from versatune_ds.engine.model.source import four_bits, load_architecture
from versatune_ds.engine.preflight.checks import check_adapter
from versatune_ds.foundations.errors import ConfigError

MEASURE = Path(__file__).parents[1] / "support" / "measure_cases.py"
TARGETS = ["q_proj", "down_proj"]
ZERO = {stage: f"deepspeed={{zero_optimization: {{stage: {stage}}}}}" for stage in (0, 1, 2, 3)}
STEPS, CUT = 4, 2


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **shape))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Adapters by peft: `two` and `three` (their ranks), `dora`, and `scaled` (rank-stabilised)."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds = {
        "two": {"r": 2, "lora_alpha": 5},
        "three": {"r": 3, "lora_alpha": 4},
        "dora": {"r": 2, "lora_alpha": 5, "use_dora": True},
        "scaled": {"r": 2, "lora_alpha": 5, "use_rslora": True},
        "elsewhere": {"r": 2, "lora_alpha": 5, "target_modules": ["up_proj"]},
    }
    for seed, (name, options) in enumerate(kinds.items()):
        config = LoraConfig(**{"target_modules": TARGETS, "init_lora_weights": False, **options})
        model = tiny_model()
        torch.manual_seed(seed)
        get_peft_model(model, config).save_pretrained(folder / name)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).view(2, 10)).logits


def test_several_adapters_are_added_up_exactly(saved):
    """The sum of their changes, each with its factor: 0.5 and -2 times what peft's layers add."""
    factors = {str(saved / "two"): 0.5, str(saved / "three"): -2.0}
    model = tiny_model()
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    for folder, factor in factors.items():
        alone = PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload().state_dict()
        for name, weight in tiny_model().state_dict().items():
            expected[name] += factor * (alone[name] - weight)
    add_adapter(model, Adapter(rank=5, alpha=3.0, targets=TARGETS, start_from=factors), seed=0)
    summed = tiny_model()
    summed.load_state_dict(expected)
    assert (logits(summed) - logits(tiny_model())).abs().max() > 0.03
    torch.testing.assert_close(logits(model), logits(summed), rtol=0, atol=1e-5)


def test_a_new_adapter_changes_nothing_yet_and_is_all_that_is_trained():
    model = tiny_model()
    add_adapter(model, Adapter(rank=2), seed=3)
    assert torch.equal(logits(model), logits(tiny_model()))
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    again = tiny_model()
    torch.rand(3)  # what another rank has drawn before
    add_adapter(again, Adapter(rank=2), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"start_from": "two"}, "rank 2; set model.adapter.rank: 2"),
        ({"start_from": {"two": 1, "three": 1}, "rank": 4}, "rank 2 \\+ 3; set model.adapter.rank: 5"),
        ({"start_from": "dora", "rank": 2}, "holds a dora adapter; model.adapter.kind is lora"),
        ({"start_from": {"dora": 0.5}, "rank": 2, "kind": "dora"}, "start from one, factor 1"),
        ({"start_from": "scaled", "rank": 2}, "LORA use_rslora; only LoRA and DoRA with one rank"),
        ({"start_from": {"two": 1, "elsewhere": 1}, "rank": 4}, "different layers: .* is not in all"),
        ({"start_from": "nowhere"}, "nowhere is not an adapter folder"),
        ({"start_from": "elsewhere", "rank": 2}, "up_proj.*set targets to those of the adapter"),
        ({"targets": ["q_projection"]}, "targets .*q_projection"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(saved, settings, text):
    given = settings.get("start_from")
    if isinstance(given, dict):
        settings = {**settings, "start_from": {str(saved / name): f for name, f in given.items()}}
    elif given is not None:
        settings = {**settings, "start_from": str(saved / given)}
    with pytest.raises(ConfigError, match=text):
        add_adapter(tiny_model(), Adapter(**{"targets": TARGETS, **settings}), seed=0)


def test_dropout_is_of_the_adapters_input_in_training_only():
    model = tiny_model()
    add_adapter(model, Adapter(rank=2, dropout=0.5), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    evaluated, trained = ([logits(model.train(mode)) for _ in range(2)] for mode in (False, True))
    assert torch.equal(*evaluated) and not torch.allclose(*trained, atol=1e-3)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_of_a_mixture_all_linear_is_its_attention(kind):
    """peft means routers and fused experts, too; routers would train without their balance loss."""
    model = family_model(kind)
    add_adapter(model, Adapter(rank=2), seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[4] for name in trained} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(".self_attn." in name for name in trained)
    if kind != "qwen2_moe":  # whose shared expert has a layer of that name
        older = "not found in the base model"  # peft before it mapped these names to experts
        with pytest.raises(ConfigError, match=rf"experts and routers of .* cannot have|{older}"):
            experts = ["w1", "w3"] if kind == "mixtral" else ["gate_proj", "up_proj"]
            add_adapter(family_model(kind), Adapter(targets=experts), seed=0)


def test_a_head_cannot_be_a_target():
    with pytest.raises(ValueError, match="lm_head cannot have an adapter"):
        Adapter(targets=["q_proj", "lm_head"])


def test_what_could_not_be_trained_here_is_refused_before_the_model():
    def check(device="cpu", stage=3, **model):
        check_adapter(Model(source="x", **model), {"zero_optimization": {"stage": stage}}, device)

    check()
    check(adapter=Adapter())
    with pytest.raises(ConfigError, match="written nowhere"):
        check(adapter=Adapter(), weights="random")
    with pytest.raises(ConfigError, match="qlora needs CUDA and bitsandbytes"):
        check(adapter=Adapter(kind="qlora"))


def test_in_4_bits_a_model_is_loaded_onto_the_rank_s_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert four_bits(Model(source="x", adapter=Adapter())) == {}
    options = four_bits(Model(source="x", dtype="bf16", adapter=Adapter(kind="qlora")))
    chosen = options["quantization_config"]
    assert options["device_map"] == {"": 3} and chosen.load_in_4bit
    assert (chosen.bnb_4bit_quant_type, chosen.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    # whole bytes: of a floating-point dtype DeepSpeed would convert the packed weights
    assert chosen.bnb_4bit_use_double_quant and chosen.bnb_4bit_quant_storage == torch.uint8


def test_an_adapter_folder_is_no_model(saved):
    with pytest.raises(ConfigError, match=r"holds an adapter.*export RUN --merge.*start_from"):
        load_architecture(Model(source=str(saved / "two")))


def test_a_combination_has_a_fingerprint_of_its_own(saved, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")

    def fingerprint(**settings) -> str:
        return model_fingerprint(Model(source=str(tmp_path / "base"), **settings))

    two = Adapter(rank=2, start_from=str(saved / "two"))
    three = Adapter(rank=2, start_from=str(saved / "dora"))
    assert len({fingerprint(), fingerprint(adapter=two), fingerprint(adapter=three)}) == 3


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run on 2 ranks under ZeRO-3; copies of it, cut back, that go on there, on 1 rank, to stage 2."""
    folder = tmp_path_factory.mktemp("runs")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 4},
        train={"max_steps": STEPS},
        evaluation={"every_n_steps": STEPS},
        optimizer={"lr": 1e-2},
        weights={"every_n_steps": 2},
        checkpoint={"every_n_steps": CUT, "keep_last": 100},
    )
    base = folder / "base"
    shutil.copytree(folder / "sample" / "model", base)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(base)
    model = {"source": str(base), "weights": "pretrained", "dtype": "fp32"}
    model["adapter"] = {"rank": 4, "targets": [*TARGETS, "v_proj"], "dropout": 0.1}

    def case(name: str, stage: int, *more: str) -> dict:
        chosen = [f"run.dir={folder / name}", f"model={json.dumps(model)}", ZERO[stage], *more]
        return {"config": str(config), "overrides": chosen, "sabotage": None, "dump": [CUT, STEPS]}

    run_cases(folder, 2, [case("whole", 3)])
    for name in ("again", "stage_2", "one_rank", "other_rank"):
        cut_back(folder / "whole", folder / name, CUT)
    run_cases(
        folder, 2, [case("again", 3), case("stage_2", 2), case("other_rank", 3, "model.adapter.rank=8")]
    )
    run_cases(folder, 1, [case("one_rank", 3)])
    target = {
        "what": "evaluate",
        "config": str(config),
        "overrides": case("whole", 0)["overrides"],
        "out": str(folder / "evaluated"),
        "model": str(folder / "whole"),
    }
    launch_soundly(MEASURE, 1, case_file(folder, [target]))
    return folder


def outcome(run: Path) -> dict | None:
    return json.loads((run / "outcome_rank_0.json").read_text())


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_and_no_weight_of_the_model(runs):
    for path in (runs / "whole" / "checkpoints" / f"step-{CUT:08d}").glob("*model_states.pt"):
        names = torch.load(path, weights_only=False)["module"].keys()
        assert names and all("lora_" in name for name in names)


@pytest.mark.slow
def test_a_run_says_how_much_of_the_model_it_trains(runs):
    info = json.loads((runs / "whole" / "run.json").read_text())
    trained = load_file(runs / "whole" / "model" / "adapter_model.safetensors")
    assert info["model"]["adapter"] == "lora, rank 4"
    assert info["num_parameters_trained"] == sum(t.numel() for t in trained.values()) < info["num_parameters"]


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_with_its_dropout(runs):
    assert outcome(runs / "again") is None
    assert (
        read_jsonl(runs / "again" / "eval.jsonl")[-1]["domain_loss"]
        == (read_jsonl(runs / "whole" / "eval.jsonl")[-1]["domain_loss"])
    )
    ours, whole = (load_file(runs / n / "model" / "adapter_model.safetensors") for n in ("again", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage_2", "one_rank"])
def test_a_run_begins_elsewhere_with_the_very_adapter(runs, name):
    """All weights and moments, frozen ones included; dropout then draws other numbers."""
    assert outcome(runs / name) is None
    before, loaded = (
        load_file(runs / run / f"whole_{CUT}_{what}.safetensors")
        for run, what in (("whole", "trained"), (name, "loaded"))
    )
    assert before.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in before.items())
    ours, whole = (read_jsonl(runs / run / "eval.jsonl")[-1]["domain_loss"] for run in (name, "whole"))
    assert ours == pytest.approx(whole, rel=0.02)


@pytest.mark.slow
def test_another_adapter_cannot_take_over_a_checkpoint(runs):
    error = outcome(runs / "other_rank")
    assert error["type"] == "StateError" and "model.adapter" in error["text"]


@pytest.mark.slow
def test_an_adapter_run_is_evaluated_as_the_run_itself_did(runs):
    """ZeRO-3 with the live model there, the exported adapter on its base model in one process here."""
    assert outcome(runs / "evaluated")["error"] is None
    found = json.loads((runs / "whole" / "evaluation.json").read_text())
    expected = read_jsonl(runs / "whole" / "eval.jsonl")[-1]["domain_loss"]
    assert {name: v["loss"] for name, v in found["domains"].items()} == pytest.approx(expected, rel=1e-5)
