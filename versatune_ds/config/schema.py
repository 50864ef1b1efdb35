"""Every setting of a run: its type, unit and effect. With `engine/train.py` this file tells the story.

A run is one YAML file validated into `Config`. Sections are frozen; unknown keys are errors; a field without
a default is required. Settings are checked here once, alone and against each other, so that the rest of the
code can trust them.

What is not covered: the sections of the model (`config/model.py`), of the domains and their weights
(`config/weights.py`), of scored answers (`config/answers.py`), of `versatune-ds detect`
(`config/detection.py`) and of `search` (`config/search.py`), how the file is read and how errors are worded
(`config/load.py`), and what the DeepSpeed file may hold beyond the keys we own
(`engine/backend/deepspeed_config.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from versatune_ds.config.answers import Answers
from versatune_ds.config.detection import Detect
from versatune_ds.config.model import Adapter, Model
from versatune_ds.config.search import Search
from versatune_ds.config.secrets import find_secret
from versatune_ds.config.section import Place, Section
from versatune_ds.config.weights import Domains, Weights
from versatune_ds.foundations.text import command

DataFormat = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "pretokenized", "text"]
ChatTemplate = Literal["tokenizer", "chatml", "hermes", "alpaca", "llama2", "llama3"]
DEFAULT_COLLECTIVE_TIMEOUT_S = 1800.0


Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Run(Section):
    """Where the run lives and how it starts."""

    dir: Place
    """Run folder; everything the run writes lies in it."""
    seed: int = Field(0, ge=0)
    """Seed of sample order and of random initialisation."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the newest sound checkpoint in `dir`, or start when there is none. `never`: refuse
    to start in a folder that holds a run."""
    collective_timeout_s: float = Field(DEFAULT_COLLECTIVE_TIMEOUT_S, gt=0)
    """Seconds that ranks wait for each other, at the start and in every collective, before the run ends with
    an error. Longer than the slowest thing one rank does alone (writing a shard of the export, say)."""
    hang_timeout_s: float | None = Field(1200.0, ge=10)
    """End the run when a rank gives no sign of life, or makes no progress within a step or evaluation, for
    so many seconds. Longer than any step takes (the first one may compile); shorter than
    `collective_timeout_s`, or the ranks that wait fail before it is known for whom. None: never."""


class Source(Section):
    """One set of raw files (or a hub data set)."""

    path: str | list[str]
    """File, folder, glob, URL (s3://, hf://, ...), or a list of these; `hub:owner/name` (extra `hub`)."""
    domain: str | None = None
    """Domain of every row; give this or `domain_column`."""
    domain_column: str | None = None
    """Column that holds each row's domain name."""
    format: DataFormat = "auto"
    """Row schema; `auto` tells it from the columns, once per file. All but `text` (whole texts, all of which
    is trained on), which must be named."""
    columns: dict[str, str] = Field({})
    """Our column name -> the file's column name, e.g. `{prompt: question, completion: answer}`."""
    split: str = "train"
    """Split of a hub data set, or of a folder that holds several; `train+test` stands for both."""

    def data_problems(self) -> Iterator[str]:
        if (self.domain is None) == (self.domain_column is None):
            yield "give exactly one of `domain` and `domain_column`"
        if not self.path:
            yield "`path` is empty: give a file, folder, glob, list of these, or hub name"


class Data(Section):
    """From raw files to the token cache (`versatune-ds prepare`)."""

    train: list[Source] = Field(min_length=1)
    """Training sources."""
    eval: list[Source] = Field([])
    """Held-out sources; evaluated per domain, and the `probe` loss source."""
    chat_template: ChatTemplate = "tokenizer"
    """How conversations become text: the tokenizer's own template, or a built-in one for base models."""
    reasoning: Literal["keep", "mask", "drop"] = "keep"
    """Thoughts of the assistant: trained on, context only, or left out."""
    train_on: Literal["all_turns", "last_turn", "flagged"] = "all_turns"
    """Which assistant turns are trained on, but for those that flags in the data switch off: all, the last,
    or those only that a flag or weight switches on."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What to do with a sample longer than `batch.pack_len`; always counted and reported."""
    on_bad_row: Literal["error", "skip"] = "error"
    """`error`: stop at the first unusable row with its place. `skip`: write it to rejected.jsonl, go on."""
    cache_dir: Place = Path("cache")
    """Folder of token caches, shared by all runs."""
    cache_shared: bool = True
    """All nodes see one `cache_dir`: prepare once. False: every node has its own; prepare once on each."""
    num_workers: int | None = Field(None, ge=1)
    """Processes that tokenise; default: all cores."""


class BatchSettings(Section):
    """The global batch; the same on every number of ranks."""

    pack_len: int = Field(8192, ge=8)
    """Tokens in a pack. One pack is one micro-batch on one rank."""
    packs_per_step: int = Field(ge=1)
    """Packs in an optimizer step over all ranks; gradient accumulation is packs_per_step / ranks (times
    `sequence_parallel`)."""
    sequence_parallel: int = Field(1, ge=1)
    """Ranks that share a pack, each with a slice of its tokens (Ulysses); for packs too long for one GPU.
    Divides the ranks and the model's attention heads."""


class Optimizer(Section):
    """The optimizer and its schedule."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the matrices of the layers, AdamW for all else (docs/train.md)."""
    muon_lr: float | None = Field(None, gt=0)
    """Peak learning rate of those matrices; follows the same schedule."""
    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay; not applied to biases and norms."""
    states: Literal["fp32", "bf16_moments", "bf16_stochastic"] = "fp32"
    """What is held between steps: fp32 master weights and moments; fp32 master weights and bf16 moments; both
    in bf16, rounded at random. 12, 8 and 6 bytes a parameter (docs/train.md)."""
    schedule: Literal["cosine", "linear", "constant", "wsd_linear", "wsd_sqrt"] = "cosine"
    """Shape after warm-up. wsd: constant, then a decay in the last `decay_ratio` of all steps, linear or as
    1 - sqrt (docs/train.md says when)."""
    decay_ratio: float = Field(0.2, gt=0, le=1)
    """Share of all steps in which the wsd schedules decay; warm-up comes first."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of all steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate that a decay ends at, over `lr`."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this global norm; 0: never."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep a running average of the weights in host memory for `versatune-ds export --ema`: after each step
    decay x average + (1 - decay) x weights. ZeRO stage 1 to 3. None: none."""

    def problems(self) -> Iterator[str]:
        if (self.kind == "muon") != (self.muon_lr is not None):
            yield "kind: muon and muon_lr need each other"
        if self.kind == "muon" and self.max_grad_norm > 0:
            yield (
                "kind: muon: DeepSpeed would clip by the norm of Muon's updates, which says nothing of "
                "gradients; set max_grad_norm: 0"
            )
        if self.kind == "muon" and self.states != "fp32":
            yield f"kind: muon has states of its own; states {self.states} is for adamw"
        if self.ema_decay is not None and self.states == "bf16_stochastic":
            yield "ema_decay averages fp32 master weights, which states bf16_stochastic does not keep"
        is_given = self.decay_ratio != Optimizer.model_fields["decay_ratio"].default
        if is_given and not self.schedule.startswith("wsd"):
            yield f"decay_ratio is of no use: schedule is {self.schedule}, not wsd"


class Profile(Section):
    """Steps under torch's profiler (docs/metrics.md); they are slower than others."""

    steps: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    """The first and the last one, from 1; a trace holds every operator, so two or three say enough."""

    def problems(self) -> Iterator[str]:
        first, last = self.steps
        if not first <= last < first + 20:
            yield f"steps {first} to {last}: give first and last, at most 20 steps"


class Train(Section):
    """How long to train."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Steps are chosen so that the tokens trained on are this many times the tokens of all domains."""
    max_skipped_steps: int = Field(3, ge=1)
    """Abort after this many skipped steps in a row. A step is skipped on all ranks when its loss or gradient
    is NaN or infinite, or its loss is a spike."""
    spike_factor: float | None = Field(None, gt=1)
    """Skip a step whose loss is more than this many times the median of the last `spike_window` applied
    steps; 2 catches leaps only. None: never."""
    spike_window: int = Field(50, ge=10)
    """Applied steps whose losses the median is taken of; nothing is a spike before 10 are known."""
    rehearse: Literal["auto", "on", "off"] = "auto"
    """Before the first step, run forward and backward of a full pack and forget them: too little memory is
    found in seconds, with what to lower. `auto`: on CUDA."""
    profile: Profile | None = None
    """Write a trace of a few steps into the run folder, for the report and a trace viewer."""

    def problems(self) -> Iterator[str]:
        if (self.max_steps is None) == (self.epochs is None):
            yield "give exactly one of `max_steps` and `epochs`"
        if self.profile and self.max_steps is not None and self.profile.steps[1] > self.max_steps:
            yield f"profile.steps {list(self.profile.steps)} lie behind max_steps {self.max_steps}"


class Evaluation(Section):
    """Held-out losses per domain during training."""

    every_n_steps: int | None = Field(None, ge=1)
    """Steps between evaluations; also before the first and after the last step. None: never."""
    max_samples_per_domain: int | None = Field(None, ge=1)
    """Evaluate the first n samples of each domain only."""
    domains: list[str] | None = Field(None, min_length=1)
    """Evaluate these domains only; None: all that have held-out data."""
    select: str | Annotated[dict[str, Share], Field(min_length=1)] | None = None
    """Keep the checkpoint with the lowest held-out loss, which is then exported: `overall` (nats per
    supervised token over all evaluated domains), a domain, or the weights of domains in a mean, e.g.
    {law: 2, code: 1}. None: none is kept for its loss, and the last one is exported."""
    patience: int | None = Field(None, ge=1)
    """Early stopping: end the run after this many evaluations in a row whose loss (`select`, by default the
    overall one) is not below the lowest one so far. None: never."""
    generate: Answers | None = None
    """Let the model answer held-out samples at every evaluation, and score that. None: losses only."""

    def problems(self) -> Iterator[str]:
        for name in ("patience", "select"):
            if getattr(self, name) is not None and self.every_n_steps is None:
                yield f"{name} looks at evaluations: give every_n_steps"
        for key, named in (("select", self.selected), ("generate.score", self.asked)):
            if unknown := sorted(named - set(self.domains or named)):
                yield f"{key} names {', '.join(unknown)}, which `domains` leaves out"

    @property
    def asked(self) -> set[str]:
        """Domains that `generate.score` names."""
        return set() if self.generate is None else self.generate.named

    @property
    def selected(self) -> set[str]:
        """Domains that `select` names."""
        return {self.select} - {"overall"} if isinstance(self.select, str) else set(self.select or ())


class Checkpoint(Section):
    """When to save and what to keep."""

    every_n_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; the last step has one too. One is also written when the run is asked to stop
    or gives up after too many non-finite steps; None: only then."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints to keep; beside them the best one (`evaluation.select`)."""
    milestone_every_n_steps: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this are kept for ever."""
    max_lost_minutes: float | None = Field(None, gt=0)
    """Save so often that a crash costs at most this much training time, by measured step and save times;
    works beside `every_n_steps`. None: by steps only."""
    asynchronous: bool = False
    """Copy the state to host memory and write it while training goes on. Needs room for the
    shares of a host's ranks in its memory; without it a checkpoint is written while training waits."""
    export_at_end: bool = True
    """Write the finished model as a Hugging Face folder `model/` into the run folder."""
    export_shard_gb: float = Field(5.0, gt=0)
    """Largest safetensors shard in GB (10^9 bytes); bounds the host memory of an export."""


class Metrics(Section):
    """What is recorded beside metrics.jsonl, which is always written."""

    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra `tracking`)."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project (extra `tracking`); credentials from the environment."""
    mlflow_experiment: str | None = Field(None, min_length=1)
    """Log to this MLflow experiment (extra `mlflow`); MLFLOW_TRACKING_URI says where it is."""
    swanlab_project: str | None = Field(None, min_length=1)
    """Log to this SwanLab project (extra `swanlab`); SWANLAB_API_KEY and SWANLAB_MODE in the environment."""
    trackio_project: str | None = Field(None, min_length=1)
    """Log to this Trackio project (extra `trackio`): a folder of this machine, or TRACKIO_SPACE_ID."""
    peak_tflops: float | None = Field(None, gt=0)
    """Dense peak of one accelerator in TFLOP/s for MFU; default: known for common data-centre GPUs."""


