"""Settings of LLaMA-Factory, axolotl and TRL become ours, say what is lost, and train.

The settings are after those that the projects publish, in our own words: LLaMA-Factory examples/train_full
and train_lora, axolotl examples/llama-3, TRL docs and the alignment handbook's recipes (read on 2026-11-27).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from launching import read_jsonl, run_cases
from small_runs import SMALL_MODEL

from versatune_ds.apps.move_in.convert import import_config
from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config
from versatune_ds.foundations.errors import ConfigError

LLAMA_FACTORY = """
model_name_or_path: {model}
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: full
deepspeed: examples/deepspeed/ds_z3_offload_config.json
dataset: law,code
dataset_dir: registry
template: qwen
cutoff_len: 192
max_samples: 500
overwrite_cache: true
preprocessing_num_workers: 2
output_dir: saves/full
save_steps: 500
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-3
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
use_unsloth_gc: true
use_dft_loss: true
neftune_noise_alpha: 5
use_muon: true
early_stopping_steps: 3
val_size: 0.1
hf_hub_token: hf_abcdefghijklmnopqrstuvwxyzabcdefgh
"""
REGISTRY = {
    "law": {
        "file_name": "../rows/law.json",
        "columns": {"prompt": "task", "response": "output", "history": "earlier"},
    },
    "code": {
        "file_name": "../rows/chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user"},
        "num_samples": 5,
    },
}
AXOLOTL = """
base_model: {model}
load_in_8bit: false
load_in_4bit: false
strict: false
chat_template: tokenizer_default
datasets:
  - path: rows/talks.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {{role: from, content: value}}
  - path: rows/own.jsonl
    type: {{field_instruction: ask, field_output: reply, format: "[INST] {{instruction}}"}}
    shards: 4
test_datasets:
  - {{path: rows/talks.jsonl, type: chat_template, split: train}}
dataset_prepared_path:
output_dir: ./outputs/lora
adapter: lora
lora_r: 4
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
sequence_len: 192
sample_packing: true
wandb_project:
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: warmup_stable_decay
lr_scheduler_kwargs: {{num_decay_steps: 20, decay_type: 1-sqrt, min_lr_ratio: 0.1}}
sequence_parallel_degree: 2
noisy_embedding_alpha: 5
learning_rate: 2e-3
fp16:
bf16: false
flash_attention: true
gradient_checkpointing: offload
warmup_steps: 10
evals_per_epoch: 4
eval_steps: 5
load_best_model_at_end: true
metric_for_best_model: eval_talks_loss
loss_watchdog_threshold: 5.0
fsdp: [full_shard, auto_wrap]
"""
TRL = """
model_name_or_path: {model}
attn_implementation: flash_attention_2
datasets:
  - {{path: rows/chats.jsonl, split: train, fraction: 0.75}}
  - {{path: rows/talks.jsonl, split: train, fraction: 0.25}}
