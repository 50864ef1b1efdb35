"""What one optimizer step and one evaluation leave behind: typed records and their JSON lines.

A record holds measured numbers only; rates and ratios (tokens per second, packing efficiency, perplexity)
are derived when its line is written, so that they cannot contradict the counts. Units stand in the names;
`docs/metrics.md` lists every key. JSON has no NaN or infinity: both become null.

What is not covered: the lines of weights.jsonl (`versatune_ds.domain`), where lines go (`sinks`), and
FLOPs (`throughput`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from versatune_ds.domain.evaluation import perplexity
from versatune_ds.foundations.json_input import finite

GIB = 1 << 30


def by_domain(
    names: Sequence[str], values: Sequence[Any] | Mapping[str, Any] | Any
) -> dict[str, float | None]:
    """Map domain names to floats; NaN and infinity become None.

    Args:
        names: the k domain names, in table order.
        values: k numbers in that order (list, tuple, numpy array or CPU tensor), or a mapping by name.
    """
    if isinstance(values, Mapping):
        return {name: finite(values.get(name)) for name in names}
    numbers = list(values)
    if len(numbers) != len(names):
        raise ValueError(f"{len(numbers)} values for {len(names)} domains")
    return {name: finite(value) for name, value in zip(names, numbers, strict=True)}


def clean(value: Any) -> Any:
    """Copy of a JSON-like value in which NaN and infinity are None and numpy scalars are plain numbers."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "tolist"):  # numpy scalar or array
        return clean(value.tolist())
    return finite(value)


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON without NaN, ending in a newline."""
    return json.dumps(clean(value), allow_nan=False, ensure_ascii=False) + "\n"


def ratio(numerator: float, denominator: float) -> float | None:
    """`numerator / denominator`; None when the denominator is not positive."""
    return numerator / denominator if denominator > 0 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all ranks. A line of metrics.jsonl.

    Times are wall-clock seconds of rank 0. Dictionaries are by domain name unless said otherwise.
    """

    step: int
    """Optimizer steps done, this one included: the first line has 1."""
    loss: float | None
    """Nats per supervised token; NaN or None where it was not finite (the step is skipped)."""
    lr: float
    """Learning rate that this step was taken with."""
    grad_norm: float | None
    """Global gradient norm before clipping; None when unknown."""
    skipped: bool = False
    """True: no rank changed its parameters."""
    skip_reason: str | None = None
    """Why: `non-finite loss`, `non-finite gradient`, `loss spike` or `fp16 overflow`; None if applied."""
    real_tokens: int
    """Tokens of samples in the global batch; padding is not counted."""
    slot_tokens: int
    """packs_per_step x pack_len: real tokens and padding."""
    supervised_tokens: int
    """Tokens of the global batch that have a label."""
    samples: int | None = None
    """Samples in the global batch."""
    domain_loss: Mapping[str, float | None]
    """Nats per supervised token of this step; None for a domain without supervised tokens in it."""
    domain_supervised_tokens: Mapping[str, int]
    """Supervised tokens of this step."""
    weighted_loss: float | None = None
    """What the step's gradient is of (with `model.objective` cross_entropy): sum of weight x loss over sum of
    weights, in nats; None for data without weights, where it is `loss`."""
    domain_weighted_loss: Mapping[str, float | None] | None = None
    """The same by domain."""
    weights: Mapping[str, float]
    """Domain weights this step's batch was planned with."""
    weight_unit: str = "samples"
    """What a weight is a share of: samples, tokens or supervised_tokens."""
    target_shares: Mapping[str, float]
    """The weights after `max_epochs` took exhausted domains out; equal to `weights` otherwise."""
    achieved_shares: Mapping[str, Mapping[str, float]]
    """Unit (samples, tokens, supervised_tokens) -> domain -> share of this step's batch."""
    cumulative_shares: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """The same over everything trained on since step 0."""
    epochs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Passes over each domain's data so far."""
    step_s: float
    """The whole step, from asking for its batch to its end; without evaluation and checkpoint."""
    data_wait_s: float
    """Part of `step_s`: waiting for the batch."""
    plan_s: float
    """Planning and collating this batch; runs beside the previous step, so not part of `step_s`."""
    boundary_s: float = 0.0
    """Part of `step_s`: the all-reduce of statistics and the ranks' agreement at the step's end."""
    update_s: float = 0.0
    """Part of `step_s`: the domain weight update; 0 when none was due."""
    probe_s: float = 0.0
    """Part of `update_s`: measuring the held-out probe; 0 with `loss_source: train`."""
    save_stall_s: float = 0.0
    """Standing still for checkpoints since the step before; not part of `step_s`."""
    memory_gib: float | None = None
    """Peak since the start of the process on rank 0, GiB: accelerator memory, or resident memory on CPU."""
    mfu: float | None = None
    """Model FLOPs utilisation, 0..1, useful work only; None when the peak of the hardware is unknown."""
    mfu_6n: float | None = None
    """The same with 6 N + 12 L H T for every slot token, as most papers count (`throughput`)."""
    base_kl: float | None = None
    """KL(base || model) in nats a compared token, before the step; None without `model.kl_to_base`."""
    domain_base_kl: Mapping[str, float | None] | None = None
    """The same by domain; None in it for a domain of which nothing was compared."""
    router_loss: float | None = None
    """Mixtures of experts: the routers' balance loss, mean over packs; even loads have a token's experts."""
    expert_load: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Share of all choices that went to each expert, by its number, mean over the layers."""
    expert_load_max: float | None = None
    """Load of the busiest expert of any layer over an even load."""
    unix_time_s: float = dataclasses.field(default_factory=time.time)
    """Seconds since 1970 when the record was made."""

    @property
    def real_tokens_per_s(self) -> float | None:
        """Real tokens per second over all ranks."""
        return ratio(self.real_tokens, self.step_s)

    def to_json(self) -> dict[str, Any]:
        """The metrics line as plain JSON types: all fields and the numbers derived from them."""
        line = dict(vars(self))
        line["real_tokens_per_s"] = self.real_tokens_per_s
        line["slot_tokens_per_s"] = ratio(self.slot_tokens, self.step_s)
        line["supervised_tokens_per_s"] = ratio(self.supervised_tokens, self.step_s)
        line["packing_efficiency"] = ratio(self.real_tokens, self.slot_tokens)
        result: dict[str, Any] = clean(line)
        return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation on held-out data, over all ranks. A line of eval.jsonl."""

    step: int
    """Optimizer steps done when it was made; 0 is before the first."""
    domain_loss: Mapping[str, float | None]
    """Nats per supervised token, by domain; None for a domain without held-out tokens."""
    domain_supervised_tokens: Mapping[str, int]
    """Supervised held-out tokens, by domain."""
    domain_samples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Held-out samples, by domain."""
    domain_stderr: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Standard error of `domain_loss`, by domain; None where it is not known (fewer than two samples)."""
    eval_s: float
    """Wall-clock seconds of the losses."""
    domain_score: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    """Mean score of the model's answers, 0 to 1, by domain that is asked (`evaluation.generate`)."""
    domain_answers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Scored answers, by domain that is asked."""
    generate_s: float | None = None
    """Wall-clock seconds of the answers; None: nothing was asked."""
    unix_time_s: float = dataclasses.field(default_factory=time.time)
    """Seconds since 1970 when the record was made."""

    @property
    def loss(self) -> float | None:
        """Nats per supervised token over all domains: sums added, divided once."""
        total, tokens = 0.0, 0
        for name, value in self.domain_loss.items():
            loss = finite(value)
            count = self.domain_supervised_tokens.get(name, 0)
            if loss is not None and count > 0:
                total, tokens = total + loss * count, tokens + count
        return ratio(total, tokens)

    def to_json(self) -> dict[str, Any]:
        """The eval line as plain JSON types: all fields, the overall loss and perplexities exp(loss)."""
        line = dict(vars(self))
        line["loss"] = self.loss
        line["domain_perplexity"] = {name: perplexity(loss) for name, loss in self.domain_loss.items()}
        result: dict[str, Any] = clean(line)
        return result
