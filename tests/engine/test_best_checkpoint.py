"""The best checkpoint: which it is, that it stays, that a resumed run knows it, and that it is exported.

Held-out losses are given, so that the best one is not the last; everything else is real, on one rank.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import run_cases
from plain_backend import PlainRun, plain_run
from safetensors.torch import load_file
from small_runs import cut_back, small_run

from versatune_ds.cli.main import main
from versatune_ds.config.schema import Checkpoint
from versatune_ds.domain.early_stopping import EarlyStopping
from versatune_ds.engine.checkpointing import folder as folders
from versatune_ds.engine.checkpointing.saver import Saver
from versatune_ds.engine.statistics import Flags
from versatune_ds.foundations import constants
from versatune_ds.foundations.errors import SaveError, StateError

STEPS, BEST = 8, 4
NAN = float("nan")
LOSSES = {1: 3.0, 2: 2.5, 3: NAN, 4: 2.0, 5: 2.5, 6: 2.0, 7: NAN, 8: 3.0}
"""After each step; the lowest after 4 and, as low but later, after 6."""


# --- the saver and the folder -------------------------------------------------------------------------------


def note(step: int) -> dict:
    return {"step": step, "select": "overall", "loss": 1.0 / step}


def saver_of(folder: Path, **settings) -> tuple[Saver, list[str]]:
    """A saver whose backend has one file, and the folders that it was asked to write that into."""
    written: list[str] = []

    def save(to, write) -> None:
        written.append(to.name)
        write({"x": torch.ones(3)}, to / "model.pt")

    return Saver(folder, Checkpoint(**settings), SimpleNamespace(save=save)), written


def names(folder: Path) -> list[int]:
    return sorted(folders.step_of(path) for path in folders.list_checkpoints(folder))


def test_the_best_one_outlives_the_newest_until_a_better_one_is_complete(tmp_path):
    saver, written = saver_of(tmp_path, keep_last=1)
    saver.keep_best(note(2), dict)
    for step in (3, 4, 5):
        saver.save(step, dict)
        assert names(tmp_path) == [2, step] and folders.read_best(tmp_path)["step"] == 2
    saver.keep_best(note(6), dict)
    assert names(tmp_path) == [6]
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"checkpoint": "step-00000006", "step": 6, "select": "overall", "loss": 1 / 6}
    assert len(written) == 5


def test_a_checkpoint_that_is_there_already_is_not_written_again(tmp_path):
    saver, written = saver_of(tmp_path, keep_last=2)
    saver.keep_best(note(2), dict)
    for step in (3, 4):
        saver.save(step, dict)
    saver.keep_best(note(4), dict)
    assert len(written) == 3 and names(tmp_path) == [3, 4]
    assert folders.read_best(tmp_path)["step"] == 4


def test_in_the_background_it_is_the_best_one_when_it_is_complete(tmp_path):
    saver, written = saver_of(tmp_path, keep_last=1, asynchronous=True)
    saver.keep_best(note(2), dict)
    saver.finish()
    saver.save(4, dict)
    saver.keep_best(note(4), dict)
    assert folders.read_best(tmp_path)["step"] == 2 and names(tmp_path) == [2]
    saver._share.wait()
    saver.settle(Flags())
    assert folders.read_best(tmp_path)["step"] == 4 and names(tmp_path) == [4]
    assert len(written) == 2


def test_a_note_on_what_is_gone_goes_and_one_that_was_lost_comes_back(tmp_path):
    saver, _ = saver_of(tmp_path, keep_last=9)
    for step in (2, 4):
        saver.keep_best(note(step), dict)
    assert folders.restore_best(tmp_path, note(2)) and folders.read_best(tmp_path)["step"] == 2
    assert not folders.restore_best(tmp_path, note(3)) and folders.read_best(tmp_path) is None
    assert not folders.restore_best(tmp_path, None)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_note_that_somebody_damages_meanwhile_is_a_problem_that_all_ranks_hear_of(tmp_path, in_background):
    saver, _ = saver_of(tmp_path, asynchronous=in_background)
    saver.keep_best(note(2), dict)
    saver.finish()
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(SaveError, match=r"step 3 could not be written .*best.json cannot be read"):
        saver.save(3, dict)
        saver.finish()
    assert names(tmp_path) == [2, 3]  # it was there before the note was looked at


def test_a_note_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "best.json").write_text("{}")
    with pytest.raises(StateError, match=r"best.json cannot be read \(KeyError: 'step'\); remove it"):
        folders.best_or_newest(tmp_path)


# --- whole runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run(
        tmp_path_factory.mktemp("best"),
        batch={"pack_len": 192, "packs_per_step": 2},
        optimizer={"lr": 3e-3, "schedule": "constant"},
        train={"max_steps": STEPS},
        evaluation={"every_n_steps": 1, "max_samples_per_domain": 1, "select": "overall"},
        checkpoint={"every_n_steps": 3, "keep_last": 1},
    )


def run(config: Path, name: str, *overrides: str, **options) -> PlainRun:
    original = EarlyStopping.observe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyStopping, "observe", lambda self, step, _: original(self, step, LOSSES[step]))
        return plain_run(config, f"run.dir={config.parent / name}", *overrides, **options)


@pytest.fixture(scope="module")
def whole(config: Path) -> PlainRun:
    """A run that keeps all checkpoints, and exports its last parameters."""
    every = ("checkpoint.every_n_steps=1", "checkpoint.keep_last=100")
    return run(config, "whole", "evaluation.select=null", *every)


@pytest.fixture(scope="module")
def selected(config: Path) -> PlainRun:
    return run(config, "selected")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def parameters_after(whole: PlainRun, step: int) -> dict[str, torch.Tensor]:
    path = whole.folder / "checkpoints" / f"step-{step:08d}" / "plain.pt"
    return {name.removeprefix("lm."): value for name, value in torch.load(path)["model"].items()}


def is_step(folder: Path, whole: PlainRun, step: int) -> bool:
    expected = parameters_after(whole, step)
    return all(torch.equal(value, expected[name]) for name, value in weights(folder).items())


def test_the_run_exports_its_best_parameters_and_not_its_last(whole, selected):
    """The earliest of two that are as good."""
    assert names(selected.folder / "checkpoints") == [BEST, STEPS]
    assert is_step(selected.folder / "model", whole, BEST)
    assert is_step(whole.folder / "model", whole, STEPS) and not is_step(whole.folder / "model", whole, BEST)


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("stopped", ()),
        ("by_the_clock", ("checkpoint.every_n_steps=null", "checkpoint.max_lost_minutes=60")),
    ],
)
def test_an_early_stopped_run_exports_its_best_parameters_and_stays_ended(config, whole, name, when):
    for _ in range(2):
        stopped = run(config, name, "evaluation.patience=3", *when)
        assert stopped.finished and names(stopped.folder / "checkpoints") == [BEST, 7]
        assert is_step(stopped.folder / "model", whole, BEST)
    assert stopped.samples == [] and len(stopped.lines("eval")) == 8


@pytest.mark.parametrize("step", [2, 3, BEST, 6])
def test_a_resumed_run_has_the_same_best_one(config, whole, selected, step):
    """From before it, from it, and from after it; 2 and 4 were saved for their evaluations, after these."""
    name, kept = f"resumed_{step}", config.parent / "kept"
    if not kept.exists():
        run(config, "kept", "checkpoint.keep_last=100", "checkpoint.export_at_end=false")
        assert names(kept / "checkpoints") == [1, 2, 3, BEST, 6, STEPS]
    cut_back(kept, config.parent / name, step)
    resumed = run(config, name)
    assert len(resumed.samples) == STEPS - step
    assert [line["step"] for line in resumed.lines("eval")] == list(range(STEPS + 1))
    assert names(resumed.folder / "checkpoints") == [BEST, STEPS]
    assert is_step(resumed.folder / "model", whole, BEST)
    last = f"checkpoints/step-{STEPS:08d}/versatune_state.json"
    found = [json.loads((r.folder / last).read_text())["early_stopping"] for r in (resumed, selected)]
    assert found[0] == found[1]
    assert found[0] == {
        "select": "overall", "best_loss": 2.0, "best_step": BEST, "last_step": STEPS - 1, "waited": 3
    }  # fmt: skip


def test_without_its_checkpoint_another_one_becomes_the_best(config):
    """Not one that was worse than what cannot be had any more, in a run that would then export nothing."""
    run(config, "lost", "train.max_steps=6", "checkpoint.export_at_end=false")
    folder = config.parent / "lost" / "checkpoints"
    shutil.rmtree(folder / f"step-{BEST:08d}")
    run(config, "lost")
    assert folders.read_best(folder)["step"] == 6


def test_another_measure_begins_anew(config):
    run(config, "measure", "train.max_steps=6", "checkpoint.export_at_end=false")
    ours = run(config, "measure", "evaluation.select=law")
    assert folders.read_best(ours.folder / "checkpoints") == {
        "checkpoint": "step-00000006", "step": 6, "select": "law", "loss": 2.0
    }  # fmt: skip


def test_losses_that_are_not_known_leave_the_last_parameters(config, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOSSES, 1, None)
        ours = run(config, "unknown", "train.max_steps=1")
    assert is_step(ours.folder / "model", whole, 1)
    assert folders.read_best(ours.folder / "checkpoints") is None


def test_a_damaged_best_one_is_not_replaced_in_silence(config, capsys):
    ours = run(config, "damaged", "train.max_steps=6", "checkpoint.export_at_end=false")
    (ours.folder / "checkpoints" / f"step-{BEST:08d}" / "plain.pt").write_bytes(b"")
    with pytest.raises(SaveError, match=r"step-00000004 is damaged: plain.pt has 0 bytes.*--newest"):
        run(config, "damaged", "train.max_steps=6")
    assert main(["export", str(ours.folder)]) == constants.EXIT_STATE
    assert "plain.pt has 0 bytes" in capsys.readouterr().err


def test_the_report_says_which_step_was_taken_and_why(selected, tmp_path):
    assert main(["report", str(selected.folder), "--out", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "after step 4: held-out loss 2.000 (overall), the lowest of 8 evaluations up to step 8" in text


# --- on two ranks, in every stage ---------------------------------------------------------------------------

STAGES = {
    "stage_0": "deepspeed={zero_optimization: {stage: 0}}",
    "stage_1": "deepspeed={zero_optimization: {stage: 1}}",
    "stage_2": "deepspeed={zero_optimization: {stage: 2}}",
    "stage_3": "deepspeed={zero_optimization: {stage: 3}}",
}


@pytest.mark.slow
def test_every_stage_goes_back_to_the_best_one_before_it_exports(config, capsys):
    """Byte for byte what the checkpoint gives; stage 3 with saving in the background and from other ranks."""

    def case(name: str, *overrides: str) -> dict:
        settings = [f"run.dir={config.parent / name}", "checkpoint.every_n_steps=4", *overrides]
        return {"config": str(config), "overrides": settings, "sabotage": "lowest after step 4"}

    background = "checkpoint.asynchronous=true"
    first = ("train.max_steps=6", "checkpoint.export_at_end=false")
    run_cases(config.parent, 1, [case("other_ranks", STAGES["stage_3"], *first)])
    cases = [case(name, stage) for name, stage in STAGES.items()]
    cases += [case("background", STAGES["stage_3"], background), case("other_ranks", STAGES["stage_3"])]
    run_cases(config.parent, 2, cases)
    for name in (*STAGES, "background", "other_ranks"):
        folder = config.parent / name
        assert names(folder / "checkpoints") == [BEST, STEPS]
        assert main(["export", str(folder), "--out", str(folder / "best")]) == 0
        assert main(["export", str(folder), "--newest", "--out", str(folder / "newest")]) == 0
        assert same(folder / "model", folder / "best") and not same(folder / "model", folder / "newest")
    capsys.readouterr()
