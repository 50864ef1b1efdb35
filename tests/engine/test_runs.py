"""Whole runs on 1, 2 and 4 ranks: resume, faults, weights, staleness, export.

One uninterrupted run of 12 steps is the yardstick. The others go on from its checkpoints, or meet a fault,
and must leave the same losses, weights and final parameters.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import TRAIN_CASES, case_file, launch, launch_soundly, read_jsonl, run_cases
from plain_backend import plain_run
from safetensors.torch import load_file
from small_runs import prepare_run, sample_settings
from transformers import AutoConfig, AutoModelForCausalLM

from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config
from versatune_ds.foundations.machine import git_commit

pytestmark = pytest.mark.slow

STEPS = 12
RESUME_AT = (2, 4, 6, 10)  # updates come every 4 steps: 4 is right after one, 2, 6 and 10 are in a window
MEASURED = (
    "step_s",
    "data_wait_s",
    "plan_s",
    "boundary_s",
    "update_s",
    "probe_s",
    "save_stall_s",
    "memory_gib",
    "unix_time_s",
    "eval_s",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared sample, a configuration that exercises everything in 12 steps, and room for runs."""
    folder = tmp_path_factory.mktemp("runs")
    raw = sample_settings(folder)
    raw["batch"] = {"pack_len": 192, "packs_per_step": 4}
    raw["weights"] |= {"every_n_steps": 4, "reference": dict.fromkeys(raw["domains"]["names"], 4.0)}
    raw["train"] = {"max_steps": STEPS}
    raw["evaluation"] = {"every_n_steps": 6}
    raw["checkpoint"] = {"every_n_steps": 2, "keep_last": 100}
    # from saved weights: ZeRO-3 draws random ones in another way than a model that is built whole
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(raw["model"]["source"]))
    model.save_pretrained(raw["model"]["source"])
    raw["model"]["weights"] = "pretrained"
    prepare_run(folder, raw)
    return folder


def case(folder: Path, name: str, *overrides: str, sabotage: str | None = None) -> dict:
    """A case for train_cases.py with its own run folder."""
    return {
        "config": str(folder / "config.yaml"),
        "overrides": [f"run.dir={folder / name}", *overrides],
        "sabotage": sabotage,
    }


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """Folder with the runs that need no earlier one; `whole` is the yardstick."""
    cases = [
        case(folder, "whole"),
        case(folder, "nan_once", "train.max_steps=8", sabotage="nan in step 4"),
        case(folder, "nan_when_due", "train.max_steps=8", sabotage="nan in step 3"),
        case(folder, "other_weights", sabotage="other weights on the last rank"),
        case(folder, "nan_always", sabotage="nan from step 4 on"),
        case(folder, "nan_gradient", sabotage="nan gradient from step 4 on"),
        case(
            folder,
            "nan_gradient_stage0",
            "deepspeed={zero_optimization: {stage: 0}}",
            "checkpoint.every_n_steps=100",
            sabotage="nan gradient from step 4 on",
        ),
        case(
            folder,
            "nan_gradient_fp32_sums",
            "model.dtype=bf16",
            "deepspeed={zero_optimization: {stage: 1}, data_types: {grad_accum_dtype: fp32}}",
            "checkpoint.every_n_steps=100",
            sabotage="nan gradient from step 4 on",
        ),
        case(folder, "asked_to_stop", "checkpoint.every_n_steps=100", sabotage="stop in step 4"),
        case(
            folder,
            "absent_domain",
            "train.max_steps=4",
            "domains.min_weight=0",
            "domains.initial={law: 0.5, medicine: 0.5, finance: 0, science: 0, code: 0, other: 0}",
        ),
        case(
            folder, "shadow", "train.max_steps=5", "weights.shadow=true", "checkpoint.export_shard_gb=0.002"
        ),
        case(folder, "probe", "train.max_steps=4", "weights.loss_source=probe", "weights.probe_samples=3"),
    ]
    run_cases(folder, 2, cases)
    return folder


