"""Loss histories: reading them, and replaying them through the rules of a run."""

import json

import numpy as np
import pytest

from versatune_ds.config.weights import Domains, Weights
from versatune_ds.domain.controller import WeightController
from versatune_ds.domain.history import Losses, read_history, replay_history, sums_of
from versatune_ds.domain.reference import load_reference
from versatune_ds.domain.statistics import DomainSums
from versatune_ds.domain.table import DomainTable
from versatune_ds.foundations.errors import ConfigError, DataError

TABLE = DomainTable(["law", "code"])
REFERENCE = {"law": 1.0, "code": 1.2}


def controller_of(**weights) -> WeightController:
    settings = Weights(**({"strategy": "fostering", "reference": REFERENCE} | weights))
    domains = Domains(names=list(TABLE.names), initial={"law": 0.7, "code": 0.3})
    return WeightController(TABLE, domains, settings, load_reference(REFERENCE, TABLE))


def losses(step: int, **more) -> Losses:
    return Losses(**({"step": step, "losses": {}, "stderr": {}, "tokens": {}, "samples": {}} | more))


@pytest.mark.parametrize("tokens", [{}, {"law": 700.0, "code": 3.0}])
@pytest.mark.parametrize("samples", [{}, {"law": 2.0, "code": 31.0}])
def test_sums_have_the_recorded_means_and_errors(tokens, samples):
    update = losses(
        1,
        losses={"law": 2.37, "code": 1.9},
        stderr={"law": 0.01, "code": 0.4},
        tokens=tokens,
        samples=samples,
    )
    sums = sums_of(update, TABLE)
    np.testing.assert_allclose(sums.mean_loss(), [2.37, 1.9], rtol=1e-15)
    np.testing.assert_allclose(sums.stderr(), [0.01, 0.4], rtol=1e-8)
    if tokens:
        np.testing.assert_array_equal(sums.tokens, [700.0, 3.0])


def test_a_missing_loss_has_no_tokens_and_a_missing_error_none():
    sums = sums_of(losses(1, losses={"law": 2.0}), TABLE)
    np.testing.assert_array_equal(sums.tokens > 0, [True, False])
    assert np.isnan(sums.stderr()).all()
    # losses of weights.jsonl stand for an absent domain too: its tokens tell
    absent = sums_of(losses(1, losses={"law": 2.0}, tokens={"law": 0.0}), TABLE)
    assert absent.tokens[0] == absent.samples[0] == 0


@pytest.mark.parametrize(
    "weights",
    [
        {"sigma": 3.0, "noise_z": 1.5},
        {"form": "exponential"},
        {"strategy": "expansion", "target": "code", "epsilon": 0.1},
        {"strategy": "doremi"},
        {"strategy": "raw_loss"},
        {"update_z": 1.0},
    ],
)
def test_the_replay_of_a_run_with_its_own_settings_is_that_run(tmp_path, weights):
    controller = controller_of(**weights)
    records = [controller.initial_update()]
    rng = np.random.default_rng(0)
    for step in (10, 20, 30, 40):
        ids = [0, 0, 0, 1, 1] if step != 30 else [0, 0, 0]  # code is absent once
        loss = rng.uniform(150, 400, len(ids))
        controller.observe(DomainSums.from_samples(ids, loss, rng.integers(90, 130, len(ids)), 2))
        records.append(controller.update(step))
    path = tmp_path / "weights.jsonl"
    path.write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    replayed = replay_history(read_history(path), controller_of(**weights), TABLE)
    assert [r.step for r in replayed] == [0, 10, 20, 30, 40]
    for ours, theirs in zip(replayed, records, strict=True):
        assert ours.after == pytest.approx(theirs.after, rel=1e-9)
        assert ours.phi == pytest.approx(theirs.phi, rel=1e-6, abs=1e-12)
        assert ours.gate_open == theirs.gate_open and ours.refused == theirs.refused
        assert ours.tokens == theirs.tokens
    assert records[-1].after != records[0].after


