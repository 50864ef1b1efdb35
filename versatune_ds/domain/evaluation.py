"""Held-out losses of a finished model, sample by sample, and what changed between two models.

Both models saw the same held-out samples, so their losses are compared pair by pair. With a_i and b_i the
summed token losses of sample i after and before, over the n samples of a domain:

    relative change   r = sum a_i / sum b_i - 1
    its variance      n / (n - 1) * sum (a_i - (1 + r) b_i)^2 / (sum b_i)^2
    forgetting        max(r, 0), the phi of docs/weights.md between the two models

(`probes/samples.rise_of`, with losses in the tokens' place). What both find hard cancels, so the interval is
far narrower than that of two unrelated means.

What is not covered: measuring (`engine/evaluate.py`) and drawing (`report/evaluation.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.domain.probes.samples import SampleLosses, rise_of
from versatune_ds.domain.reference import Fingerprints
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.foundations.errors import ConfigError, DataError
from versatune_ds.foundations.files import write_text_atomic
from versatune_ds.foundations.json_input import finite, read_object, require_format

EVALUATION_FORMAT = "versatune_ds.evaluation"
EVALUATION_VERSION = 1
Z_95 = 1.959964
"""Standard errors to either side of a 95 % interval."""
MAX_PERPLEXITY_LOSS = 700.0
"""exp() of more than this overflows float64."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BenchmarkScore:
    task: str
    name: str
    """What people call it."""
    domain: str
    metric: str
    value: float
    """Usually 0 .. 1."""
    stderr: float | None
    samples: int


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """Held-out losses of a model. Dicts are by domain, in the settings' order; domains without held-out data
    are absent."""

    model: str
    """Folder or hub name."""
    losses: Mapping[str, Array]
    """float64[n] by domain: summed token losses of each sample in nats, in cache order."""
    tokens: Mapping[str, Array]
    """float64[n] by domain: supervised tokens of each sample."""
    fingerprints: Fingerprints
    benchmarks: tuple[BenchmarkScore, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Facts for people."""
    answers: tuple[Mapping[str, Any], ...] = ()
    """What the model answered (`evaluation.generate`): as lines of answers.jsonl, without a step."""

    @property
    def names(self) -> list[str]:
        """Domains with held-out data."""
        return list(self.losses)

    def scores(self) -> dict[str, list[float]]:
        """Scores of answers by domain, without those that are not known."""
        return scores_by_domain((answer["domain"], answer["score"]) for answer in self.answers)

    @property
    def sums(self) -> DomainSums:
        """Sums by domain, in the order of `names`."""
        return SampleLosses(list(self.losses.values()), [self.tokens[name] for name in self.names]).sums

    def to_json(self) -> dict[str, Any]:
        sums = self.sums
        mean, stderr = sums.mean_loss(), sums.stderr()
        domains = {
            name: {
                "loss": finite(mean[i]),
                "stderr": finite(stderr[i]),
                "perplexity": perplexity(mean[i]),
                "supervised_tokens": int(sums.tokens[i]),
                "samples": int(sums.samples[i]),
            }
            for i, name in enumerate(self.names)
        }
        return {
            "format": EVALUATION_FORMAT,
            "version": EVALUATION_VERSION,
            "model": self.model,
            "loss_unit": "nats per supervised token",
            "domains": domains,
            "benchmarks": [asdict(score) for score in self.benchmarks],
            "answers": [dict(answer) for answer in self.answers],
            "fingerprints": {k: v for k, v in asdict(self.fingerprints).items() if v is not None},
            "provenance": dict(self.provenance),
            "sample_losses": {name: values.tolist() for name, values in self.losses.items()},
            "sample_tokens": {name: values.astype(int).tolist() for name, values in self.tokens.items()},
        }

    def write(self, path: Path) -> None:
        """Write evaluation.json; the long lists of samples stand on one line each."""
        content = self.to_json()
        samples = {key: content.pop(key) for key in ("sample_losses", "sample_tokens")}
        head = json.dumps(content, indent=2, allow_nan=False).removesuffix("\n}")
        lines = [f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in samples.items()]
        tail = ",\n".join(lines)
        write_text_atomic(path, f"{head},\n{tail}\n}}\n")

    @classmethod
    def read(cls, path: Path) -> ModelEvaluation:
        """Inverse of `write`; DataError: it is missing, cut short, or something else."""
        again = "make it again (the verb evaluate)"
        raw = read_object(path, "--against")
        require_format(raw, EVALUATION_FORMAT, EVALUATION_VERSION, path, again)
        try:
            known = {item.name for item in fields(Fingerprints)}
            prints = {str(k): str(v) for k, v in raw["fingerprints"].items() if k in known}
            return cls(
                model=str(raw["model"]),
                losses={str(k): np.array(v, dtype=np.float64) for k, v in raw["sample_losses"].items()},
                tokens={str(k): np.array(v, dtype=np.float64) for k, v in raw["sample_tokens"].items()},
                fingerprints=Fingerprints(**prints),
                benchmarks=tuple(BenchmarkScore(**score) for score in raw["benchmarks"]),
                answers=tuple(dict(answer) for answer in raw.get("answers", ())),
                provenance=dict(raw["provenance"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"damaged ({error!r}); {again}", path=path) from None


def interval_95(value: float, stderr: float | None) -> tuple[float, float] | None:
    return None if stderr is None else (value - Z_95 * stderr, value + Z_95 * stderr)


@dataclass(frozen=True)
class Change:
    domain: str
    before: float
    """Nats per supervised token."""
    after: float
    relative: float
    """(after - before) / before; negative is better."""
    stderr: float | None
    """Standard error of `relative`, over samples; None for fewer than two."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of `relative`."""
        return interval_95(self.relative, self.stderr)

    @property
    def forgetting(self) -> float:
        return max(self.relative, 0.0)


def compare(after: ModelEvaluation, before: ModelEvaluation) -> list[Change]:
    """Relative change of every domain's loss, sample by sample; ConfigError: measured on other tokens."""
    for kind in ("tokenizer", "data"):
        ours, theirs = getattr(after.fingerprints, kind), getattr(before.fingerprints, kind)
        if ours is not None and theirs is not None and ours != theirs:
            raise ConfigError(
                f"{after.model} and {before.model} were evaluated with another {kind}; evaluate both with "
                "the same settings to compare them"
            )
    if after.names != before.names or any(
        not np.array_equal(after.tokens[name], before.tokens[name]) for name in after.names
    ):
        raise ConfigError(
            f"{after.model} and {before.model} were evaluated on other samples (evaluation.domains, "
            "evaluation.max_samples_per_domain); evaluate both with the same settings to compare them"
        )
    return [_change(name, after, before) for name in after.names]


@dataclass(frozen=True)
class ScoreChange:
    """How the scores of one domain's answers changed, over the samples that both models have a score for."""

    domain: str
    before: float
    """Mean score, 0 to 1."""
    after: float
    stderr: float | None
    """Standard error of after - before, over samples; None for fewer than two."""
    better: int
    """Samples with a higher score than before."""
    worse: int
    samples: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of after - before."""
        return interval_95(self.after - self.before, self.stderr)


def compare_scores(after: ModelEvaluation, before: ModelEvaluation) -> list[ScoreChange]:
    """Change of every domain's scores, sample by sample; nothing where one of the two was not asked.

    Raises:
        ConfigError: the two were asked other samples.
    """
    if not after.answers or not before.answers:
        return []
    ours, theirs = (
        {(a["domain"], a["source"], a["reference"]): a["score"] for a in model.answers}
        for model in (after, before)
    )
    if ours.keys() != theirs.keys():
        raise ConfigError(
            f"{after.model} and {before.model} were asked other samples (evaluation.generate); evaluate both "
            "with the same settings to compare them"
        )
    changes = []
    for name in after.scores():
        both = [(ours[k], theirs[k]) for k in ours if k[0] == name and None not in (ours[k], theirs[k])]
        if not both:
            continue
        new, old = np.array(both, dtype=np.float64).T
        n, moved = len(both), new - old
        stderr = float(moved.std(ddof=1) / math.sqrt(n)) if n >= 2 else None
        counts = int((moved > 0).sum()), int((moved < 0).sum()), n
        changes.append(ScoreChange(name, float(old.mean()), float(new.mean()), stderr, *counts))
    return changes


def _change(name: str, after: ModelEvaluation, before: ModelEvaluation) -> Change:
    a, b, tokens = after.losses[name], before.losses[name], math.fsum(after.tokens[name])
    rise = rise_of(a, b, b)
    return Change(name, math.fsum(b) / tokens, math.fsum(a) / tokens, rise.value, finite(rise.stderr))


def scores_by_domain(scores: Iterable[tuple[str, float | None]]) -> dict[str, list[float]]:
    """Scores of each domain of (domain, score) pairs, without those that are None."""
    found: dict[str, list[float]] = {}
    for domain, score in scores:
        found.setdefault(domain, []).extend([] if score is None else [score])
    return found


def perplexity(loss: float | None) -> float | None:
    """exp(loss) for a loss in nats; None when the loss is not known or exp() would overflow."""
    if loss is None or not math.isfinite(loss) or loss > MAX_PERPLEXITY_LOSS:
        return None
    return math.exp(loss)
