"""Model, batch, optimizer, schedule, saving and ZeRO: what the three trainers call by Hugging Face's names.

LLaMA-Factory and TRL take transformers' TrainingArguments; axolotl's names are translated before
(`convert.py`).

What is not covered: data (`datasets.py`).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from versatune_ds.apps.move_in.foreign import NO_COUNTERPART, Foreign
from versatune_ds.config.load import read_yaml

PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
NEAREST = {
    "8bit|4bit|fp8": "AdamW with fp32 state is taken; optimizer.states bf16_moments, 8 bytes a parameter in "
    "place of 12, comes nearest",
    "paged": "AdamW is taken; offload_optimizer in the DeepSpeed section holds its state in host memory",
    "": "AdamW is taken",
}
"""What an optimizer's name holds -> what is nearest to it here."""
SCHEDULES = {
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
}
DECAYS = {"linear": "wsd_linear", "1-sqrt": "wsd_sqrt"}
OFF = (None, False, "false", "no")
ALWAYS = "samples are always packed here and never see each other"
KNOWN_BY_ITSELF = "chosen for the device by itself (docs/train.md)"
LEFT = {
    "trust_remote_code": "it runs code of the model's; read it, then set model.trust_remote_code",
    **dict.fromkeys(("padding_free", "pad_to_sequence_len"), ALWAYS),
    **dict.fromkeys(
        ("eval_sample_packing", "eval_packing", "group_by_length", "train_sampling_strategy"), ALWAYS
    ),
    **dict.fromkeys(("flash_attn", "attn_implementation", "flash_attention", "attention"), KNOWN_BY_ITSELF),
    **dict.fromkeys(("enable_liger_kernel", "use_liger_kernel", "tf32", "plugins"), KNOWN_BY_ITSELF),
    "model_revision": "name a folder with that revision in model.source",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id"), "only when asked: versatune-ds export RUN --push OWNER/NAME"
    ),
    "resume_from_checkpoint": "a run goes on from its own checkpoints by itself (run.resume)",
    "special_tokens": "the tokenizer's own are taken; change them in the model's folder",
    "load_in_8bit": "the frozen model is held in model.dtype",
}
IGNORED = (
    *("do_train", "do_eval", "overwrite_cache", "overwrite_output_dir", "plot_loss", "logging_steps"),
    *("logging_strategy", "logging_first_step", "log_level", "save_only_model", "remove_unused_columns"),
    *("gradient_checkpointing_kwargs", "dataset_prepared_path"),
    *("model_type", "tokenizer_type", "strict", "debug", "local_rank"),
    *("dataloader_num_workers", "logging_dir", "run_name", "bf16_full_eval", "wandb_name", "eval_on_start"),
    *("per_device_eval_batch_size", "eval_batch_size", "ddp_timeout", "dtype", "torch_dtype"),
)
"""Keys that change nothing about what is trained on which data."""


def carry_model(given: Foreign) -> None:
    """Model, precision, recomputation, adapter."""
    quantised = given.is_on("load_in_4bit") or given.take("quantization_bit") in (4, "4")
    precision = "bf16" if given.take("bf16") not in (None, False, "false", "no") else None
    pure = given.is_on("pure_bf16")
    recompute = None if given.is_on("disable_gradient_checkpointing") else _recompute(given)
    loss = given.take("loss_type")
    dtype = precision or ("bf16" if pure else "fp16" if given.is_on("fp16") else "fp32")
    given.set(
        "model",
        source=given.take("model_name_or_path"),
        tokenizer=given.take("tokenizer_name_or_path"),
        dtype=dtype,
        activation_checkpointing=recompute,
        router_aux_loss=given.take("router_aux_loss_coef"),
        objective="dft" if loss == "dft" or given.is_on("use_dft_loss") else None,
    )
    if loss not in (None, "nll", "chunked_nll", "dft"):
        given.leave("loss_type", loss, "cross-entropy is taken; model.objective says what else there is")
    if pure:
        given.note("model", "theirs trains bf16 weights (pure_bf16); here the optimizer keeps fp32 ones")
    kind = given.take("adapter_kind")
    lora = {key: given.take(f"lora_{key}") for key in ("rank", "alpha", "dropout", "target")}
    is_dora, start = given.is_on("use_dora"), given.take("adapter_name_or_path")
    if kind is None:
        return
    targets = lora["target"]
    if targets in ("all", "all-linear", None):
        targets = "all-linear"
    elif isinstance(targets, str):
        targets = [name.strip() for name in targets.split(",")]
    alpha = float(2 * lora["rank"] if lora["alpha"] is None else lora["alpha"])
    if given.is_on("use_rslora"):
        alpha *= math.sqrt(lora["rank"])
        given.note(
            "model",
            "theirs scales by alpha / sqrt(rank) (rslora), ours by alpha / rank: alpha is made up for it",
        )
    adapter = {
        "kind": "qlora" if quantised or kind == "qlora" else "dora" if is_dora else "lora",
        "rank": lora["rank"],
        "alpha": alpha,
        "dropout": lora["dropout"] or 0.0,
        "targets": targets,
    }
    given.set("model", adapter=adapter | ({"start_from": start} if start else {}))