@pytest.mark.parametrize(("said", "tokens"), [({}, 300), ({"refused": True}, 200),
                                              ({"loss_source": "probe"}, 200)])  # fmt: skip
def test_losses_that_the_next_line_replaces_count_once(tmp_path, said, tokens):
    """Two updates that the replay refuses, of 100 and 200 tokens."""
    path = tmp_path / "h.jsonl"
    lines = [
        {"step": step, "losses": {"law": 2.0, "code": 1.6}, "stderr": {"law": 1.0, "code": 1.0},
         "tokens": {"law": count, "code": count}, **said}
        for step, count in ((10, 100.0), (20, 200.0))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = replay_history(read_history(path), controller_of(update_z=9.0), TABLE)[-1]
    assert last.refused and last.before == last.after
    assert last.tokens == {"law": tokens, "code": tokens}


def test_by_hand(tmp_path):
    # gamma: law (2 - 1) / 2 = 0.5, code (1.6 - 1.2) / 1.6 = 0.25; 0.7 * 1.5 = 1.05 to 0.3 * 1.25 = 0.375
    path = tmp_path / "h.jsonl"
    path.write_text('{"step": 10, "losses": {"law": 2.0, "code": 1.6}}\n')
    replayed = replay_history(read_history(path), controller_of(), TABLE)
    assert replayed[-1].after == pytest.approx({"law": 1.05 / 1.425, "code": 0.375 / 1.425})


def test_domains_without_a_loss_and_the_line_of_step_0_are_passed_over(tmp_path):
    lines = tmp_path / "h.jsonl"
    lines.write_text(
        '{"step": 0, "losses": {"law": null, "code": null}}\n'
        '{"step": 5, "losses": {"law": 2.5, "code": null}, "stderr": {"law": 0.1}}\n'
        '{"step": 10, "losses": {"law": 2.25, "code": 1.5}}\n'
    )
    first, second = read_history(lines)
    assert vars(first) == vars(losses(5, losses={"law": 2.5}, stderr={"law": 0.1}))
    assert second.step == 10 and list(first.losses | second.losses) == ["law", "code"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 9, "losses": {"law": 2}}\n' * 2, ":2: step 9 follows step 9"),
        ('{"step": 0, "losses": {"law": 2}}', ":1: step 0: an update has step 1"),
        ('{"step": 5, "losses": {"law": NaN}}', ":1: losses of law is nan; expected a finite number >= 0"),
        ("", "holds no losses"),
        ('{"step": 5', ":1: not JSON .*half a last line"),
        ('{"step": 5, "loss": 2.0}', ":1: a line needs `losses`"),
        ('{"step": true, "losses": {"law": 2}}', ":1: needs `step`, a whole number"),
        ('{"step": 5, "losses": {"law": "2"}}', ":1: losses of law is '2'"),
        ('{"step": 5, "losses": {"law": 2}, "stderr": {"law": -1}}', ":1: stderr of law is -1"),
        (
            '{"step": 5, "losses": {"law": 2}, "tokens": [1]}',
            ":1: 'tokens' must be an object of finite numbers by domain",
        ),
    ],
)
def test_bad_history_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "h.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_history(path)


def test_missing_file_and_unknown_domain(tmp_path):
    with pytest.raises(DataError, match=r"no such file; give the weights.jsonl of a run"):
        read_history(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"unknown domain 'math'.*known: law, code"):
        replay_history([losses(5, losses={"math": 2.0})], controller_of(), TABLE)


def test_noise_cannot_be_subtracted_where_the_history_has_none(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"step": 10, "losses": {"law": 2.0, "code": 1.6}}\n')
    last = replay_history(read_history(path), controller_of(noise_z=1.0), TABLE)[-1]
    assert last.after == last.before
    assert any("no standard error" in reason for reason in last.reasons)