@pytest.fixture(scope="module")
def resumed(finished) -> Path:
    """Copies of the yardstick cut back to a checkpoint, a killed run and a stopped one; all gone on with."""
    folder = finished
    killed = case_file(folder, [case(folder, "killed", sabotage="die in checkpoint 6")])
    assert any(rank.returncode != 0 for rank in launch(TRAIN_CASES, 2, killed))
    cases = [case(folder, "killed"), case(folder, "asked_to_stop", "checkpoint.every_n_steps=100")]
    for step in RESUME_AT:
        cut_back(folder / "whole", folder / f"from_{step}", step)
        cases.append(case(folder, f"from_{step}"))
    cut_back(folder / "nan_when_due", folder / "after_nan", 6)
    cases.append(case(folder, "after_nan", "train.max_steps=8"))
    damaged = folder / "damaged"
    cut_back(folder / "whole", damaged, 6)
    shard = next((damaged / "checkpoints" / "step-00000006").glob("*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    cases.append(case(folder, "damaged"))
    run_cases(folder, 2, cases)
    return folder


def cut_back(source: Path, target: Path, step: int) -> None:
    """A copy of a run without checkpoints after `step` but with all lines of its logs, as after a crash."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model"))
    for checkpoint in (target / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def lines(run: Path, name: str) -> list[dict]:
    """Lines of a log without what is measured with a clock."""

    def without_clock(line: dict) -> dict:
        return {k: v for k, v in line.items() if k not in MEASURED and not k.endswith("_per_s")}

    return [without_clock(line) for line in read_jsonl(run / name)]


def outcome(run: Path, rank: int = 0) -> dict | None:
    return json.loads((run / f"outcome_rank_{rank}.json").read_text())


@pytest.mark.parametrize(
    "name", [*(f"from_{step}" for step in RESUME_AT), "killed", "asked_to_stop", "damaged"]
)
def test_a_resumed_run_is_the_run_that_never_stopped(resumed, name):
    """Bit for bit: losses, weights, shares, held-out losses and final parameters."""
    whole, run = resumed / "whole", resumed / name
    for log in ("metrics.jsonl", "weights.jsonl", "eval.jsonl"):
        assert lines(run, log) == lines(whole, log)
    ours, expected = (load_file(path / "model" / "model.safetensors") for path in (run, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_a_kill_during_a_checkpoint_leaves_the_one_before(resumed):
    names = sorted(path.name for path in (resumed / "killed" / "checkpoints").glob("*step*"))
    assert names == [f"step-{step:08d}" for step in range(2, STEPS + 1, 2)]  # and no unfinished folder


def test_asked_to_stop_saves_at_once_and_goes_on_when_started_again(resumed):
    """One rank got the signal in step 5: all saved after it. Equality with the yardstick is tested above."""
    run = resumed / "asked_to_stop"
    assert outcome(run, 0) is None and outcome(run, 1) is None
    assert (run / "checkpoints" / "step-00000005").is_dir()


def test_a_run_on_two_ranks_with_zero_3_is_the_one_of_plain_pytorch(finished):
    """With a plain engine in DeepSpeed's place, which test_loop.py holds against training by hand."""
    plain = plain_run(finished / "config.yaml", f"run.dir={finished / 'plain'}")
    rates = [line["lr"] for line in read_jsonl(finished / "whole" / "metrics.jsonl")]
    assert rates == plain.backend.rates and len(set(rates)) == STEPS - 1  # the peak twice
    for log, keys in (
        ("metrics", ("step", "loss", "grad_norm", "domain_loss", "domain_supervised_tokens", "weights")),
        ("eval", ("step", "domain_loss", "domain_stderr", "domain_samples")),
        ("weights", ("step", "losses", "tokens", "samples", "after")),
    ):
        ours = read_jsonl(finished / "whole" / f"{log}.jsonl")
        for line, expected in zip(ours, plain.lines(log), strict=True):
            for key in keys:
                found, wanted = (numbers(lines[key]) for lines in (line, expected))
                assert found == pytest.approx(wanted, rel=2e-4, nan_ok=True), (log, line["step"], key)


def numbers(value):
    """A number, or numbers by domain, with NaN for what was not measured: approx takes no None."""
    if isinstance(value, dict):
        return {name: numbers(inner) for name, inner in value.items()}
    return math.nan if value is None else value


def test_loss_falls_and_weights_move(finished):
    metrics = read_jsonl(finished / "whole" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    first, last = metrics[0], metrics[-1]
    assert first["loss"] == pytest.approx(math.log(2048), abs=0.1)  # a random model knows nothing
    assert last["loss"] < first["loss"] - 0.5
    assert last["weights"] != first["weights"]
    evaluations = read_jsonl(finished / "whole" / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    before, after = evaluations[0]["domain_loss"], evaluations[-1]["domain_loss"]
    assert all(after[name] < before[name] for name in before)


def test_no_batch_is_drawn_from_old_weights(finished):
    """The weights of every step are those of the last update before it, to the last bit."""
    updates = read_jsonl(finished / "whole" / "weights.jsonl")
    assert [update["step"] for update in updates] == [0, 4, 8, 12]
    for line in read_jsonl(finished / "whole" / "metrics.jsonl"):
        in_force = [update for update in updates if update["step"] < line["step"]][-1]
        assert line["weights"] == in_force["after"]
    assert updates[1]["before"] != updates[1]["after"]


def test_window_losses_are_sums_over_its_steps(finished):
    """The loss of an update is the token-weighted mean of the steps of its window, not a mean of means."""
    metrics = read_jsonl(finished / "whole" / "metrics.jsonl")
    update = read_jsonl(finished / "whole" / "weights.jsonl")[1]
    for name, loss in update["losses"].items():
        steps = [(m["domain_loss"][name], m["domain_supervised_tokens"][name]) for m in metrics[:4]]
        tokens = sum(n for _, n in steps)
        assert tokens == update["tokens"][name]
        assert loss == pytest.approx(sum(value * n for value, n in steps if n) / tokens, rel=1e-9)


def test_nan_is_skipped_on_all_ranks_and_named(finished):
    run = finished / "nan_once"
    assert outcome(run, 0) is None and outcome(run, 1) is None
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in metrics if line["skipped"]] == [5]
    assert metrics[4]["loss"] is None
    assert all(math.isfinite(line["loss"]) for line in metrics if line["step"] != 5)
    (skipped,) = read_jsonl(run / "skipped_steps.jsonl")
    assert skipped["step"] == 5
    # one poisoned sample in each of the last rank's two packs, each with its file and line
    assert len(skipped["samples"]) == 2
    for sample in skipped["samples"]:
        path, _, line = sample["source"].rpartition(":")
        assert Path(path).stem == sample["domain"] and int(line) >= 1
    # the second update's window lacks the skipped step, and nothing is NaN
    update = read_jsonl(run / "weights.jsonl")[2]
    tokens = sum(line["supervised_tokens"] for line in metrics[4:8] if not line["skipped"])
    assert sum(update["tokens"].values()) == tokens
    assert sum(update["after"].values()) == pytest.approx(1)


def test_no_weights_move_on_a_skipped_step_and_its_window_goes_on(finished):
    """Step 4, after which an update is due, is skipped: the one after step 8 looks at all losses since 0."""
    run = finished / "nan_when_due"
    metrics, updates = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "weights.jsonl")
    assert [line["step"] for line in metrics if line["skipped"]] == [4]
    assert [line["skip_reason"] for line in metrics] == [None] * 3 + ["non-finite loss"] + [None] * 4
    assert [update["step"] for update in updates] == [0, 8]
    assert all(line["weights"] == updates[0]["after"] for line in metrics)
    for name, tokens in updates[1]["tokens"].items():
        assert tokens == sum(m["domain_supervised_tokens"][name] for m in metrics if not m["skipped"])
    assert updates[1]["after"] != updates[1]["before"]


def test_a_run_resumed_between_a_skipped_update_and_the_next_is_the_same(resumed):
    for log in ("metrics.jsonl", "weights.jsonl"):
        assert lines(resumed / "after_nan", log) == lines(resumed / "nan_when_due", log)
    ours, expected = (
        load_file(resumed / name / "model" / "model.safetensors") for name in ("after_nan", "nan_when_due")
    )
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_ranks_with_different_weights_all_end(finished):
    """One rank's weights differ in the last bit after the first update: no batch is drawn from them."""
    run = finished / "other_weights"
    for rank in (0, 1):
        failure = outcome(run, rank)
        assert failure["type"] == "VersaTuneError"
        assert "after step 4 the ranks hold different domain weights" in failure["text"]
    assert [update["step"] for update in read_jsonl(run / "weights.jsonl")] == [0]
    assert len(read_jsonl(run / "metrics.jsonl")) == 3


def test_nan_before_the_step_leaves_earlier_steps_alone(finished):
    whole, run = lines(finished / "whole", "metrics.jsonl"), lines(finished / "nan_once", "metrics.jsonl")
    for ours, expected in zip(run[:4], whole[:4], strict=True):
        for key in ("weights", "real_tokens", "achieved_shares"):
            assert ours[key] == expected[key]


def test_too_many_nan_steps_end_the_run(finished):
    run = finished / "nan_always"
    for rank in (0, 1):
        failure = outcome(run, rank)
        assert failure["type"] == "DivergenceError"
        assert "3 steps in a row" in failure["text"] and "skipped_steps.jsonl" in failure["text"]
    assert [line["step"] for line in read_jsonl(run / "skipped_steps.jsonl")] == [5, 6, 7]


@pytest.mark.parametrize("name", ["nan_gradient", "nan_gradient_stage0", "nan_gradient_fp32_sums"])
def test_nan_gradients_with_finite_losses_are_skipped_counted_and_end_the_run(finished, name):
    run = finished / name
    assert outcome(run, 0)["type"] == outcome(run, 1)["type"] == "DivergenceError"
    skipped = read_jsonl(run / "skipped_steps.jsonl")
    assert [line["step"] for line in skipped] == [5, 6, 7]
    assert {line["reason"] for line in skipped} == {"non-finite gradient"}
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [line["skipped"] for line in metrics] == [False] * 4 + [True] * 3
    assert all(math.isfinite(line["loss"]) for line in metrics)  # the parameters never became NaN
    assert [path.name for path in (run / "checkpoints").glob("step-*7")] == ["step-00000007"]


def test_absent_domains_keep_the_run_alive(finished):
    run = finished / "absent_domain"
    assert outcome(run) is None
    for line in read_jsonl(run / "metrics.jsonl"):
        assert line["domain_loss"]["code"] is None and line["domain_loss"]["law"] is not None
        assert line["achieved_shares"]["samples"]["code"] == 0
    update = read_jsonl(run / "weights.jsonl")[-1]
    assert any("code: absent" in reason for reason in update["reasons"])
    assert update["after"]["code"] == 0 and sum(update["after"].values()) == pytest.approx(1)


def test_shadow_computes_and_does_not_apply(finished):
    updates = read_jsonl(finished / "shadow" / "weights.jsonl")
    assert updates[1]["after"] != updates[1]["before"] and not updates[1]["applied"]
    metrics = read_jsonl(finished / "shadow" / "metrics.jsonl")
    assert all(line["weights"] == updates[0]["after"] for line in metrics)


def test_probe_measures_held_out_loss(finished):
    update = read_jsonl(finished / "probe" / "weights.jsonl")[1]
    assert update["loss_source"] == "probe"
    assert set(update["samples"].values()) == {3.0}
    metrics = read_jsonl(finished / "probe" / "metrics.jsonl")
    assert [line["probe_s"] > 0 for line in metrics] == [False] * 3 + [True]
    assert metrics[3]["probe_s"] <= metrics[3]["update_s"] <= metrics[3]["step_s"]
    assert all(line["probe_s"] == 0 for line in read_jsonl(finished / "whole" / "metrics.jsonl"))


def test_run_info_names_the_commit_of_the_code(finished):
    """None outside of a checkout; the tests may run in either."""
    commit = json.loads((finished / "whole" / "run.json").read_text())["commit"]
    assert (commit is None) == (git_commit() is None)
    assert commit is None or re.fullmatch("[0-9a-f]{12}(-dirty)?", commit)


def test_a_finished_run_leaves_no_shared_memory(finished):
    """DeepSpeed maps 66 MiB per rank for its CPU all-reduce and never removes the file."""
    script = finished / "group.py"
    script.write_text(
        "import os\n"
        "from versatune_ds.engine.backend.process_group import *\n"
        "start_process_group()\n"
        "assert shared_memory_buffer().exists()\n"
        "close_process_group()\n"
        "assert not shared_memory_buffer().exists()\n"
    )
    launch_soundly(script, 2, [])


@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks_trains_on_the_same_batches(finished, ranks):
    name = f"ranks_{ranks}"
    run_cases(finished, ranks, [case(finished, name)])
    ours, whole = (read_jsonl(finished / run / "metrics.jsonl") for run in (name, "whole"))
    for a, b in zip(ours, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["real_tokens"] == b["real_tokens"]
        assert a["domain_supervised_tokens"] == b["domain_supervised_tokens"]
        for domain in a["weights"]:
            assert a["weights"][domain] == pytest.approx(b["weights"][domain], rel=1e-5)


def test_exported_model_has_the_held_out_loss_of_the_run(finished):
    """AutoModelForCausalLM of the export, every held-out sample alone, gives the last line of eval.jsonl."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from versatune_ds.data.cache.prepare import open_caches

    run = finished / "whole"
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template
    reported = read_jsonl(run / "eval.jsonl")[-1]
    caches = open_caches(load_config(finished / "config.yaml"))["eval"]
    for cache in caches:
        total, count = 0.0, 0
        for i in range(len(cache)):
            tokens, mask = cache.sample(i)
            ids = torch.from_numpy(tokens.astype(np.int64))
            with torch.no_grad():
                logits = model(ids.unsqueeze(0)).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total += float(losses[torch.from_numpy(mask[1:].copy())].sum())
            count += int(mask[1:].sum())
        assert count == reported["domain_supervised_tokens"][cache.domain]
        assert total / count == pytest.approx(reported["domain_loss"][cache.domain], rel=1e-5)


def test_a_sharded_export_loads_whole(finished):
    """Shards of 2 MB: the same parameters as the checkpoint behind them, under the same names."""
    from transformers import AutoModelForCausalLM

    run = finished / "shadow"
    shards = sorted((run / "model").glob("model-*.safetensors"))
    assert len(shards) >= 3 and all(shard.stat().st_size < 2.1e6 for shard in shards)
    assert main(["export", str(run), "--out", str(finished / "shadow_export")]) == 0
    expected: dict = {}
    for shard in (finished / "shadow_export").glob("model-*.safetensors"):
        expected |= load_file(shard)
    loaded = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_export_verb_gives_the_same_weights(finished, capsys):
    run = finished / "whole"
    target = finished / "exported"
    assert main(["export", str(run), "--out", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    ours, expected = (load_file(path / "model.safetensors") for path in (target, run / "model"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    settings = json.loads((target / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 2  # </s>: what ended the turns that were trained on
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (target / name).read_text() == (run / "model" / name).read_text()
