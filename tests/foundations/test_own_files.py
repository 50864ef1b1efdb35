"""Only files that this program wrote are replaced, by whatever verb."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from versatune_ds.cli.main import main
from versatune_ds.foundations.constants import EXIT_STATE
from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import require_own

RUN = Path(__file__).resolve().parents[1] / "support" / "begun_at_812f8c4" / "run"


def test_a_file_is_ours_by_its_sign(tmp_path):
    require_own(tmp_path, {"new": "sign"})
    require_own(tmp_path / "nowhere", {"new": "sign"})
    for name, text in (("ours", '{"kind": "sign"}'), ("empty", "")):
        (tmp_path / name).write_text(text)
        require_own(tmp_path, {name: "sign"})
    (tmp_path / "theirs").write_text("notes")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StateError, match=r"holds theirs, folder, which this program did not write"):
        require_own(tmp_path, {"ours": "sign", "theirs": "sign", "folder": "sign"})


HISTORY = str(RUN / "weights.jsonl")
WRITERS = [
    # what is there, the command, where it would write
    ("notes.html", ["report", str(RUN), "--out"], "notes.html"),
    ("page/report.html", ["report", str(RUN), "--out"], "page"),
    ("out/run.json", ["plan-weights", "--history", HISTORY, "--out"], "out"),
    ("out/report.html", ["plan-weights", "--history", HISTORY, "--out"], "out"),
    ("photo.png", ["detect", "--compare", "{knowledge}", "--out"], "photo.png"),
    ("out/stage1_correctness.json", ["evidence", "--out"], "out"),
    ("out/summary.md", ["evidence", "--out"], "out"),
    ("out/x.json", ["bench", "--shape", "tiny", "--name", "x", "--out"], "out"),
    ("out/comparison.md", ["bench", "--page"], "out"),
    ("out/reference.json", ["reference", "--config", "{config}", "--losses", "law=1", "--out"], "out"),
]


@pytest.mark.parametrize(("there", "command", "target"), WRITERS)
def test_a_verb_does_not_replace_what_is_not_its_own(tmp_path, capsys, there, command, target):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    config, knowledge = tmp_path / "c.yaml", tmp_path / "k.json"
    settings = {
        "run": {"dir": "r"},
        "model": {"source": "m"},
        "data": {"train": [{"path": "a", "domain": "law"}]},
    }
    settings |= {"domains": {"names": ["law"]}, "batch": {"packs_per_step": 1}, "train": {"max_steps": 1}}
    config.write_text(json.dumps(settings))
    knowledge.write_text(json.dumps({"domains": {"law": 1.0}}))
    words = [word.format(config=config, knowledge=knowledge) for word in command]
    assert main([*words, str(tmp_path / target)]) == EXIT_STATE
    said = capsys.readouterr().err
    assert f"holds {Path(there).name}, which this program did not write" in said and "another" in said
    assert (tmp_path / there).read_text() == "mine"
    written = {"c.yaml", "k.json", there.split("/")[0]}
    assert {path.name for path in tmp_path.iterdir()} == written


@pytest.mark.parametrize(
    "there",
    [
        "runs/base/notes.md",
        "model/config.json",
        "results/summary.json",
        "results/index.html",
        "reference.json",
    ],
)
def test_a_study_does_not_replace_what_no_study_wrote(tmp_path, there, monkeypatch):
    """Found before anything is trained."""
    from versatune_ds.apps.study import run as study_run
    from versatune_ds.apps.study.config import load_study

    path = tmp_path / "study" / there
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    rows = "".join(json.dumps({"prompt": f"q {i}", "completion": "a b c " * 60}) + "\n" for i in range(40))
    raw = {
        "dir": str(tmp_path / "study"),
        "corpus": str(tmp_path),
        "seeds": [1],
        "model": {"vocab_size": 512},
        "pretraining": {"mixture": {"law": 1.0}},
        "baselines": ["uniform"],
        "arms": {"uniform": {}},
        "settings": {
            "data": {
                split: [{"path": f"{{corpus}}/{split}.jsonl", "domain": "law"}] for split in ("train", "eval")
            },
            "domains": {"names": ["law"]},
            "batch": {"packs_per_step": 1, "pack_len": 64},
            "train": {"max_steps": 1},
        },
    }
    raw["settings"]["data"] |= {"chat_template": "chatml", "overlong": "drop", "num_workers": 1}
    for split in ("train", "eval"):
        (tmp_path / f"{split}.jsonl").write_text(rows)
    (tmp_path / "study.yaml").write_text(json.dumps(raw))
    monkeypatch.delenv("VERSATUNE_CORPUS", raising=False)
    monkeypatch.setattr(study_run.StudyWorkers, "_start", lambda self: pytest.fail("a worker was started"))
    monkeypatch.setattr(study_run, "train_tokenizer", lambda *_: 512)
    monkeypatch.setattr(study_run, "prepare", lambda _: SimpleNamespace(table=str, caches={}))
    with pytest.raises(StateError, match=r"(did not|no study) wr"):
        study_run.run_study(load_study(tmp_path / "study.yaml"))
    assert path.read_text() == "mine"


def test_its_own_files_are_replaced(tmp_path):
    for _ in range(2):
        assert main(["report", str(RUN), "--out", str(tmp_path / "page.html")]) == 0
        assert main(["plan-weights", "--history", HISTORY, "--out", str(tmp_path / "out")]) == 0
