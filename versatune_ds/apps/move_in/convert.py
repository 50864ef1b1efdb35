"""A configuration of LLaMA-Factory, axolotl or TRL as ours, with comments for what is not carried over.

The result does the same on the same data where it can; where ours differs by nature (packs, masks, weights of
domains), a comment above the section says how.

What is not covered: settings given on their command line, and any training but supervised fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from versatune_ds.apps.move_in.datasets import axolotl_data, llama_factory_data, trl_data
from versatune_ds.apps.move_in.foreign import Foreign
from versatune_ds.apps.move_in.training import IGNORED, LEFT, carry_batch, carry_model, carry_run, carry_zero
from versatune_ds.config.load import read_yaml, validate_config
from versatune_ds.config.schema import ChatTemplate, Config
from versatune_ds.foundations.errors import ConfigError

COMMON = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "gradient_accumulation_steps": 1,
}
"""Defaults of transformers' TrainingArguments."""
TEMPLATES: tuple[str, ...] = get_args(ChatTemplate)
WIDTH = 110


class ForeignTrainer(NamedTuple):
    name: str
    signs: tuple[str, ...]
    """Keys that only its settings have."""
    names: dict[str, str]
    """Its names for what others call differently."""
    defaults: dict[str, Any]
    length: str
    """Its key for the longest sample."""
    data: Callable[[Foreign], None]


LORA = {"lora_r": "lora_rank", "lora_target_modules": "lora_target"}
AXOLOTL = {
    **LORA,
    "base_model": "model_name_or_path",
    "tokenizer_config": "tokenizer_name_or_path",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "revision_of_model": "model_revision",
    "adapter": "adapter_kind",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "lora_model_dir": "adapter_name_or_path",
    "chat_template": "template",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "sequence_parallel_degree": "context_parallel_size",
}
TRAINERS = (
    ForeignTrainer(
        "axolotl",
        ("base_model",),
        AXOLOTL,
        COMMON
        | {"sequence_len": 512, "per_device_train_batch_size": 1, "num_train_epochs": 1}
        | {"lr_scheduler_type": "cosine", "lora_rank": 8, "learning_rate": 5e-5}
        | {"eval_strategy": "steps", "warmup_ratio": 0.03, "output_dir": "./model-out"},
        "sequence_len",
        axolotl_data,
    ),
    ForeignTrainer(
        "LLaMA-Factory",
        ("stage", "finetuning_type", "cutoff_len", "dataset_dir", "template"),
        {"finetuning_type": "adapter_kind", "early_stopping_steps": "early_stopping_patience"},
        COMMON
        | {"cutoff_len": 2048, "per_device_train_batch_size": 8, "num_train_epochs": 3, "output_dir": "saves"}
        | {"lr_scheduler_type": "linear", "lora_rank": 8, "learning_rate": 5e-5, "dataset_dir": "data"}
        | {"adapter_kind": "lora", "gradient_checkpointing": True, "save_steps": 500},
        "cutoff_len",
        llama_factory_data,
    ),
    ForeignTrainer(
        "TRL",
        ("dataset_name", "datasets", "dataset_mixture"),
        {**LORA, "max_seq_length": "max_length"},
        COMMON
        | {"max_length": 1024, "per_device_train_batch_size": 8, "num_train_epochs": 3, "bf16": True}
        | {"lr_scheduler_type": "linear", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05}
        | {"learning_rate": 2e-5, "dataset_train_split": "train", "dataset_test_split": "test"}
        | {"gradient_checkpointing": True, "save_steps": 500, "output_dir": "trainer_output"},
        "max_length",
        trl_data,
    ),
)


def import_config(path: Path, ranks: int) -> str:
    """Our settings as YAML text, valid, with comments.

    Args:
        path: their settings; paths in them are as seen from the current folder, as theirs are.
        ranks: GPUs that will train.

    Raises:
        ConfigError: it is of none of the three, or asks for another training than supervised fine-tuning.
    """
    values = read_yaml(path, "give the YAML or JSON file that the other trainer is started with")
    trainer = next((t for t in TRAINERS if any(sign in values for sign in t.signs)), None)
    if trainer is None:
        signs = "; ".join(f"{t.name}: {', '.join(t.signs)}" for t in TRAINERS)
        raise ConfigError(f"{path}: no settings of a trainer that is known here. Keys looked for: {signs}")
    given = Foreign(values, trainer.names, trainer.defaults)
    for key, usual in (("stage", "sft"), ("rl", None)):
        stage = given.take(key)
        if stage not in (None, usual):
            raise ConfigError(f"{path}: {key}: {stage}; only supervised fine-tuning is done here")
    _settle_adapter(given, trainer.name)
    template = str(given.take("template") or "tokenizer")
    trainer.data(given)
    if template not in (*TEMPLATES, "tokenizer_default"):
        given.leave(
            "template", template, "the tokenizer's own is taken; set data.chat_template for a base model"
        )
    given.set(
        "data",
        chat_template=template if template in TEMPLATES else "tokenizer",
        train_on="last_turn" if given.is_on("mask_history") else None,
    )
    workers = [
        given.take(key) for key in ("preprocessing_num_workers", "dataset_num_proc", "dataset_processes")
    ]
    given.set("data", num_workers=next(filter(None, workers), None))
    carry_model(given)
    carry_batch(given, trainer.length, ranks)
    carry_run(given, has_held_out="eval" in given.ours["data"])
    carry_zero(given)
    given.leave_all(LEFT)
    given.rest(IGNORED)
    validate_config(given.ours, str(path))
    return _text(given, f"From the {trainer.name} settings {path.name}, for {ranks} rank(s).")


def _settle_adapter(given: Foreign, trainer: str) -> None:
    """`adapter_kind` of all three, from what each says in its own way."""
    kind = given.take("adapter_kind")
    if trainer == "TRL":
        kind = "lora" if given.is_on("use_peft") else None
    if given.is_on("lora_target_linear"):
        given.put("lora_target", "all")
    if kind == "full":
        kind = None
    if kind not in (None, "lora", "qlora"):
        raise ConfigError(f"{kind}: only lora, qlora, dora and full fine-tuning are done here")
    if kind is not None:
        given.put("adapter_kind", kind)


def _text(given: Foreign, title: str) -> str:
    """Sections in the order of `Config`, with their notes, and what is left."""
    parts = [f"# {title}\n# Before training: versatune-ds prepare --config THIS_FILE\n"]
    for section in Config.model_fields:
        if value := given.ours.get(section):
            notes = "".join(f"# {note}\n" for note in given.notes.get(section, ()))
            dumped = yaml.safe_dump(
                {section: value}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=WIDTH
            )
            parts.append(notes + dumped)
    if given.left:
        lines = (f"# {key}: {value}   ({why})\n" for key, value, why in given.left)
        parts.append("# Not carried over:\n" + "".join(lines))
    return "\n".join(parts)
