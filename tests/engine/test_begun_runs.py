"""A run that an earlier version of the program began goes on, with its settings, caches, checkpoint and logs.

`support/begun_at_812f8c4` was written by that commit on two ranks and ended with step 8. What lies there is
as after a crash that lost everything of the last four steps but the log lines.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from launching import REPOSITORY, read_jsonl, run_cases

pytestmark = pytest.mark.slow

BEGUN = REPOSITORY / "tests" / "support" / "begun_at_812f8c4"
CLOCK = ("_s", "_gib", "mfu")


def lines(run: Path, name: str) -> list[dict]:
    """A log without what belongs to the clock, and without what a later program may add to it."""
    known = read_jsonl(BEGUN / "run" / name)[-1].keys()
    found = read_jsonl(run / name)
    return [{key: line[key] for key in known if not key.endswith(CLOCK)} for line in found]


@pytest.fixture(scope="module")
def gone_on(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begun") / "begun"
    shutil.copytree(BEGUN, folder)
    case = {"config": "config.yaml", "overrides": [], "sabotage": None, "folder": str(folder)}
    run_cases(folder, 2, [case])
    return folder


@pytest.mark.parametrize("name", ["metrics.jsonl", "weights.jsonl", "eval.jsonl", "skipped_steps.jsonl"])
def test_it_goes_on_as_it_would_have(gone_on, name):
    """But for rounding: since then AdamW is fused on CPUs, and attention goes sample by sample."""
    if name == "skipped_steps.jsonl":
        assert (gone_on / "run" / name).read_bytes() == b""
        return
    ours, expected = lines(gone_on / "run", name), lines(BEGUN / "run", name)
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    assert near(ours, expected)
    assert not near([{**ours[-1], "step": 0}], expected[-1:])


def near(ours, expected) -> bool:
    """Equal, numbers to a relative 1e-4."""
    if isinstance(expected, dict):
        return ours.keys() == expected.keys() and all(near(ours[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(ours) == len(expected) and all(map(near, ours, expected))
    return ours == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)


def test_it_went_on_from_its_checkpoint(gone_on):
    old, new = (read_jsonl(folder / "run" / "metrics.jsonl") for folder in (BEGUN, gone_on))
    clocks = [a["unix_time_s"] == b["unix_time_s"] for a, b in zip(old, new, strict=True)]
    assert clocks == [True] * 4 + [False] * 4


def test_its_caches_are_the_ones_that_were_there(gone_on):
    for path in sorted(BEGUN.glob("cache/**/*")):
        if path.is_file():
            ours = gone_on / path.relative_to(BEGUN)
            assert ours.read_bytes() == path.read_bytes()
    assert len(list((gone_on / "cache").glob("*/unit.json"))) == len(list(BEGUN.glob("cache/*/unit.json")))


def test_the_report_reads_it(gone_on, tmp_path):
    from versatune_ds.cli.main import main

    page = tmp_path / "report.html"
    assert main(["report", str(gone_on / "run"), str(BEGUN / "run"), "--out", str(page)]) == 0
    assert "unix_time" not in page.read_text() and page.stat().st_size > 10_000
