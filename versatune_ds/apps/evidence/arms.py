"""One trainer of the comparison, in a process of its own: steps on the clock, then two under the profiler.

    python -m versatune_ds.apps.evidence.arms SPEC.json RESULT.json

All arms start from the same weights (the same constructor under the same seed and, on a GPU, the same ZeRO-3
partitioning), read the same samples, pack them to the same length with what the trainer itself has for that,
take the same number of packs a step, and use AdamW with the same settings. On a GPU both run under the same
DeepSpeed file; on a CPU, with one process, TRL runs without DeepSpeed, which is faster there, and ours with
ZeRO stage 0.

    ours          the product's step with domain statistics and moving weights
    trl-varlen    SFTTrainer with packing, our registered varlen attention, and Liger where it is installed
    trl-sdpa      SFTTrainer with packing and the attention that works everywhere

RESULT.json is written when the clock has stopped and again after the profile.

What is not covered: several ranks.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from versatune_ds.apps.evidence.cases import TrainingCase
from versatune_ds.apps.evidence.profiling import DeviceProfile
from versatune_ds.apps.evidence.samples import read_rows, samples_by_domain
from versatune_ds.foundations.constants import IGNORE_INDEX
from versatune_ds.foundations.files import write_json_atomic
from versatune_ds.foundations.machine import installed
from versatune_ds.observability.records import clean
from versatune_ds.observability.throughput import peak_memory_gib, reset_peak, synchronise

BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 1e-8, 0.0, 1.0
"""Of AdamW; the defaults of ours, given to TRL."""
PROFILED_STEPS = 2
WORKERS = {"cpu": 1, "cuda": 4}
"""Processes that load TRL's data."""


@dataclass(frozen=True, kw_only=True)
class ArmSpec(TrainingCase):
    arm: str
    model: str
    """Folder with a config.json."""
    data: str
    """File of `samples`."""
    zero: dict[str, Any]
    """`zero_optimization` of the DeepSpeed file."""
    seed: int = 7


class Counted:
    """What was trained on between two moments; sums stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._slots = 0
        self._sums: list[torch.Tensor] = []

    def add(self, inputs: dict[str, Any]) -> None:
        """A packed batch of TRL's collator: real tokens, predicted labels, squared sample lengths."""
        lengths = inputs["cu_seq_lens_q"].diff().long()
        labels = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        self._sums.append(torch.stack([lengths.sum(), labels, (lengths * lengths).sum()]))
        self._slots += inputs["input_ids"].numel()

    def totals(self) -> dict[str, float]:
        """Over everything that was added."""
        real, supervised, squares = torch.stack(self._sums).sum(0).tolist()
        return {"real": real, "slot": self._slots, "supervised": supervised, "sum_squared_lengths": squares}


def ours(spec: ArmSpec, write: Callable[[dict[str, Any]], None]) -> None:
    """The trainer's own step (`engine.train.run_step`)."""
    from versatune_ds.apps.bench.settings import DOMAINS, BenchSettings, bench_config
    from versatune_ds.apps.bench.trainer import Stepper, matmul_ceiling, open_run_on
    from versatune_ds.engine.backend.process_group import close_process_group, start_process_group

    device = start_process_group()
    with tempfile.TemporaryDirectory(prefix="versatune-evidence-") as folder:
        zero = Path(folder) / "deepspeed.json"
        zero.write_text(json.dumps({"zero_optimization": spec.zero}), encoding="utf-8")
        fixed = ("optimizer.warmup_ratio=0", "weights.every_n_steps=4")
        settings = BenchSettings(
            shape=spec.shape,
            pack_len=spec.pack_len,
            packs_per_rank=spec.packs,
            dtype=spec.dtype,
            activation_checkpointing=spec.recompute,
            deepspeed=str(zero),
            overrides=(f"run.seed={spec.seed}", f"optimizer.lr={spec.lr}", *fixed),
        )
        config = bench_config(settings, spec.model, Path(folder) / "run")
        ceiling = matmul_ceiling(config, settings, device)
        sources = samples_by_domain(Path(spec.data), len(DOMAINS))
        run = open_run_on(config, sources, device)
        stepper = Stepper(run)
        stepper.take(spec.warmup_steps)
        reset_peak(device)
        cpu_started = time.process_time()
        timed = stepper.take(spec.steps)
        cpu_s = time.process_time() - cpu_started
        records = run.sinks.records  # type: ignore[attr-defined]
        result: dict[str, Any] = {
            "losses": [record.loss for record in records],
            "seconds": timed.seconds,
            "cpu_s": cpu_s,
            "tokens": timed.totals(),
            "peak_gib": peak_memory_gib(),
            "matmul_ceiling": ceiling,
            "attention": run.backend.attention.implementation,
            "liger": run.backend.model.liger,
        }
        write(result)
        measured = DeviceProfile(device)
        measured.start()
        stepper.take(PROFILED_STEPS)
        write(result | {"profile": measured.stop(PROFILED_STEPS)})
        run.close()
    close_process_group()


