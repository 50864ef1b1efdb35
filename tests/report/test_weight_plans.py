"""`versatune-ds plan-weights`: from a history to a table, a picture and numbers, without a model."""

import json
import subprocess
import sys

import pytest
import yaml
from launching import REPOSITORY

from versatune_ds.cli.main import main
from versatune_ds.foundations import constants

HISTORY = "step,law,code\n10,2.0,1.6\n20,1.8,1.7\n"
REFERENCE = "weights.reference={law: 1.0, code: 1.2}"


@pytest.fixture
def history(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(HISTORY)
    return path


def plan(history, *more) -> tuple[int, dict]:
    folder = history.parent / "out"
    code = main(["plan-weights", "--history", str(history), "--out", str(folder), *more])
    return code, json.loads((folder / "plan.json").read_text()) if code == 0 else {}


def test_variants_side_by_side(history, capsys):
    vary = ["--vary", "weights.strategy=fostering,expansion,uniform"]
    code, numbers = plan(history, *vary, REFERENCE, "weights.target=code", "weights.epsilon=0")
    assert code == 0
    fostering, expansion, uniform = numbers["variants"]
    # gamma 0.5 and 0.25 from 1/2 each: 0.75 : 0.625
    assert fostering["updates"][1]["after"]["law"] == pytest.approx(0.75 / 1.375)
    # open at first; then law fell, so phi of the others is 0 and the gate stays open
    assert [u["after"]["code"] for u in expansion["updates"]] == pytest.approx([0.5, 0.55, 0.6])
    assert uniform["updates"][-1]["after"] == {"law": 0.5, "code": 0.5}
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "50.0->60.0" in rows["strategy expansion"] and "2/2" in rows["strategy expansion"]
    assert "0.0 %" in rows["strategy uniform"] and "settings: defaults" in out
    assert "do not react to these weights" in out and "do not react" in numbers["note"]
    assert (history.parent / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_settings_of_the_run_beside_the_history_are_taken(history, tmp_path, capsys):
    config = {
        "run": {"dir": "x"}, "model": {"source": "x"}, "train": {"max_steps": 5},
        "batch": {"packs_per_step": 1},
        "data": {"train": [{"path": "x", "domain": "law"}]},
        "domains": {"names": ["law", "code"], "initial": {"law": 0.8, "code": 0.2}},
        "weights": {"strategy": "raw_loss"},
    }  # fmt: skip
    (tmp_path / constants.RESOLVED_CONFIG_FILE).write_text(yaml.safe_dump(config))
    _, numbers = plan(history)
    [variant] = numbers["variants"]
    assert variant["label"] == "raw_loss" and variant["updates"][0]["after"] == {"law": 0.8, "code": 0.2}
    assert f"settings: {tmp_path / constants.RESOLVED_CONFIG_FILE}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--vary", "optimizer.lr=1"], constants.EXIT_USAGE, "only domains and weights decide"),
        (["weights.strategy=fostering"], constants.EXIT_USAGE, "compares with reference losses"),
        (["domains.names=[law]"], constants.EXIT_USAGE, "the history has losses of an unknown domain 'code'"),
    ],
)
def test_mistakes_are_one_line(history, capsys, more, code, message):
    assert plan(history, *more)[0] == code
    assert message in capsys.readouterr().err


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
        return json.loads((out / "plan.json").read_text())["variants"][0]["updates"]

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