def _recompute(given: Foreign) -> str | None:
    """`model.activation_checkpointing`: what they recompute in backward, or hold in host memory for it."""
    checkpoints, offloads = given.take("gradient_checkpointing"), given.take("activation_offloading")
    if checkpoints in ("offload", "offload_disk"):
        offloads = checkpoints
    if offloads in OFF:
        return "offload" if given.is_on("use_unsloth_gc") else "all" if checkpoints not in OFF else None
    if offloads != "hidden_states":
        given.note(
            "model",
            f"theirs moves activations (offloading: {offloads}); here each layer's input waits in host "
            "memory and the rest is recomputed",
        )
    return "offload"


def carry_batch(given: Foreign, length: str, ranks: int) -> None:
    """Packs and the ranks that share one, how long, optimizer and schedule.

    Args:
        length: their key for the longest sample.
        ranks: that will train.
    """
    samples = int(given.take("per_device_train_batch_size")) * int(given.take("gradient_accumulation_steps"))
    shared = int(given.take("context_parallel_size") or 1)
    if ranks % shared:
        why = f"batch.sequence_parallel must divide the ranks, here {ranks}; see --ranks"
        given.leave("context_parallel_size", shared, why)
        shared = 1
    given.set("batch", pack_len=int(given.take(length)), packs_per_step=samples * ranks // shared)
    given.note(
        "batch", f"theirs: {samples} rows of at most pack_len tokens a step and rank, here {ranks} rank(s)."
    )
    noise = given.take("neftune_noise_alpha")
    if shared > 1:
        given.set("batch", sequence_parallel=shared)
        given.note("batch", f"{shared} ranks share a pack and its rows")
        if noise is not None:
            given.leave("neftune_noise_alpha", noise, "noise is for whole packs, not for shared ones")
    else:
        given.set("model", neftune_alpha=noise)
    if not any(map(given.is_on, ("packing", "neat_packing", "sample_packing"))):
        given.note(
            "batch",
            "A pack holds several samples, theirs held one: the same memory, fewer and larger steps. For as "
            "many samples a step lower packs_per_step by what `versatune-ds inspect` says a pack holds.",
        )
    max_steps, epochs = given.take("max_steps"), given.take("num_train_epochs")
    total = int(max_steps or -1)
    given.set("train", **({"max_steps": total} if total > 0 else {"epochs": float(epochs)}))
    rate = float(given.take("learning_rate"))
    given.set(
        "optimizer",
        lr=rate,
        betas=[float(given.take("adam_beta1")), float(given.take("adam_beta2"))],
        eps=float(given.take("adam_epsilon")),
        weight_decay=float(given.take("weight_decay")),
        warmup_ratio=_warmup(given, total if total > 0 else None),
        max_grad_norm=float(given.take("max_grad_norm")),
    )
    given.set("optimizer", **_schedule(given, rate, total), **_optimizer(given, rate))


def _optimizer(given: Foreign, rate: float) -> dict[str, Any]:
    """Muon, where it can be; else AdamW with a line on what theirs was."""
    name, is_muon = given.take("optim"), given.is_on("use_muon")
    if name != "muon" and not is_muon:
        if name not in (None, *PLAIN_ADAMW):
            given.leave("optim", name, next(why for part, why in NEAREST.items() if re.search(part, name)))
        return {}
    config = Path(str(given.ours["model"].get("source"))) / "config.json"
    width = json.loads(config.read_text(encoding="utf-8")).get("hidden_size") if config.is_file() else None
    key = "use_muon" if is_muon else "optim"
    is_adapter = "adapter" in given.ours["model"]
    if is_adapter or width is None:
        why = "set kind: muon, max_grad_norm: 0, muon_lr: 0.2 x sqrt(hidden size) x learning rate"
        why = "Muon is for whole models" if is_adapter else why
        given.leave(key, is_muon or name, f"AdamW is taken: {why}")
        return {}
    given.note(
        "optimizer",
        "Muon: theirs steps by 0.2 sqrt(longer side) x learning rate, ours by muon_lr sqrt(rows / columns), "
        "at least muon_lr: the same where columns are the hidden size. Gradients are not clipped.",
    )
    return {"kind": "muon", "muon_lr": float(f"{0.2 * math.sqrt(width) * rate:.3g}"), "max_grad_norm": 0.0}


def _schedule(given: Foreign, rate: float, total: int) -> dict[str, Any]:
    """Shape, where its decay begins and ends.

    Args:
        rate: peak learning rate. total: steps, where they are known; else not above 0.
    """
    name, options = given.take("lr_scheduler_type"), given.take("lr_scheduler_kwargs") or {}
    options = dict(yaml.safe_load(options) if isinstance(options, str) else options)
    floors = [given.take("cosine_min_lr_ratio"), options.pop("min_lr_rate", None)]
    floors += [options.pop("min_lr_ratio", None), float(options.pop("min_lr", 0)) / rate]
    ours = {"schedule": SCHEDULES.get(name, "cosine"), "min_lr_ratio": next(filter(None, floors), None)}
    if name == "warmup_stable_decay":
        shape = options.pop("decay_type", "cosine")
        ours["schedule"] = DECAYS.get(shape, "wsd_linear")
        if shape not in DECAYS:
            why = "wsd_linear is taken; the other one is wsd_sqrt"
            given.leave("lr_scheduler_kwargs.decay_type", shape, why)
        if total > 0 and "num_decay_steps" in options:
            ours["decay_ratio"] = min(1.0, int(options.pop("num_decay_steps")) / total)
    elif name not in SCHEDULES:
        given.leave("lr_scheduler_type", name, "cosine is taken")
    reasons = {"num_decay_steps": "optimizer.decay_ratio is the share of all steps"}
    for key, value in options.items():
        given.leave(f"lr_scheduler_kwargs.{key}", value, reasons.get(key, NO_COUNTERPART))
    return ours


def _warmup(given: Foreign, total: int | None) -> float:
    """Share of all steps; transformers 5 reads a `warmup_steps` below 1 as such a share."""
    ratio, steps = given.take("warmup_ratio"), given.take("warmup_steps")
    if not steps:
        return float(ratio or 0)
    if float(steps) < 1:
        return float(steps)
    if total is not None:
        return min(1.0, float(steps) / total)
    given.leave(
        "warmup_steps",
        steps,
        "optimizer.warmup_ratio is the share of all steps; the first lines of a run say how many",
    )
    return float(ratio if ratio is not None else 0.03)


def carry_run(given: Foreign, *, has_held_out: bool) -> None:
    """Folder, seed, saving, evaluation (where data.eval is given), trackers."""
    given.set("run", dir=str(given.take("output_dir")), seed=int(given.take("seed")))
    saves, evaluates = _every(given, "save", "steps"), _every(given, "eval", "no")
    given.set("checkpoint", every_n_steps=saves, keep_last=given.take("save_total_limit"))
    patience, best = given.take("early_stopping_patience"), given.is_on("load_best_model_at_end")
    measure = _measure(given)
    if evaluates is not None and has_held_out:
        select = measure if best or patience else None  # what stops early has its best parameters exported
        given.set("evaluation", every_n_steps=evaluates, patience=patience or None, select=select)
    elif evaluates is not None or patience or best:
        given.note(
            "data",
            "Their evaluation (eval_steps) needs held-out rows in data.eval, then evaluation.every_n_steps.",
        )
    reported = given.take("report_to") or []
    trackers = {reported} if isinstance(reported, str) else set(reported)
    project = given.take("wandb_project")
    if "wandb" in trackers and project is None:
        given.leave("report_to", "wandb", "give the project in metrics.wandb_project")
    given.set(
        "metrics",
        wandb_project=project,
        mlflow_experiment=given.take("mlflow_experiment_name"),
        swanlab_project=given.take("swanlab_project") or ("swanlab" if given.is_on("use_swanlab") else None),
        trackio_project=given.take("trackio_project_name"),
    )
    if "tensorboard" in trackers or given.is_on("use_tensorboard"):
        given.set("metrics", tensorboard=True)
    for other in sorted(trackers - {"wandb", "tensorboard", "none", "all"}):
        given.leave("report_to", other, "see `metrics` in the settings for the trackers that there are")


def _measure(given: Foreign) -> str:
    """`evaluation.select`: the loss of all held-out data, or of the data set that they name."""
    metric, is_greater = str(given.take("metric_for_best_model") or "loss"), given.is_on("greater_is_better")
    name = metric.removeprefix("eval_").removesuffix("loss").removesuffix("_")
    held_out = [source.get("domain") for source in given.ours["data"].get("eval", ())]
    if metric.endswith("loss") and not is_greater and name in ("", *held_out):
        return name or "overall"
    value = f"{metric}{', the greatest' * is_greater}"
    given.leave("metric_for_best_model", value, "held-out losses select, the lowest; see evaluation.select")
    return "overall"


def _every(given: Foreign, what: str, strategy: str) -> int | None:
    """Steps between two of something; None where there is none or it is not said in steps."""
    steps, how = given.take(f"{what}_steps"), given.take(f"{what}_strategy") or strategy
    per_epoch = given.take(f"{what}s_per_epoch")
    if per_epoch is not None or how == "epoch":
        given.leave(
            f"{what}s_per_epoch",
            per_epoch or 1,
            f"counted in steps here: {what} every n steps; see `train` for n",
        )
    if how != "steps" or steps is None or float(steps) < 1:
        return None
    return int(steps)


def carry_zero(given: Foreign) -> None:
    """The DeepSpeed section: stage and offloading, nothing else of their file."""
    path, fsdp, fsdp_config = given.take("deepspeed"), given.take("fsdp"), given.take("fsdp_config")
    given.take("fsdp_version")
    zero: dict[str, Any] = {"stage": 2}
    if path:
        file, named = Path(str(path)), re.search(r"z(?:ero)?[-_]?([0-3])", Path(str(path)).name)
        theirs = read_yaml(file, "").get("zero_optimization", {}) if file.is_file() else {}
        stage: Any = theirs.get("stage", named[1] if named else 3)
        zero["stage"] = int(stage)
        for part in ("optimizer", "param"):
            if (theirs.get(f"offload_{part}") or {}).get("device") == "cpu":
                zero[f"offload_{part}"] = {"device": "cpu"}
        said = "its stage and offloading are kept" if theirs else "not found; the stage is that of its name"
        given.note("deepspeed", f"theirs: {path}; {said}")
    elif fsdp or fsdp_config:
        zero["stage"] = 3
        given.note("deepspeed", "theirs: FSDP, of which ZeRO-3 is the counterpart")
        if "offload" in str(fsdp) or (fsdp_config or {}).get("offload_params"):
            zero |= {f"offload_{part}": {"device": "cpu"} for part in ("optimizer", "param")}
    else:
        given.note("deepspeed", "theirs: plain data parallelism; ZeRO-2 is the same with less memory")
    if zero["stage"] == 0:
        zero["stage"] = 1
        given.note("deepspeed", "stage 0 would need model.dtype fp32")
    given.ours["deepspeed"] = {"zero_optimization": zero}
