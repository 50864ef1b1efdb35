"""What a run records about the code it runs."""

from __future__ import annotations

import re
import subprocess

import torch

from versatune_ds.foundations.commit import git_commit


def test_the_commit_is_that_of_the_code_and_not_of_a_checkout_around_it(tmp_path):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    ours, installed = tmp_path / "ours.py", tmp_path / "installed.py"
    ours.write_text("a = 1\n")
    assert git_commit(ours) is None
    git("init")
    git("add", "ours.py")
    git("commit", "--message", "one")
    installed.write_text("")
    assert git_commit(installed) is None  # say, a virtual environment within another project
    commit = git_commit(ours)
    assert commit is not None and re.fullmatch("[0-9a-f]{12}", commit)
    ours.write_text("a = 2\n")
    assert git_commit(ours) == f"{commit}-dirty"


def test_an_unknown_accelerator_has_no_peak_and_that_is_said(monkeypatch, caplog):
    from types import SimpleNamespace

    from versatune_ds.engine import build

    monkeypatch.setattr(build, "describe_hardware", lambda device: {"device": "NVIDIA X1000"})
    unset, given = (SimpleNamespace(metrics=SimpleNamespace(peak_tflops=x)) for x in (None, 123.0))
    assert build.accelerator_peak_tflops(given, torch.device("cuda")) == 123.0
    assert build.accelerator_peak_tflops(unset, torch.device("cpu")) is None
    assert not caplog.records
    assert build.accelerator_peak_tflops(unset, torch.device("cuda")) is None
    assert "NVIDIA X1000 is not known" in caplog.text and "metrics.peak_tflops" in caplog.text
