"""A followed page says how its run is, reloads itself while it goes on, and stays when it is over."""

from __future__ import annotations

import json
import os
import re
import socket
import time

import numpy as np
import pytest

from versatune_ds.cli.main import main
from versatune_ds.foundations.errors import StateError
from versatune_ds.report import report
from versatune_ds.report.follow import state_of
from versatune_ds.report.measures import by_tokens
from versatune_ds.report.report import follow_report, render
from versatune_ds.report.runs import read_run

GONE = 2**22 + 1
"""No process has such a number."""


def hold(folder, pid, host=None):
    """What a living run leaves in its folder."""
    holder = {"pid": pid, "host": host or socket.gethostname(), "started_at": "now"}
    (folder / "run.lock.json").write_text(json.dumps(holder))


def age(folder, seconds):
    for file in folder.glob("*.jsonl"):
        os.utime(file, (time.time() - seconds,) * 2)


def test_how_a_run_is(make_run):
    folder = make_run(steps=12)

    def said():
        return state_of(read_run(folder))

    assert said() == ("ended, 12 of 20 steps", True)
    hold(folder, os.getpid())
    assert said() == ("running, 12 of 20 steps", False)
    age(folder, 3600)  # a step takes 2 s
    text, is_over = said()
    assert text.startswith("stands still, 12 of 20 steps: nothing recorded since") and not is_over
    age(folder, 100)
    assert said().text.startswith("running")
    hold(folder, GONE)
    assert said().is_over and said().text.startswith(f"killed, 12 of 20 steps: process {GONE}")
    hold(folder, GONE, "elsewhere")
    assert said().text.startswith("running")


def test_long_steps_are_not_standing_still(make_run):
    folder = make_run(steps=3, step_s=60.0)
    hold(folder, os.getpid())
    age(folder, 500)
    assert not state_of(read_run(folder)).text.startswith("stands")
    age(folder, 700)
    assert state_of(read_run(folder)).text.startswith("stands")


def test_the_page_is_written_until_the_run_is_over(make_run, monkeypatch, capsys):
    folder = make_run(steps=12)
    hold(folder, os.getpid())
    pages, others_sleep = [], report.time.sleep

    def sleep(seconds):
        if seconds != 7:  # other threads of this process
            return others_sleep(seconds)
        pages.append((folder / "report.html").read_text())
        if len(pages) == 2:
            (folder / "run.lock.json").unlink()

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert main(["report", str(folder), "--follow", "7"]) == 0
    assert len(pages) == 2 and all('http-equiv="refresh" content="7"' in page for page in pages)
    assert "run: running, 12 of 20 steps" in pages[0]
    last = (folder / "report.html").read_text()
    assert "http-equiv" not in last and "run: ended, 12 of 20 steps" in last and "<script" not in last


def test_the_page_stays_after_ctrl_c(make_run, monkeypatch):
    folder = make_run()
    hold(folder, os.getpid())

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.time, "sleep", interrupt)
    assert "http-equiv" not in follow_report([folder]).read_text()


def test_runs_are_lined_up_by_tokens(make_run):
    small, large = read_run(make_run("small")), read_run(make_run("large", steps=10, real_tokens=2000))
    moved = [by_tokens(run) for run in (small, large)]
    assert np.array_equal(moved[0].steps, 1000 * small.steps)
    assert moved[0].steps[-1] == moved[1].steps[-1] == 20_000
    assert np.array_equal(moved[1].eval_steps, [0, 20_000]) and np.array_equal(
        moved[1].update_steps, [20_000]
    )
    page = render([small, large], by="tokens")
    assert "tokens trained on" in page and "optimizer step<" not in page
    assert "20 steps, complete" in page  # tables still count steps
    assert len(re.findall("optimizer step<", render([small, large]))) > 5


def test_a_run_without_tokens_cannot_be_lined_up_by_them(make_run):
    folder = make_run()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": x["step"]}) + "\n" for x in lines))
    with pytest.raises(StateError, match="no real_tokens"):
        by_tokens(read_run(folder))
