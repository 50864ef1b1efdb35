"""A run that is killed twenty times is the run that never stopped.

Two ranks train; at a random moment one of them, or both, get SIGKILL: in a step, while a checkpoint is
written (every second life writes in the background), or while they start and load. A survivor that trains has
to leave by itself; one that is still starting is ended, as launchers do. Then the same command is started
again. In the end parameters, domain weights and the trained samples equal those of a run that was left alone.
What was trained on is noted by each rank as it trains, not derived from plans.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from launching import (
    TRAIN_CASES,
    Ranks,
    case_file,
    read_jsonl,
    run_cases,
    start_ranks,
    tails,
    wait_for_ranks,
)
from safetensors.torch import load_file
from small_runs import small_run

pytestmark = pytest.mark.slow

KILLS, STEPS, EVERY = 20, 40, 2
SEED = 20261120
MOMENTS = ("saving", "training", "training", "saving", "starting")
SURVIVOR_LEAVES_S, LAUNCHER_S = 60.0, 2.0
CLOCK = ("_s", "_gib", "mfu", "mfu_6n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chaos")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 2},
        train={"max_steps": STEPS},
        weights={"every_n_steps": 3},
        # a best checkpoint that is due anyway, and others that are not
        evaluation={"every_n_steps": 3, "max_samples_per_domain": 2, "select": "overall"},
        checkpoint={"every_n_steps": EVERY, "keep_last": 2},
        deepspeed={"zero_optimization": {"stage": 2}},
    )

    def case(name: str, *overrides: str) -> dict:
        settings = [f"run.dir={folder / name}", *overrides]
        return {"config": str(config), "overrides": settings, "sabotage": "record samples", "dump": [STEPS]}

    chance = random.Random(SEED)
    run_cases(folder, 2, [case("whole")])
    for life in range(KILLS):
        moment = MOMENTS[life % len(MOMENTS)]
        cases = [case("killed", f"checkpoint.asynchronous={bool(life % 2)}".lower())]
        ranks = start_ranks(TRAIN_CASES, 2, case_file(folder, cases))
        kill(chance, folder / "killed", ranks, moment)
        codes = wait_for_ranks(ranks, LAUNCHER_S if moment == "starting" else SURVIVOR_LEAVES_S)
        message = f"life {life}, killed {moment}\n" + "\n".join(tails(ranks, codes))
        assert -signal.SIGKILL in codes, message
        assert moment == "starting" or None not in codes, f"a survivor hangs: {message}"
    run_cases(folder, 2, [case("killed")])
    return folder


def kill(chance: random.Random, run: Path, ranks: Ranks, moment: str) -> None:
    """Wait for the moment and a little more, then kill one rank or both."""
    checkpoints = run / "checkpoints"
    # never so far that the run could end: the last steps are for the life that is left alone
    goal = min(newest(checkpoints) + chance.randrange(0, 4), STEPS - 4)
    left_behind = unfinished(checkpoints)
    deadline = time.monotonic() + (chance.random() * 4 if moment == "starting" else 120)
    while time.monotonic() < deadline:
        if moment == "saving" and unfinished(checkpoints) - left_behind:
            break
        # a start that was quick must not get to the end either
        if moment != "saving" and trained(run, ranks.pids[0]) >= goal:
            break
        time.sleep(0.001 if moment == "saving" else 0.01)
    else:
        assert moment == "starting", "no progress\n" + "\n".join(tails(ranks, [None, None]))
    time.sleep(chance.random() * 0.05)
    for pid in chance.choice([ranks.pids[:1], ranks.pids[1:], ranks.pids]):
        os.kill(pid, signal.SIGKILL)


def unfinished(checkpoints: Path) -> set[tuple[str, int]]:
    """Names and inodes of checkpoints in the making."""
    found = set()
    for path in checkpoints.glob(".unfinished-*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def newest(checkpoints: Path) -> int:
    return max((int(path.name[-8:]) for path in checkpoints.glob("step-*")), default=0)


def trained(run: Path, pid: int) -> int:
    """Steps that this process has run, counted from the start of the run; -1 before its first."""
    path = run / "trained_rank_0.jsonl"
    lines = whole_lines(path) if path.is_file() else []
    return max((line["step"] for line in lines if line["pid"] == pid), default=-1)


def whole_lines(path: Path) -> list[dict]:
    """Lines of a file that a kill may have cut off."""
    text = path.read_text()
    copy = path.with_suffix(".whole")
    copy.write_text(text[: text.rfind("\n") + 1])
    return read_jsonl(copy)


def history(run: Path) -> dict[int, list[dict]]:
    """Step -> packs of all ranks, as trained by the last life that trained this step."""
    by_step: dict[int, dict[int, dict[int, list[dict]]]] = defaultdict(lambda: defaultdict(dict))
    for rank in (0, 1):
        for line in whole_lines(run / f"trained_rank_{rank}.jsonl"):
            # lives follow each other in the file: a later one takes the place of an earlier one
            packs = by_step[line["step"]][rank]
            if line["pid"] not in packs:
                packs.clear()
            packs.setdefault(line["pid"], []).append({k: line[k] for k in ("samples", "tokens")})
    return {
        step: [pack for rank in sorted(ranks) for packs in ranks[rank].values() for pack in packs]
        for step, ranks in sorted(by_step.items())
    }


def test_final_parameters_and_moments_are_equal_bit_for_bit(runs):
    ours, expected = (load_file(runs / n / f"whole_{STEPS}_trained.safetensors") for n in ("killed", "whole"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["metrics.jsonl", "weights.jsonl", "eval.jsonl"])
def test_losses_and_weights_are_equal(runs, name):
    def without_clock(line: dict) -> dict:
        return {key: value for key, value in line.items() if not key.endswith(CLOCK)}

    ours, expected = (
        [without_clock(line) for line in read_jsonl(runs / n / name)] for n in ("killed", "whole")
    )
    assert ours == expected


def test_the_best_checkpoint_and_the_newest_are_the_same(runs):
    ours, expected = (
        sorted(p.name for p in (runs / n / "checkpoints").iterdir()) for n in ("killed", "whole")
    )
    assert ours == expected
    ours, expected = (
        json.loads((runs / n / "checkpoints" / "best.json").read_text()) for n in ("killed", "whole")
    )
    assert ours == expected and (runs / "killed" / "checkpoints" / ours["checkpoint"]).is_dir()


def test_nothing_is_lost_and_nothing_seen_twice(runs):
    """The same samples in the same packs with the same tokens; none again before all others of its domain."""
    ours, expected = history(runs / "killed"), history(runs / "whole")
    assert list(ours) == list(range(STEPS))
    assert ours == expected
    seen = Counter(tuple(s) for packs in ours.values() for pack in packs for s in pack["samples"])
    for domain in {domain for domain, _ in seen}:
        times = {count for (d, _), count in seen.items() if d == domain}
        assert max(times) - min(times) <= 1


def test_the_run_really_was_killed_and_repeated_steps(runs):
    pids = {line["pid"] for line in whole_lines(runs / "killed" / "trained_rank_0.jsonl")}
    assert len(pids) > KILLS / 2  # the others were killed before their first step
    steps = [line["step"] for line in whole_lines(runs / "killed" / "trained_rank_0.jsonl")]
    assert len(steps) > STEPS
    assert not list((runs / "killed" / "checkpoints").glob(".*"))
