"""Replaying the weights.jsonl of a run as a manual schedule."""

import json

import numpy as np
import pytest

from versatune_ds.config.weights import Domains, Weights
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.reference import load_reference
from versatune_ds.domain.replay import schedule_from_weights_jsonl
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError

TABLE = DomainTable(["law", "code"])
LINE = {"step": 0, "before": {"law": 0.5, "code": 0.5}, "after": {"law": 0.25, "code": 0.75}, "applied": True}


def controller_of(weights: Weights) -> WeightController:
    domains = Domains(names=list(TABLE.names), initial={"law": 0.7, "code": 0.3})
    reference = load_reference({"law": 1.0, "code": 1.0}, TABLE)
    return WeightController(TABLE, domains, weights, reference)


def weights_by_step(controller: WeightController, path=None) -> list[bytes]:
    """Weights that the batches of 40 steps are drawn with; writes weights.jsonl as a run does."""
    lines, used = [controller.initial_update()], []
    for step in range(40):
        used.append(controller.weights.tobytes())
        loss = np.random.default_rng(step).uniform(50, 400, 4)
        controller.observe(DomainSums.from_samples([0, 0, 1, 1], loss, [100] * 4, 2))
        if controller.due(step + 1):
            lines.append(controller.update(step + 1))
    if path is not None:
        path.write_text("".join(json.dumps(line.to_json()) + "\n" for line in lines))
    return used


@pytest.mark.parametrize("shadow", [False, True])
def test_replay_uses_the_weights_of_the_run_bit_for_bit(tmp_path, shadow):
    path = tmp_path / "weights.jsonl"
    weights = Weights(
        strategy="fostering", every_n_steps=7, reference={"law": 1.0, "code": 1.0}, shadow=shadow
    )
    original = weights_by_step(controller_of(weights), path)
    assert len(set(original)) == (1 if shadow else 6)
    assert weights_by_step(controller_of(Weights(strategy="manual", schedule=path))) == original


@pytest.mark.parametrize(
    ("second", "text"),
    [
        ('{"step": 1, ', r":2: not JSON .*half a last line"),
        ("", ":2: not JSON"),
        ('{"step": "\xe9"}', ":2: not JSON .*utf-8"),
        ("[]", ":2: needs `step`"),
        ('{"step": 5}', ":2: not a weight update: it needs before, after, applied"),
        (json.dumps({**LINE, "step": 5, "applied": "yes"}), ":2: not a weight update: it needs"),
        (json.dumps({**LINE, "step": 5, "after": {"law": 0.5, "code": 0.1}}), r":2: .*sum to 0\.6"),
        (json.dumps({**LINE, "step": -1}), ":2: step -1 follows step 0; steps must rise"),
        (json.dumps(LINE), ":2: step 0 follows step 0"),
    ],
)
def test_bad_line_is_named(tmp_path, second, text):
    path = tmp_path / "weights.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + second + "\n", encoding="latin-1")
    with pytest.raises(DataError, match=text):
        schedule_from_weights_jsonl(path)


def test_empty_file_and_other_domains_are_refused(tmp_path):
    path = tmp_path / "weights.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="holds no weight updates"):
        schedule_from_weights_jsonl(path)
    path.write_text(json.dumps({**LINE, "after": {"law": 0.5, "math": 0.5}}))
    with pytest.raises(ConfigError, match="unknown domain 'math'"):
        controller_of(Weights(strategy="manual", schedule=path))