class Reference(Section):
    """`versatune-ds reference`: a model trained on each domain alone, to see how low its loss can get."""

    model: Model | None = None
    """Model to train on each domain, usually a small one of the same family. None: the run's `model`. With
    another tokenizer than the run's, set `weights.loss_unit: byte`."""
    max_epochs: float = Field(10.0, gt=0)
    """Most passes over a domain's training data."""
    evaluations_per_epoch: int = Field(2, ge=1)
    """Held-out evaluations in a pass; also one before the first and one after the last step."""
    patience: int = Field(3, ge=1)
    """Stop training on a domain after this many evaluations in a row without a lower held-out loss."""
    adapter: Literal["auto", "off"] | Adapter = "auto"
    """Train an adapter of the model. `auto`: as that model is trained in a run, but LoRA for a pretrained one
    of more than 10^9 parameters. `off`: all of the model."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; None: `optimizer.lr`, times 10 for an adapter where the run has none."""
    packs_per_step: int | None = Field(None, ge=1)
    """Packs in an optimizer step over all ranks; None: `batch.packs_per_step`."""


@dataclass(frozen=True)
class Origin:
    """Where settings came from. No part of what they are: all origins are equal."""

    words: tuple[str, ...] = field(default=("--config", "CONFIG.yaml"), compare=False)
    """Of a command that reads them: `--config`, the file, overrides."""


