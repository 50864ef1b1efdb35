"""Saving: when it is due, in the background, and when it fails."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import read_jsonl, run_cases
from safetensors.torch import load_file
from small_runs import cut_back, small_run

from versatune_ds.cli.main import main
from versatune_ds.config.schema import Checkpoint
from versatune_ds.engine.checkpointing import saver as saving
from versatune_ds.engine.checkpointing.due import LossBound, checkpoint_due
from versatune_ds.engine.checkpointing.folder import damage, saved_state
from versatune_ds.engine.checkpointing.saver import (
    Need,
    Saver,
    Share,
    host_bytes,
    host_copy,
    hosts_without_room,
)
from versatune_ds.engine.statistics import Flags
from versatune_ds.foundations.errors import SaveError

STEPS = 6


# --- when ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "milestone", "due"),
    [(3, None, [3, 6, 9]), (None, 4, [4, 8]), (None, None, []), (5, 4, [4, 5, 8])],
)
def test_when_a_checkpoint_is_due_by_steps(every, milestone, due):
    settings = Checkpoint(every_n_steps=every, milestone_every_n_steps=milestone)
    assert [step for step in range(1, 10) if checkpoint_due(settings, step)] == due


@pytest.mark.parametrize(
    ("limit_s", "step_s", "save_s", "background"),
    [
        (600, 10, 50, False),
        (600, 70, 1, False),
        (300, 1, 200, False),
        (600, 10, 50, True),
        (600, 70, 1, True),
        (300, 1, 140, True),
    ],
)
def test_no_crash_loses_more_than_the_bound(limit_s, step_s, save_s, background):
    """A simulated run: the time since training left the newest complete checkpoint stays below the bound."""
    now, safe_at, worst = 0.0, 0.0, 0.0
    saves: list[float] = []
    bound = LossBound(limit_s, now)
    began: float | None = None
    while now < 20 * limit_s:
        now += step_s
        worst = max(worst, now - safe_at)
        bound.step_ended(now)
        if began is not None and now >= began + save_s:
            bound.saved(began, began, now)
            worst = worst if saves[1:] else 0.0  # how long saving takes was not known before the first
            safe_at, began = began, None
        if began is None and bound.due(now):
            saves.append(now)
            if background:
                began = now
                continue
            now += save_s
            worst = max(worst, now - safe_at) if saves[1:] else 0.0
            bound.saved(now - save_s, now, now)
            bound.waited(now)
            safe_at = now
    assert worst <= limit_s + (step_s if background else 0)  # completion is noticed at a step's end
    gaps = [later - earlier for earlier, later in itertools.pairwise(saves[2:])]
    assert min(gaps) >= limit_s - 2 * (step_s + save_s)  # and not more often than needed


def test_a_bound_that_cannot_be_kept_saves_after_every_step():
    bound = LossBound(limit_s=10, now=0)
    bound.step_ended(6)
    bound.saved(6, 12, 12)
    assert bound.interval_s < 0
    bound.waited(12)
    bound.step_ended(18)
    assert bound.due(18)


# --- one rank's share ---------------------------------------------------------------------------------------


def test_a_host_copy_is_apart_and_keeps_what_is_shared():
    flat = torch.arange(10.0)
    state = {
        "module": OrderedDict(a=flat[:4].view(2, 2), b=flat[4:]),
        "tied": [flat[:4].view(2, 2)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0),
        "size": torch.Size([2, 3]),
        "other": {"lr": 0.1, "betas": (0.9, 0.95)},
    }
    expected = {"a": state["module"]["a"].clone(), "b": state["module"]["b"].clone()}
    copied = host_copy(state)
    flat.fill_(-1)
    state["other"]["lr"] = 7
    assert all(torch.equal(copied["module"][name], expected[name]) for name in expected)
    assert isinstance(copied["module"], OrderedDict) and copied["size"] == (2, 3)
    assert copied["other"] == {"lr": 0.1, "betas": (0.9, 0.95)}
    copied["module"]["a"].fill_(5)
    assert torch.equal(copied["tied"][0], torch.full((2, 2), 5.0))  # one memory, as before
    memory = {tensor.untyped_storage().data_ptr() for tensor in (copied["module"]["b"], copied["tied"][0])}
    assert len(memory) == 1


def test_the_size_of_a_copy_is_known_before_it_is_made():
    flat = torch.zeros(10)
    state = {"a": flat[:4], "b": (flat[4:], [torch.zeros(3, dtype=torch.bfloat16)]), "lr": 0.1, "text": b"x"}
    assert host_bytes(state) == 10 * 4 + 3 * 2


def test_ranks_of_one_host_share_its_memory():
    def need(host: str, copy_gb: float, free_gb: float) -> Need:
        return Need(host, int(copy_gb * 1e9), int(free_gb * 1e9))

    assert hosts_without_room([need("a", 48, 120), need("a", 48, 118)]) == []
    (text,) = hosts_without_room([need("a", 48, 120), need("a", 48, 100), need("b", 48, 60)])
    assert text == "a (the copies of 2 rank(s) take 96.0 GB, 100.0 GB are free)"
    assert len(hosts_without_room([need("a", 1, 0), need("b", 1, 0)])) == 2
    assert hosts_without_room([need("a", 9, 10)]) == [] != hosts_without_room([need("a", 9.1, 10)])


def test_a_copy_that_does_not_fit_is_not_made_and_that_is_said(tmp_path, monkeypatch):
    free = {"bytes": 40}
    monkeypatch.setattr(saving, "available_bytes", lambda: free["bytes"])
    said = []
    monkeypatch.setattr(saving.log, "warning", lambda text, *values: said.append(text % values))
    saver = Saver(tmp_path, Checkpoint(asynchronous=True), SimpleNamespace(deepspeed=SimpleNamespace()))
    saver._share.begin(tmp_path, keep=True)
    saver._share.save({"x": torch.zeros(10)}, tmp_path / "a.pt")
    assert not saver._have_room()
    assert "not enough host memory on" in said[0] and "written while training stands still" in said[0]
    free["bytes"] = 1000
    assert saver._have_room() and len(said) == 1


@pytest.mark.parametrize(("keep", "in_background"), [(False, False), (True, False), (True, True)])
def test_a_share_is_listed_only_when_all_of_it_is_written(tmp_path, keep, in_background):
    share = Share()
    share.begin(tmp_path, keep)
    state = {"x": torch.zeros(3)}
    share.save(state, tmp_path / "a.pt")
    share.save(b"text", tmp_path / "b.json")
    assert (tmp_path / "a.pt").exists() != keep
    assert share.kept_bytes == (12 if keep else 0)
    held, wait = threading.Event(), Share._write_all
    share._write_all = lambda: (held.wait() if in_background else None, wait(share))
    share.finish(in_background)
    state["x"].fill_(9)  # training goes on
    held.set()
    share.wait()
    assert share.problem is None and not share.writing
    assert torch.load(tmp_path / "a.pt")["x"].tolist() == [0, 0, 0]
    listed = json.loads((tmp_path / "manifest_rank_00000.json").read_text())
    assert {name: entry["bytes"] for name, entry in listed.items()} == {
        "a.pt": (tmp_path / "a.pt").stat().st_size,
        "b.json": 4,
    }


@pytest.mark.parametrize(("keep", "in_background"), [(False, False), (True, False), (True, True)])
def test_a_failed_share_keeps_its_first_problem_and_lists_nothing(tmp_path, keep, in_background):
    share = Share()
    share.begin(tmp_path, keep)
    share.save({"x": torch.zeros(3)}, tmp_path / "no such folder" / "a.pt")
    share.save(b"text", tmp_path / "b.json")
    share.finish(in_background)
    share.wait()
    assert "no such folder" in str(share.problem)
    assert list(tmp_path.iterdir()) == []
    share.begin(tmp_path, keep)  # the next one starts anew
    assert share.problem is None


# --- a saver at step boundaries -----------------------------------------------------------------------------


def saver_of(folder: Path, clock=time.monotonic, **settings) -> Saver:
    """A saver on one rank, whose backend has one file to save."""
    backend = SimpleNamespace(save=lambda to, write: write({"x": torch.ones(3)}, to / "model.pt"))
    return Saver(folder, Checkpoint(**settings), backend, clock)


def test_a_checkpoint_in_the_background_is_published_at_the_first_boundary_after_all_have_written(tmp_path):
    saver = saver_of(tmp_path, asynchronous=True)
    saver.save(2, lambda: {"answer": 42})
    saver._share.wait()
    saver.settle(Flags(writing=True))  # another rank still writes
    assert checkpoints_in(tmp_path) == []
    assert saver.flags(stop=False) == Flags()
    saver.settle(Flags())
    assert checkpoints_in(tmp_path) == ["step-00000002"]
    assert damage(tmp_path / "step-00000002") is None
    assert saved_state(tmp_path / "step-00000002") == {"version": 1, "step": 2, "answer": 42}
    saver.settle(Flags())  # nothing is left to do


def test_a_rank_that_could_not_write_says_so_at_the_boundary_and_nothing_is_published(tmp_path):
    saver = saver_of(tmp_path, asynchronous=True)
    saver.save(2, lambda: {"answer": 42})
    saver._share.wait()
    saver._share.problem = OSError("no room")
    flags = saver.flags(stop=True)
    assert flags == Flags(stop=True, failed=True)
    with pytest.raises(SaveError, match=r"checkpoint after step 2 could not be written .*no room"):
        saver.settle(flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "done", "agreed", "last", "due"),
    [
        ({"every_n_steps": 4}, 4, Flags(), False, True),
        ({"every_n_steps": 4}, 5, Flags(), False, False),
        ({"every_n_steps": 4}, 5, Flags(stop=True), False, True),
        ({"every_n_steps": 4}, 5, Flags(save=True), False, True),
        ({"every_n_steps": 4}, 5, Flags(writing=True), False, False),
        ({"every_n_steps": 4}, 5, Flags(), True, True),
        ({"every_n_steps": None}, 5, Flags(), True, False),
        ({"every_n_steps": None, "max_lost_minutes": 9}, 5, Flags(), True, True),
        ({"every_n_steps": None, "milestone_every_n_steps": 5}, 5, Flags(), False, True),
    ],
)
def test_when_a_run_saves(tmp_path, settings, done, agreed, last, due):
    assert saver_of(tmp_path, **settings).due(done, agreed, last) == due


def test_work_since_a_checkpoint_in_the_background_is_counted_from_its_beginning(tmp_path):
    """Of 600 s that may be lost, 350 s lie behind the checkpoint of 100 s when it is complete, and saving
    takes 300 s: the next one is due."""
    now = [0.0]
    saver = saver_of(tmp_path, clock=lambda: now[0], asynchronous=True, max_lost_minutes=10)
    for now[0] in (50.0, 100.0):
        assert not saver.flags(stop=False).save
    saver.save(2, dict)
    saver._share.wait()
    now[0] = 400.0
    saver.settle(Flags())
    now[0] = 450.0
    assert saver.flags(stop=False).save


def checkpoints_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 4},
        train={"max_steps": STEPS},
        weights={"every_n_steps": 3},
        checkpoint={"every_n_steps": 2, "keep_last": 100},
    )

    def case(name: str, *overrides: str, sabotage: str | None = None) -> dict:
        overrides = (f"run.dir={folder / name}", *overrides)
        return {"config": str(config), "overrides": list(overrides), "sabotage": sabotage, "dump": [STEPS]}

    background = "checkpoint.asynchronous=true"
    every_step = ("checkpoint.every_n_steps=null", "checkpoint.max_lost_minutes=1e-6")
    run_cases(
        folder,
        2,
        [
            case("whole"),
            case("background", background, sabotage="write slowly"),
            case("background_stage_2", background, "deepspeed={zero_optimization: {stage: 2}}"),
            case("no_room", background, sabotage="no room for a copy"),
            case("stage_2", "deepspeed={zero_optimization: {stage: 2}}"),
            case("cannot_write", sabotage="cannot write checkpoint 4"),
            case("cannot_write_background", background, sabotage="cannot write checkpoint 4"),
            case("cannot_publish", sabotage="cannot publish checkpoint 4"),
            case("cannot_publish_background", background, sabotage="cannot publish checkpoint 4"),
            case("every_step", *every_step),
            case("every_step_background", *every_step, background),
            case("only_the_last", "checkpoint.every_n_steps=null", "checkpoint.max_lost_minutes=1000"),
            case("never", "checkpoint.every_n_steps=null"),
            case(
                "cannot_export",
                "checkpoint.export_shard_gb=0.0001",
                "checkpoint.every_n_steps=null",
                sabotage="cannot export",
            ),
        ],
    )
    for name in ("background", "background_stage_2"):
        cut_back(folder / name, folder / f"{name}_resumed", 2)
    for name in FAILED:
        shutil.copytree(folder / name, folder / f"{name}_resumed")
    zero_2 = "deepspeed={zero_optimization: {stage: 2}}"
    run_cases(
        folder,
        2,
        [
            case("background_resumed"),
            case("background_stage_2_resumed", zero_2),
            *(case(f"{name}_resumed") for name in FAILED),
        ],
    )
    return folder


FAILED = ("cannot_write", "cannot_write_background", "cannot_publish", "cannot_publish_background")


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def same_parameters(run: Path, other: Path) -> bool:
    ours, theirs = (load_file(path / f"whole_{STEPS}_trained.safetensors") for path in (run, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


class TestBackground:
    pytestmark = pytest.mark.slow

    @pytest.mark.parametrize(
        ("name", "yardstick"), [("background", "whole"), ("background_stage_2", "stage_2")]
    )
    def test_a_checkpoint_holds_its_step_and_no_later_one(self, runs, name, yardstick):
        """`background` trained on before the files of step 2 were written; resumed, it is the same run."""
        assert checkpoints(runs / name) == [f"step-{step:08d}" for step in (2, 4, 6)]
        assert same_parameters(runs / name, runs / yardstick)
        assert same_parameters(runs / f"{name}_resumed", runs / yardstick)

    @pytest.mark.parametrize("name", ["whole", "background"])
    def test_standing_still_is_recorded_at_the_next_step(self, runs, name):
        stalls = [line["save_stall_s"] for line in read_jsonl(runs / name / "metrics.jsonl")]
        assert stalls[0] < min(stalls[2], stalls[4])

    def test_the_exported_model_is_the_same(self, runs):
        models = (runs / name / "model" / "model.safetensors" for name in ("background", "whole"))
        ours, expected = map(load_file, models)
        assert all(torch.equal(ours[key], expected[key]) for key in expected)

    def test_without_room_for_the_copy_on_one_rank_all_write_at_once(self, runs):
        """A thread that wrote would fail there."""
        for rank in (0, 1):
            assert json.loads((runs / "no_room" / f"outcome_rank_{rank}.json").read_text()) is None
        assert checkpoints(runs / "no_room") == checkpoints(runs / "whole")
        assert same_parameters(runs / "no_room", runs / "whole")


class TestFailure:
    pytestmark = pytest.mark.slow

    @pytest.mark.parametrize("name", FAILED)
    def test_all_ranks_end_with_the_reason_and_the_former_checkpoint_stays(self, runs, name):
        for rank in (0, 1):
            outcome = json.loads((runs / name / f"outcome_rank_{rank}.json").read_text())
            assert outcome["type"] == "SaveError"
            assert "Earlier checkpoints are whole" in outcome["text"] and "GB are free" in outcome["text"]
            assert f"by rank {0 if 'publish' in name else 1}" in outcome["text"]
        names = checkpoints(runs / name)
        assert names[0] == "step-00000002" and "step-00000004" not in names
        if name == "cannot_write":
            assert names == ["step-00000002"]  # the unfinished one is gone

    @pytest.mark.parametrize("name", FAILED)
    def test_the_same_command_goes_on_from_it(self, runs, name):
        assert same_parameters(runs / f"{name}_resumed", runs / "whole")
        assert checkpoints(runs / f"{name}_resumed") == [f"step-{step:08d}" for step in (2, 4, 6)]


class TestExport:
    pytestmark = pytest.mark.slow

    def test_a_full_disk_ends_the_run_on_all_ranks_and_keeps_the_weights(self, runs):
        """In a checkpoint that nobody had asked for; the printed command writes the model from it."""
        run = runs / "cannot_export"
        for rank in (0, 1):
            outcome = json.loads((run / f"outcome_rank_{rank}.json").read_text())
            assert outcome["type"] == "SaveError" and "No space left on device" in outcome["text"]
        assert checkpoints(run) == [f"step-{STEPS:08d}"]
        assert not [path for path in run.iterdir() if "model" in path.name]
        assert main(shlex.split(outcome["text"].splitlines()[-1])[1:]) == 0
        expected = load_file(runs / "whole" / "model" / "model.safetensors")
        ours = {n: t for path in (run / "model").glob("*.safetensors") for n, t in load_file(path).items()}
        assert ours.keys() == expected.keys() and all(torch.equal(ours[n], expected[n]) for n in expected)


class TestBoundOnLostWork:
    pytestmark = pytest.mark.slow

    @pytest.mark.parametrize(
        ("name", "steps"),
        [
            ("every_step", range(1, STEPS + 1)),
            ("only_the_last", [STEPS]),
            ("never", []),
        ],
    )
    def test_rank_0s_clock_decides_for_all(self, runs, name, steps):
        assert json.loads((runs / name / "outcome_rank_1.json").read_text()) is None
        found = checkpoints(runs / name) if (runs / name / "checkpoints").exists() else []
        assert found == [f"step-{step:08d}" for step in steps]

    def test_one_is_in_flight_at_most(self, runs):
        """Every step asks for a checkpoint; in the background some are passed over, the last is not."""
        names = checkpoints(runs / "every_step_background")
        assert names[-1] == f"step-{STEPS:08d}" and len(names) <= STEPS


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk(tmp_path_factory, background):
    """The file system of the checkpoints has room for a few."""
    folder = tmp_path_factory.mktemp("full")
    config = small_run(
        folder,
        batch={"pack_len": 192, "packs_per_step": 4},
        train={"max_steps": 40},
        checkpoint={"every_n_steps": 1, "keep_last": 100, "asynchronous": background, "export_at_end": False},
    )
    disk = folder / "run" / "checkpoints"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system (root)")
    try:
        case = {"config": str(config), "overrides": [f"run.dir={folder / 'run'}"], "sabotage": None}
        run_cases(folder, 2, [case])
        outcome = json.loads((folder / "run" / "outcome_rank_0.json").read_text())
        assert outcome["type"] == "SaveError" and "0.00 GB are free" in outcome["text"]
        names = [name for name in checkpoints(folder / "run") if not name.startswith(".")]
        assert 1 <= len(names) <= 6
        for name in names:
            assert (disk / name / "manifest.json").is_file()
        assert not list(disk.glob(".unfinished*"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