def trl(spec: ArmSpec, write: Callable[[dict[str, Any]], None]) -> None:
    """TRL's SFTTrainer, set as its documentation advises for packed training."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer

    from versatune_ds.config.model import Model
    from versatune_ds.engine.model.attention import VARLEN, register_varlen
    from versatune_ds.engine.model.source import load_lm

    is_varlen = spec.arm == "trl-varlen"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    liger = installed(["liger-kernel"] if is_varlen else [])
    if device.type == "cuda":  # DeepSpeed asks for a launcher's variables
        from versatune_ds.engine.backend.process_group import set_only_rank

        set_only_rank()
    if is_varlen:
        register_varlen()
    last = spec.warmup_steps + spec.steps
    with tempfile.TemporaryDirectory(prefix="versatune-evidence-") as folder:
        arguments = trl_arguments(spec, folder, device, bool(liger))
        model = load_lm(
            Model(source=spec.model, weights="random", dtype=spec.dtype),  # type: ignore[arg-type]
            spec.seed,
            attn_implementation=VARLEN if is_varlen else "sdpa",
        )
        losses: list[float] = []
        counted = Counted()
        measured = DeviceProfile(device)

        class Trainer(SFTTrainer):  # type: ignore[misc]
            """Counts what it trains on."""

            def training_step(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
                if spec.warmup_steps <= self.state.global_step < last:
                    counted.add(inputs)
                return super().training_step(model, inputs, *more, **named)

        class Clock(TrainerCallback):  # type: ignore[misc]
            """Reads the clock between steps, and the losses."""

            def __init__(self) -> None:
                self.started, self.cpu_started = 0.0, 0.0
                self.result: dict[str, Any] = {}

            def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
                if state.global_step == spec.warmup_steps:
                    synchronise(device)
                    reset_peak(device)
                    self.started, self.cpu_started = time.perf_counter(), time.process_time()
                if state.global_step == last:
                    synchronise(device)
                    self.result["seconds"] = time.perf_counter() - self.started
                    self.result["cpu_s"] = time.process_time() - self.cpu_started
                    self.result["peak_gib"] = peak_memory_gib()
                    measured.start()
                if state.global_step == last + PROFILED_STEPS:
                    self.result["profile"] = measured.stop(PROFILED_STEPS)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
                if logs and "loss" in logs:
                    losses.append(float(logs["loss"]))
                if state.global_step == last:
                    write(self.so_far())

            def so_far(self) -> dict[str, Any]:
                """The result."""
                return {
                    **self.result,
                    "losses": losses[:last],
                    "tokens": counted.totals(),
                    "attention": model.config._attn_implementation,
                    "liger": f"liger-kernel {liger['liger-kernel']}" if liger else "off",
                }

        clock = Clock()
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(read_rows(Path(spec.data))[0]),
            processing_class=unused_tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
        optimizer = type(trainer.optimizer).__name__
        write(clock.so_far() | {"optimizer": optimizer})


def trl_arguments(spec: ArmSpec, folder: str, device: torch.device, liger: bool) -> Any:
    """`SFTConfig` of the same training; `liger`: with liger-kernel's layers."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        max_steps=spec.warmup_steps + spec.steps + PROFILED_STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=spec.packs,
        max_length=spec.pack_len,
        packing=True,
        packing_strategy="bfd",
        shuffle_dataset=True,
        learning_rate=spec.lr,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM,
        bf16=spec.dtype == "bf16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=spec.recompute == "all",
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=liger,
        dataloader_num_workers=WORKERS[device.type],
        dataloader_persistent_workers=True,
        dataloader_pin_memory=device.type == "cuda",
        deepspeed=trl_deepspeed(spec) if device.type == "cuda" else None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=spec.seed,
    )


def unused_tokenizer() -> Any:
    """The samples are tokens already, but TRL wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def trl_deepspeed(spec: ArmSpec) -> dict[str, Any]:
    """The same DeepSpeed file, with what transformers fills in."""
    return {
        "zero_optimization": spec.zero,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2**31,
    }


def main(spec_file: Path, result_file: Path) -> None:
    spec = ArmSpec(**json.loads(spec_file.read_text(encoding="utf-8")))
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)

    def write(result: dict[str, Any]) -> None:
        write_json_atomic(
            result_file, clean({"spec": dataclasses.asdict(spec), "threads": threads, **result})
        )

    (ours if spec.arm == "ours" else trl)(spec, write)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
