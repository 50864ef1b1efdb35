"""A whole small study from the command line: trained, kept, trained again only where something changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import REPOSITORY


def study(folder: Path, *overrides: str, code: int = 0) -> str:
    """`versatune-ds study` on the shipped sample; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment.pop("VERSATUNE_CORPUS", None)
    done = subprocess.run(
        [sys.executable, "-m", "versatune_ds.cli.main", "study", "--config", "configs/studies/quick.yaml",
         f"dir={folder}", *overrides],
        cwd=REPOSITORY, env=environment, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_small_study_from_raw_files_to_its_page(tmp_path):
    folder = tmp_path / "study"
    # an arm of its own data, which nobody else prepares
    own = 'arms.law_only.data={train: [{path: "{corpus}/train/law.jsonl", domain: law}]}'
    out = study(folder, own)
    assert "[12/12]" in out and str(folder / "results" / "index.html") in out
    summary = json.loads((folder / "results" / "summary.json").read_text())
    arms = summary["arms"]
    assert list(arms) == ["uniform", "constant", "fostering_linear", "law_only", "law_expansion"]
    assert arms["uniform"]["token_shares"]["law"] == pytest.approx(1 / 6, abs=0.06)
    assert arms["law_only"]["token_shares"]["law"] == 1.0
    assert arms["fostering_linear"]["weights"]["moved"] > 0 == arms["constant"]["weights"]["moved"]
    assert (
        arms["law_only"]["domain_change"]["law"]["mean"] < arms["uniform"]["domain_change"]["law"]["mean"] < 0
    )
    # arms with one seed are trained on one budget; packs are filled a little differently
    tokens = [arm["tokens"]["mean"] for arm in arms.values()]
    assert max(tokens) < 1.1 * min(tokens)
    assert "Traceback" not in out
    assert "| fostering_linear |" in (folder / "results" / "results.md").read_text()
    page = (folder / "results" / "index.html").read_text()
    assert "fostering_linear_seed-11" in page and 'aria-label="weight of law"' in page  # arms that moved
    assert "constant_seed-11" not in page

    def finished() -> dict[str, int]:
        return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("runs/*/finished.json")}

    before = finished()
    assert len(before) == 12
    (folder / "runs" / "base" / "finished.json").unlink()  # as after a kill between export and this file
    out = study(folder, own, "arms.fostering_linear.weights.sigma=2")
    assert "fostering_linear_seed-11 was trained with other settings" in out
    after = finished()
    assert {name for name in after if after[name] != before[name]} == {
        "fostering_linear_seed-11", "base"
    }  # fmt: skip
    again = json.loads((folder / "results" / "summary.json").read_text())["arms"]
    assert again["law_only"] == arms["law_only"]
    assert again["fostering_linear"] != arms["fostering_linear"]


def test_a_missing_corpus_is_named(tmp_path):
    out = study(tmp_path, f"corpus={tmp_path / 'none'}", code=3)
    assert "no folder with the corpus; set `corpus`, or VERSATUNE_CORPUS" in out and "Traceback" not in out
