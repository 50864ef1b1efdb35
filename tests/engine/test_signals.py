"""The file that tells a batch script that a run stopped as asked; tests/cluster uses it in real jobs."""

from __future__ import annotations

import json

from versatune_ds.engine.faults.signals import STOP_FILE_VARIABLE, note_stopped


def test_rank_0_writes_the_file_that_the_environment_names(tmp_path, monkeypatch):
    path = tmp_path / "stopped"
    monkeypatch.setenv(STOP_FILE_VARIABLE, str(path))
    monkeypatch.setenv("RANK", "1")
    note_stopped(3, 10)
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    note_stopped(3, 10)
    assert json.loads(path.read_text()) == {"step": 3, "total_steps": 10}


def test_without_the_variable_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(STOP_FILE_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    note_stopped(3, 10)
    assert not list(tmp_path.iterdir())
