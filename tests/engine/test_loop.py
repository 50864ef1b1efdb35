"""The loop on one rank against plain PyTorch, with a backend in plain PyTorch (`plain_backend.py`).

Whole runs under DeepSpeed are compared with each other elsewhere; what is wrong in all of them is seen here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_backend import PlainRun, Steps, plain_run
from small_runs import cut_back, small_run

from versatune_ds.engine.backend.backend import Backend
from versatune_ds.foundations.errors import DivergenceError

STEPS, PEAK = 6, 0.2
RATES = [PEAK * share for share in (1 / 3, 2 / 3, 1, 1, 0.7, 0.4)]
"""Warm-up over ceil(0.34 * 6) = 3 steps, then linearly towards 0.1 of the peak, one step after the last."""
DECAY, EPS = 0.1, 1.0
"""eps 1 makes AdamW's steps proportional to the gradient: one of a wrong size would be seen."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(
        tmp_path_factory.mktemp("loop"),
        batch={"pack_len": 192, "packs_per_step": 3},
        optimizer={
            "lr": PEAK,
            "eps": EPS,
            "weight_decay": DECAY,
            "schedule": "linear",
            "warmup_ratio": 0.34,
            "min_lr_ratio": 0.1,
            "max_grad_norm": 0,
        },
        weights={"every_n_steps": 3, "reference": dict.fromkeys(NAMES, 4.0)},
        train={"max_steps": STEPS},
        evaluation={"every_n_steps": STEPS, "max_samples_per_domain": 5},
        checkpoint={"every_n_steps": 2, "keep_last": 100, "export_at_end": False},
    )


NAMES = ["law", "medicine", "finance", "science", "code", "other"]


def run(config: Path, name: str, *overrides: str, **options) -> PlainRun:
    return plain_run(config, f"run.dir={config.parent / name}", *overrides, **options)


@pytest.fixture(scope="module")
def whole(config: Path) -> PlainRun:
    return run(config, "whole")


@pytest.fixture(scope="module")
def expected(whole: PlainRun):
    """Before and after all steps by hand: held-out losses; and what every step found."""
    steps = Steps(whole, DECAY, EPS)

    def held_out() -> list[list[np.ndarray]]:
        with torch.no_grad():
            return [[steps.losses(cache, i).double().numpy() for i in range(5)] for cache in whole.held_out]

    before = held_out()
    found = [steps.step(samples, rate) for samples, rate in zip(whole.samples, RATES, strict=True)]
    return steps, found, before, held_out()


