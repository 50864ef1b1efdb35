"""`versatune-ds plan-weights`: from a run's losses to weights, a table and a report, without a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import REPOSITORY

from versatune_ds.cli.main import main
from versatune_ds.domain.replay import schedule_from_weights_jsonl
from versatune_ds.foundations import constants
from versatune_ds.report.report import render
from versatune_ds.report.runs import read_runs

HISTORY = (
    '{"step": 10, "losses": {"law": 2.0, "code": 1.6}}\n{"step": 20, "losses": {"law": 1.8, "code": 1.7}}\n'
)
REFERENCE = "weights.reference={law: 1.0, code: 1.2}"
SETTINGS = {
    "run": {"dir": "x"}, "model": {"source": "x"}, "train": {"max_steps": 5}, "batch": {"packs_per_step": 1},
    "data": {"train": [{"path": "x", "domain": "law"}]}, "domains": {"names": ["law", "code"]},
}  # fmt: skip


@pytest.fixture
def history(tmp_path):
    path = tmp_path / "recorded" / "weights.jsonl"
    path.parent.mkdir()
    path.write_text(HISTORY)
    (path.parent / constants.RESOLVED_CONFIG_FILE).write_text(yaml.safe_dump(SETTINGS))
    return path


def plan(history: Path, *more: str, name: str = "out") -> tuple[int, list[dict]]:
    folder = history.parent.parent / name
    code = main(["plan-weights", "--history", str(history), "--out", str(folder), *more])
    lines = (folder / "weights.jsonl").read_text().splitlines() if code == 0 else []
    return code, [json.loads(line) for line in lines]


EVAL = "data.eval=[{path: held_out.jsonl, domain: law}]"


def test_the_guard_is_left_out_of_a_replay(history):
    """It needs the losses of every sample."""
    code, guarded = plan(history, "weights.strategy=uniform", "weights.guard={}", EVAL, name="guarded")
    assert code == 0 and guarded == plan(history, "weights.strategy=uniform")[1]


def test_strategies_by_hand(history, capsys):
    _, fostering = plan(history, "weights.strategy=fostering", REFERENCE)
    # gamma 0.5 and 0.25 from 1/2 each: 0.75 : 0.625
    assert fostering[1]["after"]["law"] == pytest.approx(0.75 / 1.375)
    expansion = ("weights.strategy=expansion", REFERENCE, "weights.target=code", "weights.epsilon=0")
    capsys.readouterr()
    _, updates = plan(history, *expansion)
    # open at first; then law fell, so phi of the others is 0 and the gate stays open
    assert [update["after"]["code"] for update in updates] == pytest.approx([0.5, 0.55, 0.6])
    out = capsys.readouterr().out
    assert "code  50.0 -> 60.0 %" in out and "gate open 2/2" in out and "moved 10.0 %" in out
    assert "do not react to these weights" in out
    _, uniform = plan(history, "weights.strategy=uniform")
    assert uniform[-1]["after"] == {"law": 0.5, "code": 0.5}
    assert "moved 0.0 %" in capsys.readouterr().out


def test_settings_of_the_run_beside_the_history_are_taken_and_applied(history, capsys):
    settings = history.parent / constants.RESOLVED_CONFIG_FILE
    own = {"initial": {"law": 0.8, "code": 0.2}, "names": ["law", "code"]}
    weights = {"strategy": "raw_loss", "shadow": True, "loss_source": "probe"}
    settings.write_text(yaml.safe_dump({**SETTINGS, "domains": own, "weights": weights}))
    _, updates = plan(history)
    assert updates[0]["after"] == {"law": 0.8, "code": 0.2} != updates[1]["after"]
    assert all(update["applied"] for update in updates)
    assert f"settings: {settings}" in capsys.readouterr().out


def test_a_plan_is_reported_compared_and_trained_with_as_a_run_is(history):
    for name, sigma in (("slow", 1), ("fast", 4)):
        _, updates = plan(
            history, "weights.strategy=fostering", REFERENCE, f"weights.sigma={sigma}", name=name
        )
    folders = [history.parent.parent / name for name in ("slow", "fast")]
    page = (folders[1] / "report.html").read_text()
    assert "do not react to these weights" in page and 'aria-label="Weights"' in page
    slow, fast = read_runs(folders)
    assert fast.weight_steps.tolist() == [0, 10, 20, 30]
    assert fast.weights[-1].tolist() == list(updates[-1]["after"].values())
    assert fast.weights[-1][0] > slow.weights[-1][0]
    assert 'aria-label="weight of law"' in render([slow, fast])
    schedule = schedule_from_weights_jsonl(folders[1] / "weights.jsonl")
    assert [entry.weights for entry in schedule] == [update["after"] for update in updates]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["weights.strategy=fostering"], "compares with reference losses"),
        (["domains.names=[law]"], "the history has losses of an unknown domain 'code'"),
        (["--config", "none.yaml"], "none.yaml: no such file; give a YAML file with --config"),
    ],
)
def test_mistakes_are_one_line(history, capsys, more, message):
    assert plan(history, *more)[0] == constants.EXIT_USAGE
    assert message in capsys.readouterr().err


def test_a_run_is_not_replaced_by_a_replay_of_it(history, capsys):
    (history.parent / constants.METRICS_FILE).write_text("")
    assert plan(history, name="recorded")[0] == constants.EXIT_USAGE
    assert "holds a run" in capsys.readouterr().err and history.read_text() == HISTORY


def test_numbers_of_the_page_about_the_method(tmp_path):
    """docs/method.md quotes these from the histories beside it."""
    folder = REPOSITORY / "docs" / "method"
    reference = f"weights.reference={folder / 'reference.json'}"

    def last(history, *settings):
        out = tmp_path / "out"
        code = main(
            ["plan-weights", "--history", str(folder / history), "--out", str(out), reference, *settings]
        )
        assert code == 0
        return [json.loads(line) for line in (out / "weights.jsonl").read_text().splitlines()]

    updates = last("probe.jsonl", "weights.strategy=fostering", "weights.sigma=4")
    assert [round(w, 3) for w in updates[1]["after"].values()] == [0.209, 0.155, 0.175, 0.156, 0.156, 0.149]
    assert round(updates[-1]["after"]["law"], 3) == 0.463
    expansion = ("weights.strategy=expansion", "weights.target=law", "weights.delta=0.1")
    for epsilon, open_gates in ((0, 2), (0.003, 5), (0.01, 6), (0.1, 8)):
        updates = last("probe.jsonl", *expansion, f"weights.epsilon={epsilon}")
        assert sum(update["gate_open"] is True for update in updates) == open_gates


def test_no_torch_is_loaded(history):
    code = (
        "import sys\n"
        "from versatune_ds.cli.main import main\n"
        f"main(['plan-weights', '--history', {str(history)!r}, '--out', {str(history.parent / 'o')!r}])\n"
        "print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