max_length: 192
packing: true
use_peft: true
lora_r: 4
lora_target_modules: all-linear
use_rslora: true
learning_rate: 1.0e-3
lr_scheduler_type: warmup_stable_decay
lr_scheduler_kwargs: '{{"num_decay_steps": 2}}'
warmup_steps: 2
max_steps: 8
activation_offloading: true
neftune_noise_alpha: 5
per_device_train_batch_size: 2
gradient_checkpointing: true
bf16: false
loss_type: dft
report_to: [tensorboard, wandb]
push_to_hub: true
output_dir: out/trl
eval_strategy: "no"
"""
THEIRS = {"llama_factory": LLAMA_FACTORY, "axolotl": AXOLOTL, "trl": TRL}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as the other trainers see it: rows, a registry, a tiny model with a template, settings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from versatune_ds.apps.sample import unpack_sample

    folder = tmp_path_factory.mktemp("elsewhere")
    unpack_sample(folder / "sample")
    model = folder / "sample" / "model"
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + eos_token + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    shape = json.loads((model / "config.json").read_text()) | SMALL_MODEL
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(model)
    rows, registry = folder / "rows", folder / "registry"
    rows.mkdir()
    registry.mkdir()
    (registry / "dataset_info.json").write_text(json.dumps(REGISTRY))
    asked = [(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(60)]
    (rows / "law.json").write_text(json.dumps([{"task": q, "output": a} for q, a in asked[:20]]))
    lines = {
        "chats": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in asked
        ],
        "talks": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in asked
        ],
        "own": [{"ask": q, "reply": a} for q, a in asked[:30]],
    }
    for name, values in lines.items():
        (rows / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    for name, text in THEIRS.items():
        (folder / f"{name}.yaml").write_text(text.format(model=model))
    return folder


@pytest.fixture
def imported(place, monkeypatch):
    """Name -> (text, validated settings) on two ranks."""
    monkeypatch.chdir(place)

    def convert(name):
        text = import_config(place / f"{name}.yaml", 2)
        (place / f"{name}.ours.yaml").write_text(text)
        return text, load_config(place / f"{name}.ours.yaml")

    return convert


def test_llama_factory(imported):
    text, ours = imported("llama_factory")
    assert (ours.batch.pack_len, ours.batch.packs_per_step, ours.train.epochs) == (192, 4, 2.0)
    assert ours.model.dtype == "bf16" and ours.model.adapter is None
    assert ours.model.activation_checkpointing == "offload"
    assert (ours.model.objective, ours.model.neftune_alpha) == ("dft", 5.0)
    chosen = ours.optimizer  # 0.2 sqrt(32) 1e-3
    assert (chosen.kind, chosen.muon_lr, chosen.max_grad_norm, chosen.lr) == ("muon", 1.13e-3, 0.0, 1e-3)
    assert ours.optimizer.betas == (0.9, 0.999) and ours.optimizer.warmup_ratio == 0.1
    assert ours.domains.names == ["law", "code"] and ours.domains.initial == {"law": 0.25, "code": 0.75}
    law, code = ours.data.train
    assert (law.format, law.columns) == ("alpaca", {"instruction": "task", "history": "earlier"})
    assert (code.format, code.columns) == ("messages", {})
    assert ours.deepspeed == {"zero_optimization": {"stage": 3}} and ours.checkpoint.every_n_steps == 500
    left = [line.split(":")[0] for line in text.partition("# Not carried over:\n")[2].splitlines()]
    assert left == [
        "# dataset_info.json",
        "# val_size",
        "# template",
        "# trust_remote_code",
        "# max_samples",
        "# hf_hub_token",
    ]
    assert "code.num_samples: 5" in text and "hf_abc" not in text


def test_axolotl(imported):
    text, ours = imported("axolotl")
    assert ours.model.adapter.model_dump() == {
        "kind": "lora",
        "rank": 4,
        "alpha": 16.0,
        "dropout": 0.05,
        "targets": ["q_proj", "v_proj"],
        "start_from": None,
    }
    assert (ours.batch.packs_per_step, ours.batch.sequence_parallel) == (2, 2) and ours.optimizer.lr == 2e-3
    assert ours.optimizer.warmup_ratio == 0.03 and ours.model.activation_checkpointing == "offload"
    assert (ours.optimizer.schedule, ours.optimizer.min_lr_ratio) == ("wsd_sqrt", 0.1)
    assert ours.model.neftune_alpha is None
    talks, own = ours.data.train
    assert (talks.format, talks.columns) == ("sharegpt", {})
    assert (own.format, own.columns) == ("alpaca", {"instruction": "ask", "output": "reply"})
    assert [source.domain for source in ours.data.eval] == ["talks"]
    assert (ours.evaluation.every_n_steps, ours.evaluation.select) == (5, "talks")
    assert ours.deepspeed == {"zero_optimization": {"stage": 3}} and ours.data.chat_template == "tokenizer"
    for line in (
        "# datasets[1].shards: 4 ",
        "# datasets[1].type.format: [INST]",
        "# optimizer: adamw_bnb_8bit   (AdamW with fp32 state is taken; optimizer.states bf16_moments",
        "# lr_scheduler_kwargs.num_decay_steps: 20   (optimizer.decay_ratio is the share of all steps",
        "# noisy_embedding_alpha: 5   (noise is for whole packs",  # by its own name
        "# warmup_steps: 10 ",
        "# evals_per_epoch: 4 ",
        "# flash_attention: True ",
        "# loss_watchdog_threshold: 5.0   (there is no such setting here)",
    ):
        assert line in text


def test_an_early_stop_exports_its_best_parameters(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    theirs = yaml.safe_load(AXOLOTL.format(model=place / "sample" / "model"))
    del theirs["load_best_model_at_end"], theirs["metric_for_best_model"]
    theirs |= {"early_stopping_patience": 2, "eval_steps": 5, "test_datasets": [
        {"path": "rows/talks.jsonl", "type": "chat_template", "split": "train"}
    ]}  # fmt: skip
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    (tmp_path / "ours.yaml").write_text(import_config(tmp_path / "theirs.yaml", 2))
    found = load_config(tmp_path / "ours.yaml").evaluation
    assert (found.patience, found.select) == (2, "overall")


def test_trl(imported):
    text, ours = imported("trl")
    assert ours.domains.initial == {"chats": 0.75, "talks": 0.25}
    assert (ours.train.max_steps, ours.optimizer.warmup_ratio) == (8, 0.25)
    assert (ours.optimizer.schedule, ours.optimizer.decay_ratio) == ("wsd_linear", 0.25)
    assert ours.model.adapter.alpha == 32.0 * 2 and ours.model.adapter.targets == "all-linear"
    assert (ours.model.objective, ours.model.neftune_alpha) == ("dft", 5.0)
    assert ours.model.activation_checkpointing == "offload" and "(offloading: True)" in text
    assert ours.metrics.tensorboard and "# report_to: wandb " in text
    assert "# push_to_hub: True " in text and "loss_type" not in text
    assert "# lr_scheduler_kwargs.decay_type: cosine   (wsd_linear is taken" in text  # its default


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ("optimizer: paged_adamw_32bit", {}, "# optimizer: paged_adamw_32bit   (AdamW is taken; offload_opt"),
        ("optimizer: lion_32bit", {}, "# optimizer: lion_32bit   (AdamW is taken)"),
        ("optimizer: adamw_torch_fused", {}, None),
        ("optimizer: muon", {}, "# optimizer: muon   (AdamW is taken: set kind: muon"),  # no model here
        ("use_muon: true\nadapter: lora", {}, "# use_muon: True   (AdamW is taken: Muon is for whole models"),
        ("loss_type: orpo", {}, "# loss_type: orpo   (cross-entropy"),
        ("loss_type: chunked_nll", {"model": {"dtype": "fp32"}}, None),
        ("activation_offloading: hidden_states", {"model": {"activation_checkpointing": "offload"}}, None),
        ("context_parallel_size: 2", {"batch": {"sequence_parallel": 2, "packs_per_step": 2}}, None),
        ("context_parallel_size: 3", {"batch": {"packs_per_step": 4}}, "must divide the ranks, here 4"),
        ("lr_scheduler: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1.e-5}\nlearning_rate: 1.e-4",
         {"optimizer": {"schedule": "cosine", "min_lr_ratio": pytest.approx(0.1)}}, None),
        ("lr_scheduler: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 5, decay_type: linear}"
         "\nmax_steps: 20", {"optimizer": {"schedule": "wsd_linear", "decay_ratio": 0.25}}, None),
        ("lr_scheduler: polynomial\nlr_scheduler_kwargs: {power: 2}", {"optimizer": {"schedule": "cosine"}},
         "# lr_scheduler_kwargs.power: 2 "),
        ("load_best_model_at_end: true\nmetric_for_best_model: eval_bleu",
         {"evaluation": {"select": "overall"}}, "# metric_for_best_model: eval_bleu   (held-out losses"),
        ("metric_for_best_model: eval_loss\nearly_stopping_patience: 2\ngreater_is_better: true",
         {"evaluation": {"select": "overall", "patience": 2}}, "# metric_for_best_model: eval_loss, the gre"),
    ],
)  # fmt: skip
def test_one_setting_at_a_time(place, tmp_path, monkeypatch, theirs, ours, said):
    monkeypatch.chdir(place)
    rows = "[{path: rows/own.jsonl, type: alpaca}]"
    given = ["base_model: m", f"datasets: {rows}", f"test_datasets: {rows}", "eval_steps: 5", theirs]
    (tmp_path / "theirs.yaml").write_text("\n".join(given))
    text = import_config(tmp_path / "theirs.yaml", 4)
    found = yaml.safe_load(text)
    for section, keys in ours.items():
        assert {key: found[section][key] for key in keys} == keys
    left = text.partition("# Not carried over:")[2]
    assert said in text if said else not left


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, {"stage": 2}),
        (
            {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": None},
            {"stage": 3, "offload_param": {"device": "cpu"}},
        ),
        ({"stage": 0}, {"stage": 1}),
    ],
)
def test_stage_and_offloading_are_those_of_their_file(place, tmp_path, monkeypatch, file, expected):
    monkeypatch.chdir(place)
    lines = ["base_model: m", "datasets: [{path: rows/own.jsonl, type: alpaca}]"]
    if file is not None:
        (tmp_path / "ds.json").write_text(
            json.dumps({"zero_optimization": file, "bf16": {"enabled": "auto"}})
        )
        lines.append(f"deepspeed: {tmp_path / 'ds.json'}")
    (tmp_path / "theirs.yaml").write_text("\n".join(lines))
    ours = yaml.safe_load(import_config(tmp_path / "theirs.yaml", 1))
    assert ours["deepspeed"] == {"zero_optimization": expected}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stage: dpo\nmodel_name_or_path: m\ndataset: a", "stage: dpo; only supervised fine-tuning"),
        ("base_model: m\nrl: grpo", "rl: grpo; only supervised"),
        ("base_model: m\nadapter: llama-adapter\ndatasets: []", "llama-adapter: only lora"),
        ("model_name_or_path: m\ndataset: lav\ntemplate: x\ndataset_dir: registry", "did you mean 'law'"),
        (
            "model_name_or_path: m\ndataset: law\ntemplate: x\ndataset_dir: nowhere",
            "nowhere/dataset_info.json: no such",
        ),
        ("lr: 3", "no settings of a trainer that is known"),
    ],
)
def test_what_cannot_become_ours_is_refused(place, tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(place)
    (tmp_path / "theirs.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        import_config(tmp_path / "theirs.yaml", 1)


@pytest.mark.slow
def test_what_was_imported_trains(imported, place, monkeypatch, capsys):
    cases = []
    for name in THEIRS:
        capsys.readouterr()
        assert main(["import-config", f"{name}.yaml"]) == 0
        config = place / f"{name}.one.yaml"
        raw = yaml.safe_load(capsys.readouterr().out)
        raw["data"]["cache_dir"] = str(place / "cache")
        raw["run"]["dir"] = str(place / "runs" / name)
        for source in [*raw["data"]["train"], *raw["data"].get("eval", [])]:
            source["path"] = str(place / source["path"])  # ranks run elsewhere
        config.write_text(yaml.safe_dump(raw))
        assert main(["prepare", "--config", str(config)]) == 0
        raw["train"] = {"max_steps": 3}
        config.write_text(yaml.safe_dump(raw))
        cases.append({"config": str(config), "overrides": [], "sabotage": "leave uncompiled"})
    run_cases(place, 1, cases)
    for name in THEIRS:
        lines = read_jsonl(place / "runs" / name / "metrics.jsonl")
        assert len(lines) == 3 and all(line["grad_norm"] > 0 and not line["skipped"] for line in lines), name
        assert (place / "runs" / name / "model" / "tokenizer.json").is_file()
