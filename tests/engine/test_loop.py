"""The loop on one rank against plain PyTorch, with a backend in plain PyTorch (`plain_backend.py`).

Whole runs under DeepSpeed are compared with each other elsewhere; what is wrong in all of them is seen here.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_backend import PlainRun, Steps, plain_run
from small_runs import cut_back, small_run

from versatune_ds.data.plan.planner import PlannerSettings
from versatune_ds.engine.backend.backend import Backend
from versatune_ds.engine.evaluate import HeldOut, evaluate_samples
from versatune_ds.engine.prepared import count_steps
from versatune_ds.foundations.errors import DivergenceError
from versatune_ds.report.report import write_report

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


def test_losses_of_single_held_out_samples_stand_in_cache_order(whole, expected):
    held_out = HeldOut(whole.held_out, 192, 5, 0, whole.backend.ranks)
    losses, sizes = evaluate_samples(whole.backend, held_out)
    for found, tokens, samples in zip(losses, sizes, expected[3], strict=True):
        assert found == pytest.approx([sample.sum() for sample in samples], rel=1e-5)
        assert tokens.tolist() == [len(sample) for sample in samples]


def test_the_model_trains_again_after_an_evaluation(whole):
    assert whole.backend.model.training


def test_shares_are_those_of_the_samples_trained_on(whole):
    """In all three units, of every step and of all so far; and passes over each domain's samples."""
    total = np.zeros((3, len(NAMES)))
    for line, samples in zip(whole.lines("metrics"), whole.samples, strict=True):
        counts = np.zeros((3, len(NAMES)))
        for domain, index in samples:
            tokens, mask = whole.train[domain].sample(index)
            counts[:, domain] += 1, len(tokens), mask[1:].sum()
        total += counts
        for key, found in (("achieved_shares", counts), ("cumulative_shares", total)):
            for unit, row in zip(("samples", "tokens", "supervised_tokens"), found, strict=True):
                assert list(line[key][unit].values()) == pytest.approx(list(row / row.sum()), rel=1e-12)
        epochs = [n / len(cache) for n, cache in zip(total[0], whole.train, strict=True)]
        assert list(line["epochs"].values()) == pytest.approx(epochs, rel=1e-12)
        assert (line["samples"], line["real_tokens"]) == (counts[0].sum(), counts[1].sum())


def test_epochs_are_counted_in_tokens():
    """Half of 1,000 tokens in steps of 2 packs of 64: 3.9."""
    settings = PlannerSettings(pack_len=64, packs_per_step=2)
    corpus = SimpleNamespace(num_tokens=(400, 600), num_samples=(4, 6))
    train = SimpleNamespace(max_steps=None, epochs=0.5)
    assert count_steps(SimpleNamespace(train=train), corpus, settings) == 4


def test_the_probe_takes_its_own_number_of_samples(config):
    probe = ("weights.loss_source=probe", "weights.probe_samples=3", "train.max_steps=3", "evaluation={}")
    update = run(config, "probe", *probe).lines("weights")[1]
    assert set(update["samples"].values()) == {3.0}


def test_the_last_step_is_evaluated_and_saved_whatever_the_interval(config):
    every_4 = ("evaluation.every_n_steps=4", "checkpoint.every_n_steps=4")
    ours = run(config, "intervals", *every_4)
    assert [line["step"] for line in ours.lines("eval")] == [0, 4, 6]
    assert checkpoints(ours.folder) == [4, 6]


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