class Config(Section):
    """A whole run."""

    _origin: Origin = PrivateAttr(Origin())

    run: Run
    model: Model
    data: Data
    domains: Domains
    weights: Weights = Weights()
    batch: BatchSettings
    optimizer: Optimizer = Optimizer()
    train: Train
    evaluation: Evaluation = Evaluation()
    reference: Reference = Reference()
    checkpoint: Checkpoint = Checkpoint()
    metrics: Metrics = Metrics()
    detect: Detect = Detect()
    search: Search | None = None
    """How `versatune-ds search` looks for a mixture; a run itself does nothing with it."""
    deepspeed: dict[str, Any] | Place = Field({})
    """DeepSpeed JSON file, or the same inline; without a `zero_optimization` key: ZeRO-3. Batch size,
    optimizer, precision and clipping come from this file's other sections and may not stand in it."""

    def command(self, verb: str) -> str:
        """A command of this program with these settings, to be pasted into a shell."""
        return command(verb, *self._origin.words)

    def like(self, other: Config) -> Config:
        """This one, said to come from where `other` came from."""
        self._origin = other._origin
        return self

    @model_validator(mode="before")
    @classmethod
    def _check_secrets(cls, values: Any) -> Any:
        """First of all: the texts of other errors repeat what they found."""
        place = find_secret(values)
        if place is not None:
            raise ValueError(
                f"{place} looks like a secret; settings are written to the run folder and to trackers. Take "
                "it out, and give HF_TOKEN or WANDB_API_KEY in the environment"
            )
        return values

    def finders(self) -> tuple[Callable[[], Iterator[str]], ...]:
        """What does not hold together between sections."""
        return (
            self.data_problems,
            self._problems_of_names,
            self._problems_of_evaluation,
            self._problems_of_training,
        )

    def data_problems(self) -> Iterator[str]:
        """Sources of domains that are not in the table."""
        known = self.domains.names
        for kind, sources in (("train", self.data.train), ("eval", self.data.eval)):
            for i, source in enumerate(sources):
                if source.domain is not None and source.domain not in known:
                    yield f"data.{kind}[{i}].domain is {source.domain!r}; domains.names has {known}"

    def _problems_of_evaluation(self) -> Iterator[str]:
        if not self.data.eval and self.weights.needs_probe:
            by_guard = "guard" if self.weights.guard is not None else f"strategy {self.weights.strategy}"
            asked = "loss_source probe" if self.weights.loss_source == "probe" else by_guard
            yield f"weights.{asked} measures held-out losses: give data.eval"
        if not self.data.eval and self.evaluation.every_n_steps is not None:
            yield "evaluation.every_n_steps is set: give data.eval"
        if self.evaluation.generate is not None and not self.data.eval:
            yield "evaluation.generate asks held-out samples: give data.eval"
        if self.evaluation.generate is not None and self.batch.sequence_parallel > 1:
            yield "evaluation.generate: ranks do not share the tokens of an answer; set sequence_parallel: 1"
        stops = self.evaluation.patience is not None
        if stops and self.evaluation.select is None and self.checkpoint.export_at_end:
            yield (
                "evaluation.patience: the last parameters, which would be exported, are not the best ones; "
                "set evaluation.select (overall, say), or checkpoint.export_at_end: false"
            )

    def _problems_of_names(self) -> Iterator[str]:
        """Every dict by domain names exactly the domains of the table."""
        by_domain: dict[str, Any] = {
            "domains.initial": self.domains.initial,
            "weights.reference": self.weights.reference,
            "weights.objective": self.weights.objective,
        }
        if isinstance(self.weights.schedule, list):
            for entry in self.weights.schedule:
                by_domain[f"weights.schedule at step {entry.step}"] = entry.weights
        names = set(self.domains.names)
        for what, values in by_domain.items():
            if isinstance(values, dict) and set(values) != names:
                missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
                yield f"{what}: missing domains {missing}, unknown domains {unknown}"
        evaluation, limit = self.evaluation, self.domains.max_epochs
        for key, known, named in (
            ("domains.max_epochs", "", set(limit) if isinstance(limit, dict) else set()),
            ("evaluation.domains", "", set(evaluation.domains or ())),
            ("evaluation.select", "overall, ", evaluation.selected),
            ("evaluation.generate.score", "", evaluation.asked),
            ("search.limits", "", set(self.search.limits if self.search else ())),
        ):
            if unknown := sorted(named - names):
                yield f"{key}: unknown domains {unknown}; known: {known}{sorted(names)}"
        if self.weights.target is not None and self.weights.target not in names:
            yield f"weights.target {self.weights.target!r}; known: {self.domains.names}"

    def _problems_of_training(self) -> Iterator[str]:
        limit = self.domains.max_epochs
        if isinstance(limit, dict) and any(not (math.isfinite(v) and v > 0) for v in limit.values()):
            yield "domains.max_epochs: every number of epochs must be > 0"
        if self.optimizer.states == "bf16_stochastic" and self.model.dtype != "bf16":
            yield f"optimizer.states bf16_stochastic needs model.dtype bf16, not {self.model.dtype}"
        if self.optimizer.kind == "muon" and self.model.adapter is not None:
            yield "optimizer.kind muon is for whole matrices, not for the factors of model.adapter; use adamw"
        if self.model.neftune_alpha is not None and self.batch.sequence_parallel > 1:
            yield "model.neftune_alpha: noise is for whole packs; set batch.sequence_parallel: 1"
        if self.model.kl_to_base is not None and self.batch.sequence_parallel > 1:
            yield "model.kl_to_base: the base sees whole samples; set batch.sequence_parallel: 1"
