"""Whole runs that meet a loss spike, rehearse their first step, run out of memory, or get a full disk."""

from __future__ import annotations

import json
import re

import pytest
import torch
from launched_runs import prepare_small_run
from launching import REPOSITORY, launch, read_jsonl, run_cases
from safetensors.torch import load_file
from small_disk import fill, small_disk

pytestmark = pytest.mark.slow

SABOTAGED = REPOSITORY / "tests" / "support" / "sabotaged_train.py"
SPIKES = ("train.max_steps=15", "train.spike_factor=1.5", "checkpoint.every_n_steps=100")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return prepare_small_run(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def finished(config):
    """Folder with the runs that end without taking the process group along."""

    def case(name: str, *overrides: str, sabotage: str | None = None) -> dict:
        folder = f"run.dir={config.parent / name}"
        return {"config": str(config), "overrides": [folder, *overrides], "sabotage": sabotage}

    cases = [
        case("spike", *SPIKES, sabotage="spike in step 12"),
        case("spikes", *SPIKES, sabotage="spike from step 12 on"),
        case("resumed", *SPIKES, sabotage="stop in step 11"),
        case("resumed", *SPIKES, sabotage="spike in step 12"),
    ]
    for what in ("other code", "damaged cache"):
        cases.append(case(what.replace(" ", "_"), sabotage=f"{what} on the last rank"))
    for stage in (1, 3):
        for rehearse in ("on", "off"):
            cases.append(
                case(
                    f"stage_{stage}_{rehearse}",
                    f"deepspeed={{zero_optimization: {{stage: {stage}}}}}",
                    f"train.rehearse={rehearse}",
                    "train.max_steps=3",
                    "batch.packs_per_step=4",
                    "checkpoint.export_at_end=true",
                )
            )
    run_cases(config.parent, 2, cases)
    return config.parent


def outcome(run, rank: int = 0) -> dict | None:
    return json.loads((run / f"outcome_rank_{rank}.json").read_text())


@pytest.mark.parametrize("name", ["spike", "resumed"])
def test_a_loss_spike_is_skipped_and_its_samples_are_written_down(finished, name):
    """Also when the losses before it were seen by an earlier process."""
    metrics = read_jsonl(finished / name / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 16))
    assert [line["step"] for line in metrics if line["skipped"]] == [13]
    (skipped,) = read_jsonl(finished / name / "skipped_steps.jsonl")
    assert skipped["step"] == 13 and skipped["reason"] == "loss spike"
    assert skipped["loss"] == metrics[12]["loss"] > 1.5 * skipped["median_loss"]
    losses = [sample["loss"] for sample in skipped["samples"]]
    assert losses == sorted(losses, reverse=True) and losses[0] > skipped["loss"]
    assert all(int(sample["source"].rpartition(":")[2]) >= 1 for sample in skipped["samples"])
    # the step left no trace: not in the parameters (the losses after it are as low as the ones before) ...
    assert all(line["loss"] < 1.1 * metrics[11]["loss"] for line in metrics[13:])
    # ... nor in what later spikes are measured by, nor in the window of the weights, open since step 12
    path = finished / name / "checkpoints" / "step-00000015" / "versatune_state.json"
    state = json.loads(path.read_text())
    applied = [line for line in metrics if not line["skipped"]]
    assert state["losses"] == [line["loss"] for line in applied]
    window = state["controller"]["window"]
    assert sum(window["tokens"]) == sum(line["supervised_tokens"] for line in applied if line["step"] > 12)


def test_too_many_spikes_end_the_run(finished):
    run = finished / "spikes"
    for rank in (0, 1):
        assert outcome(run, rank)["type"] == "DivergenceError"
        assert "3 steps in a row" in outcome(run, rank)["text"] and "loss spike" in outcome(run, rank)["text"]
    assert [line["step"] for line in read_jsonl(run / "skipped_steps.jsonl")] == [13, 14, 15]
    assert (run / "checkpoints" / "step-00000015").is_dir()


def test_other_code_on_one_rank_is_refused_on_all(finished):
    run = finished / "other_code"
    for rank in (0, 1):
        failure = outcome(run, rank)
        assert failure["type"] == "StateError"
        assert re.search(r"code of versatune_ds \(rank \d on .* has", failure["text"])
    assert not (run / "metrics.jsonl").exists()


def test_a_cache_that_is_damaged_on_one_node_ends_the_run_on_all(finished):
    for rank in (0, 1):
        failure = outcome(finished / "damaged_cache", rank)
        assert failure["type"] == "StateError" and "bin: damaged" in failure["text"]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_with_a_rehearsal_is_the_run_without(finished, stage):
    with_it, without = (finished / f"stage_{stage}_{rehearse}" for rehearse in ("on", "off"))
    ours, expected = (load_file(run / "model" / "model.safetensors") for run in (with_it, without))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    losses = [[line["loss"] for line in read_jsonl(run / "metrics.jsonl")] for run in (with_it, without)]
    norms = [[line["grad_norm"] for line in read_jsonl(run / "metrics.jsonl")] for run in (with_it, without)]
    assert losses[0] == losses[1] and norms[0] == norms[1]


def test_out_of_memory_is_found_in_the_rehearsal_and_told_on_all_ranks(config):
    run = config.parent / "no_memory"
    arguments = ["--config", str(config), f"run.dir={run}", "train.rehearse=on"]
    ranks = launch(SABOTAGED, 2, ["no memory", *arguments])
    assert [rank.returncode for rank in ranks] == [2, 2], ranks[0].stdout + ranks[1].stdout
    for rank in ranks:
        assert "out of memory in the rehearsal" in rank.stdout
        assert "batch.pack_len (now 192)" in rank.stdout and "activation_checkpointing" in rank.stdout
    assert "rank 1 (process" in ranks[0].stdout
    assert not (run / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_costs_log_lines_and_not_the_run(config, tmp_path):
    """Metrics are lost and counted; training goes on and, with room again, so does the log."""
    with small_disk(tmp_path / "disk", "4m") as disk:
        run = disk / "run"
        arguments = ["--config", str(config), f"run.dir={run}", "train.max_steps=4"]
        (full,) = launch(SABOTAGED, 1, ["full disk in step 1", *arguments])
        assert full.returncode == 0, full.stdout
        assert "metrics.jsonl: a line could not be written (No space left on device)" in full.stdout
        assert "lines in all could not be written" in full.stdout
        steps = [line["step"] for line in read_jsonl(run / "metrics.jsonl")]
        assert 1 in steps and 2 not in steps and steps == sorted(steps)
        (disk / "filler").unlink()


def test_a_full_disk_at_the_start_is_named(config, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "run").mkdir()
        fill(disk)
        arguments = ["--config", str(config), f"run.dir={disk / 'run'}", "train.max_steps=4"]
        (full,) = launch(SABOTAGED, 1, ["nothing", *arguments])
        assert full.returncode == 4
        assert "No space left on device" in full.stdout and "Traceback" not in full.stdout