def checkpoints(folder: Path) -> list[int]:
    """Steps of the finished ones."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def saved_state(folder: Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "versatune_state.json").read_text())


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
    state = saved_state(ours.folder, 14)
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
    assert checkpoints(config.parent / "in_a_row")[-1] == 5


def test_the_samples_to_blame_are_named(skipping):
    """The spoiled one of a loss that is not finite; the worst ones of a spike, by loss per token."""
    reason, skipped, ours = skipping
    (line,) = ours.lines("skipped_steps")
    assert (line["step"], line["reason"]) == (skipped + 1, reason)
    found = [(NAMES.index(sample["domain"]), sample["sample"]) for sample in line["samples"]]
    of_step = ours.samples[skipped]
    if reason == "non-finite gradient":
        assert found == []
    elif reason == "non-finite loss":
        assert found == of_step[:1]
    else:
        assert sorted(found) == sorted(of_step)
        sizes = [int(ours.train[domain].sample(index)[1][1:].sum()) for domain, index in found]
        losses = [sample["loss"] for sample in line["samples"]]
        assert losses == sorted(losses, reverse=True)
        assert np.dot(losses, sizes) / sum(sizes) == pytest.approx(line["loss"], rel=1e-6)
        assert line["loss"] == ours.lines("metrics")[skipped]["loss"]


def test_no_weights_move_on_a_skipped_step(config):
    """The update due after it waits for the next one, and looks at all losses since the one before."""
    ours = run(config, "due_and_skipped", "evaluation={}", disturb=spoil_losses(2))
    updates, lines = ours.lines("weights"), ours.lines("metrics")
    assert [update["step"] for update in updates] == [0, 6]
    applied = sum(line["supervised_tokens"] for line in lines if not line["skipped"])
    assert sum(updates[1]["tokens"].values()) == applied


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


def stop_in(step: int, *spoiled: int):
    """Asked to stop in the middle of this step; losses of others are spoiled."""
    spoil = spoil_losses(*spoiled)

    def disturb(current: int, out):
        if current == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return spoil(current, out)

    return disturb


def test_asked_to_stop_it_saves_and_goes_on_when_started_again(config, whole):
    overrides = ("checkpoint.every_n_steps=100",)
    stopped = run(config, "stopped", *overrides, disturb=stop_in(2))
    assert not stopped.finished and len(stopped.samples) == 3
    assert checkpoints(stopped.folder) == [3]
    resumed = run(config, "stopped", *overrides)
    assert resumed.finished and resumed.samples == whole.samples[3:]
    assert all(torch.equal(p, whole.parameters[name]) for name, p in resumed.parameters.items())


def test_a_resumed_run_knows_its_earlier_losses_and_skips(config):
    """A step skipped before and one after make two in a row."""
    overrides = ("train.max_skipped_steps=2", "evaluation={}")
    stopped = run(config, "skips", *overrides, disturb=stop_in(3, 3))
    losses = [line["loss"] for line in stopped.lines("metrics")][:3]
    with pytest.raises(DivergenceError, match="2 steps in a row"):
        run(config, "skips", *overrides, disturb=spoil_losses(0))
    assert saved_state(stopped.folder, 5)["losses"] == losses


def test_a_resumed_run_knows_its_best_evaluation(config):
    """At a rate at which it only gets worse."""
    overrides = ("optimizer.lr=1e3", "train.max_steps=6", "evaluation={every_n_steps: 1, patience: 5}")
    ours = run(config, "worse", *overrides)
    expected = saved_state(ours.folder, 6)["early_stopping"]
    assert expected["best_step"] < 4 and expected["waited"] == 5 - expected["best_step"]
    cut_back(ours.folder, config.parent / "worse_resumed", 4)
    resumed = run(config, "worse_resumed", *overrides)
    assert saved_state(resumed.folder, 6)["early_stopping"] == expected


def test_checkpoints_in_the_background_are_published_while_training_goes_on(config):
    """That of step 2 is written during step 3, and visible in step 4, before the next one is due."""
    folder = config.parent / "background"
    seen = []

    def disturb(step: int, out):
        deadline = time.monotonic() + 60
        while step == 2 and any(t.name == "versatune-checkpoint" for t in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if step == 3:
            seen.append(checkpoints(folder))
        return out

    run(config, "background", "checkpoint.asynchronous=true", "evaluation={}", disturb=disturb)
    assert seen == [[2]] * 3
    assert checkpoints(folder) == [2, 4, 6]


def test_a_profile_of_two_steps_has_the_phases_and_stands_in_the_report(config, whole):
    profiled = run(config, "profiled", "train.profile={steps: [2, 3]}", "train.max_steps=4")
    folder = profiled.folder / "profile"
    found = json.loads((folder / "profile.json").read_text())
    assert found["steps"] == [2, 3] and found["device"] == "cpu" and len(found["items"]) == 10
    calls = {phase["name"]: phase["calls"] for phase in found["phases"]}
    packs = 2 * 3
    assert [calls[name] for name in ("forward", "backward", "waiting for data")] == [packs, packs, 2]
    assert 0 < sum(item["seconds"] for item in found["items"]) <= found["wall_s"]
    assert any(item["name"].startswith("aten::") for item in found["items"])
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    named = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert named.count("forward") == packs and "optimizer step" in named

    page = write_report([profiled.folder], profiled.folder.parent / "page.html").read_text()
    assert 'href="profiled/profile/trace.json.gz"' in page and found["items"][9]["name"] in page
    assert "Profile" not in write_report([whole.folder], profiled.folder.parent / "other.html").read_text()


def test_a_profile_that_was_not_reached_is_missed_with_a_word(config, caplog):
    with caplog.at_level("WARNING", "versatune_ds"):
        short = run(config, "short", "train={epochs: 0.001, profile: {steps: [40, 41]}}")
    assert "did not get through the steps 40 to 41" in caplog.text
    assert not (short.folder / "profile").exists()