def same_parameters(ours: PlainRun, model: torch.nn.Module) -> None:
    theirs = dict(model.named_parameters())
    assert theirs.keys() == ours.parameters.keys()
    start = dict(ours.start.lm.named_parameters())
    for name, parameter in ours.parameters.items():
        assert not torch.equal(parameter, start[name])
        torch.testing.assert_close(
            parameter, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_the_loop_asks_for_is_what_the_protocol_says(whole):
    """The backend that all of this runs on has what `Backend` lists, and besides that what tests look at."""
    asked = {name for name in vars(Backend) if not name.startswith("_")}
    ours = {name for name in dir(whole.backend) if not name.startswith("_")}
    assert ours - asked == {"rates", "boundaries", "disturb", "optimizer", "max_norm"} and asked <= ours


def test_every_step_is_that_of_plain_pytorch(whole, expected):
    same_parameters(whole, expected[0].model)


def test_the_rate_of_the_schedule_is_applied_and_written_down(whole):
    assert whole.backend.rates == pytest.approx(RATES, rel=1e-12)
    assert [line["lr"] for line in whole.lines("metrics")] == whole.backend.rates


def test_a_step_ends_with_its_last_pack(whole):
    assert whole.backend.boundaries == [False, False, True] * STEPS


def test_what_is_written_down_is_what_plain_pytorch_finds(whole, expected):
    lines = whole.lines("metrics")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, found in zip(lines, expected[1], strict=True):
        assert line["loss"] == pytest.approx(found.sums.sum() / found.counts.sum(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(found.norm, rel=1e-4)
        assert list(line["domain_supervised_tokens"].values()) == found.counts.tolist()
        assert line["supervised_tokens"] == found.counts.sum()
        for name, total, count in zip(NAMES, found.sums, found.counts, strict=True):
            loss = pytest.approx(total / count, rel=1e-5) if count else None
            assert line["domain_loss"][name] == loss


def test_the_losses_that_move_the_weights_are_those_of_their_window(whole, expected):
    updates = whole.lines("weights")
    assert [update["step"] for update in updates] == [0, 3, 6]
    for update, window in zip(updates[1:], (expected[1][:3], expected[1][3:]), strict=True):
        sums, counts = sum(f.sums for f in window), sum(f.counts for f in window)
        assert list(update["losses"].values()) == pytest.approx(list(sums / counts), rel=1e-5)
        assert list(update["tokens"].values()) == counts.tolist()
    assert updates[1]["after"] != updates[1]["before"]
    weights = [line["weights"] for line in whole.lines("metrics")]
    assert weights == [updates[0]["after"]] * 3 + [updates[1]["after"]] * 3


def test_held_out_losses_are_means_over_tokens_before_and_after_training(whole, expected):
    lines = whole.lines("eval")
    assert [line["step"] for line in lines] == [0, STEPS]
    for line, domains in zip(lines, expected[2:], strict=True):
        for name, samples in zip(NAMES, domains, strict=True):
            tokens = np.concatenate(samples)
            assert line["domain_loss"][name] == pytest.approx(tokens.mean(), rel=1e-5)
            assert line["domain_supervised_tokens"][name] == len(tokens)
            assert line["domain_samples"][name] == 5
            # the sample is the unit of noise: n / (n - 1) sum (S_i - l n_i)^2 / (sum n_i)^2
            residuals = sum((s.sum() - tokens.mean() * len(s)) ** 2 for s in samples)
            stderr = math.sqrt(5 / 4 * residuals) / len(tokens)
            assert line["domain_stderr"][name] == pytest.approx(stderr, rel=1e-4)
        everything = np.concatenate([tokens for samples in domains for tokens in samples])
        assert line["loss"] == pytest.approx(everything.mean(), rel=1e-5)


def test_a_random_model_knows_nothing_and_learns(config):
    """At a rate that trains: all losses fall, from that of guessing."""
    learning = run(config, "learning", "optimizer.lr=3e-3", "optimizer.eps=1e-8", "train.max_steps=12")
    losses = [line["loss"] for line in learning.lines("metrics")]
    assert losses[0] == pytest.approx(math.log(2048), abs=0.1) and losses[-1] < losses[0] - 0.3
    before, *_, after = learning.lines("eval")
    assert all(after["domain_loss"][name] < before["domain_loss"][name] for name in NAMES)


def test_gradients_are_clipped_to_the_norm_of_the_settings(config, whole):
    clipped = run(config, "clipped", "optimizer.max_grad_norm=0.01", "train.max_steps=1")
    assert clipped.backend.max_norm == 0.01
    assert clipped.lines("metrics")[0]["grad_norm"] == whole.lines("metrics")[0]["grad_norm"] > 0.01


# --- steps that are skipped ---------------------------------------------------------------------------------


def leap(step: int):
    """In this step every loss is nine times as high, and the gradient with it."""

    def disturb(current: int, out):
        return out._replace(loss=9 * out.loss, sample_loss=9 * out.sample_loss) if current == step else out

    return disturb


def spoil_gradients(*steps: int):
    """In these steps losses are finite and gradients NaN."""

    def disturb(current: int, out):
        if current in steps:
            out.loss.register_hook(lambda gradient: gradient * float("nan"))
        return out

    return disturb


def spoil_losses(*steps: int):
    """In these steps one sample's loss is NaN."""

    def disturb(current: int, out):
        if current not in steps:
            return out
        spoiled = out.sample_loss.clone()
        spoiled[0] = float("nan")
        return out._replace(sample_loss=spoiled)

    return disturb


SKIPPED = {
    "loss spike": (leap(11), 11),
    "non-finite gradient": (spoil_gradients(11), 11),
    "non-finite loss": (spoil_losses(11), 11),
}


@pytest.fixture(scope="module", params=SKIPPED)
def skipping(request: pytest.FixtureRequest, config: Path) -> tuple[str, int, PlainRun]:
    """A run of 14 steps, the twelfth skipped. Updates come after steps 10 and, had it been applied, 20."""
    disturb, step = SKIPPED[request.param]
    overrides = (
        "train.max_steps=14",
        "train.spike_factor=2",
        "weights.every_n_steps=10",
        "batch.packs_per_step=1",
        "optimizer.schedule=constant",
        "optimizer.warmup_ratio=0",
        "evaluation={}",
    )
    return request.param, step, run(config, request.param.replace(" ", "_"), *overrides, disturb=disturb)


def test_a_skipped_step_changes_no_parameter(skipping):
    reason, skipped, ours = skipping
    assert [line["skip_reason"] for line in ours.lines("metrics") if line["skipped"]] == [reason]
    steps = Steps(ours, DECAY, EPS)
    for number, samples in enumerate(ours.samples):
        if number != skipped:
            steps.step(samples, PEAK)
    same_parameters(ours, steps.model)


def test_a_skipped_step_leaves_no_trace_in_the_window_and_the_spike_guard(skipping):
    """Nor in what a resumed run starts from."""
    _, _, ours = skipping
    state = json.loads((ours.folder / "checkpoints" / "step-00000014" / "versatune_state.json").read_text())
    applied = [line for line in ours.lines("metrics") if not line["skipped"]]
    assert len(applied) == 13
    assert state["losses"] == [line["loss"] for line in applied]
    window = state["controller"]["window"]
    assert sum(window["tokens"]) == sum(line["supervised_tokens"] for line in applied[10:])
    losses = sum(line["loss"] * line["supervised_tokens"] for line in applied[10:])
    assert sum(window["loss_sum"]) == pytest.approx(losses, rel=1e-12)


def test_skipped_steps_in_a_row_end_the_run_and_others_do_not(config):
    once = ("optimizer.lr=0.01", "train.max_skipped_steps=2", "evaluation={}")
    apart = run(config, "apart", *once, disturb=spoil_losses(1, 3))
    assert [line["skipped"] for line in apart.lines("metrics")] == [False, True, False, True, False, False]
    with pytest.raises(DivergenceError, match="2 steps in a row"):
        run(config, "in_a_row", *once, disturb=spoil_losses(1, 3, 4))
    checkpoints = [path.name for path in (config.parent / "in_a_row" / "checkpoints").glob("step-*")]
    assert sorted(checkpoints)[-1] == "step-00000005"


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_with_the_parameters_of_the_whole_one(config, whole, step):
    cut_back(whole.folder, config.parent / f"from_{step}", step)
    resumed = run(config, f"from_{step}")
    assert resumed.samples == whole.samples[step:]
    assert resumed.backend.rates == whole.backend.rates[step:]
    assert all(torch.equal(p, whole.parameters[name]) for name, p in resumed.parameters.items())
    for log, key in (("metrics", "loss"), ("weights", "after"), ("eval", "domain_loss")):
        assert [line[key] for line in resumed.lines(log)] == [line[key] for line in whole.lines(log)]
