"""The guard in whole runs that overfit: held domains leave the batches, and with `go_back` the model returns.

Who is held, and which checkpoints are kept, is in `tests/domain/test_guard.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import read_jsonl, run_cases
from plain_backend import plain_run
from small_runs import cut_back, small_run

STEPS, EVERY = 16, 2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three samples of each domain, again and again; evaluations see the losses that the guard sees."""
    return small_run(
        tmp_path_factory.mktemp("back"),
        rows=3,
        model={"dtype": "fp32"},
        batch={"pack_len": 192, "packs_per_step": 4},
        optimizer={"lr": 0.03, "eps": 1e-8},
        domains={"min_weight": 0},
        weights={
            "strategy": "constant",
            "every_n_steps": EVERY,
            "probe_samples": 4,
            "guard": {"probes": 2, "go_back": True},
        },
        train={"max_steps": STEPS},
        evaluation={"every_n_steps": EVERY, "max_samples_per_domain": 4},
        checkpoint={"every_n_steps": STEPS, "keep_last": 1, "export_at_end": False},
    )


def returns(folder: Path) -> dict[int, int]:
    """Step after which a domain was held -> the earliest best step of those that were."""
    found, held = {}, set()
    for line in read_jsonl(folder / "weights.jsonl")[1:]:
        now = {name for name, each in line["guard"].items() if each["held"]}
        if new := now - held:
            found[line["step"]] = min(line["guard"][name]["best_step"] for name in new)
        held = now
    return found


def require_returns(folder: Path) -> None:
    losses = {line["step"]: line["domain_loss"] for line in read_jsonl(folder / "eval.jsonl")}
    found = returns(folder)
    assert found and all(best < step for step, best in found.items())
    for step, best in found.items():  # evaluated after the return
        assert losses[step] == losses[best]
    apart = losses.keys() - {0} - found.keys()
    assert len({json.dumps(losses[step]) for step in apart}) == len(apart)


def test_batches_are_without_the_domains_that_it_holds(config):
    guarded = plain_run(config, f"run.dir={config.parent / 'held'}", "weights.guard={probes: 1}")
    metrics, held, updates = guarded.lines("metrics"), [set()], guarded.lines("weights")[1:]
    names = set(metrics[0]["weights"])
    for line in updates:
        following = [each["weights"] for each in metrics if 0 < each["step"] - line["step"] <= EVERY]
        assert len(following) == min(EVERY, STEPS - line["step"])
        assert all(weights == line["after"] for weights in following)
        held.append({name for name, found in line["guard"].items() if found["held"]})
        alarms = [alarm for alarm in line["alarms"] if alarm.startswith("overfitting")]
        assert len(alarms) == len(held[-1] - held[-2])
        if held[-1] < names:
            assert {name for name, weight in line["after"].items() if weight == 0.0} == held[-1]
    assert any(set() < some < names for some in held), held


def test_the_model_is_again_what_it_was_at_the_best_probe(config):
    run = plain_run(config, f"run.dir={config.parent / 'plain'}")
    require_returns(run.folder)
    assert run.backend.rates[-1] != run.backend.rates[0]  # the schedule goes on


def test_a_checkpoint_that_is_gone_is_told_and_training_goes_on(config, caplog):
    folder = config.parent / "gone"

    def remove(step, out):
        for path in (folder / "checkpoints").glob("step-*"):
            shutil.rmtree(path)
        return out

    run = plain_run(config, f"run.dir={folder}", disturb=remove)
    assert run.finished and f"the checkpoint of step {min(returns(folder).values())} is gone" in caplog.text


@pytest.mark.slow
def test_under_deepspeed_on_two_ranks_and_after_a_resume(config):
    folder = config.parent

    def case(name: str, stage: int) -> dict:
        zero = f"deepspeed={{zero_optimization: {{stage: {stage}}}}}"
        soon = "weights.guard={probes: 1, go_back: true}"  # whatever rounding does
        settings = [f"run.dir={folder / name}", zero, soon]
        return {"config": str(config), "overrides": settings, "sabotage": "nothing"}

    kept = "checkpoint.keep_last=100"
    whole = case("stage_2", 2)
    whole["overrides"].append(kept)
    run_cases(folder, 2, [case("stage_1", 1), whole, case("stage_3", 3)])
    for stage in (1, 2, 3):
        require_returns(folder / f"stage_{stage}")
    cut = min(returns(folder / "stage_2").values())
    cut_back(folder / "stage_2", folder / "resumed", cut)
    again = case("resumed", 2)
    again["overrides"].append(kept)
    run_cases(folder, 2, [again])
    for name in ("eval", "weights"):
        whole_lines, resumed = (read_jsonl(folder / run / f"{name}.jsonl") for run in ("stage_2", "resumed"))
        for line in [*whole_lines, *resumed]:
            for key in [key for key in line if key.endswith("_s")]:
                del line[key]
        assert resumed == whole_lines
