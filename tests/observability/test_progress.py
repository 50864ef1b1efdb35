"""What the console says: facts of a step, arrows, moved weights; nothing on other ranks."""

import io
import math
import os

import pytest

from versatune_ds.observability.progress import Progress, duration, is_terminal, short_names, si, weights_text
from versatune_ds.observability.records import EvalRecord


class Ascii(io.StringIO):
    encoding = "ascii"


def printed(stream):
    return stream.getvalue().splitlines()


def test_a_line_has_step_losses_rate_and_eta(make_step):
    stream = Ascii()
    progress = Progress(4, ["law", "code"], stream=stream, interval_s=0)
    progress.step(make_step(1))
    progress.step(make_step(2, domain_loss={"law": 2.0, "code": 5.0}, mfu=0.415, mfu_6n=0.47))
    first, second = printed(stream)
    assert first.startswith("step 1/4 25% | loss 3.990 | law 2.99 code 3.99 | 500 tok/s | ETA")
    # smoothed over about five steps: 0.8 x 2.99 + 0.2 x 2.0 = 2.792; 0.8 x 3.99 + 0.2 x 5.0 = 4.192
    assert "law 2.79v code 4.19^" in second and "MFU 41.5% (6N 47.0%)" in second


def test_lines_come_at_intervals_first_last_and_skipped_always(make_step):
    stream = Ascii()
    progress = Progress(10, ["law", "code"], stream=stream, interval_s=1e6)
    for step in range(1, 11):
        reason = "loss spike" if step == 5 else None
        progress.step(
            make_step(step, skipped=step == 5, skip_reason=reason, loss=math.nan if reason else 2.0)
        )
    lines = printed(stream)
    assert [line.split(" | ")[0] for line in lines] == [
        "step 1/10 10%",
        "step 5 SKIPPED (loss spike; parameters unchanged)",
        "step 10/10 100%",
    ]
    assert "loss -" in lines[1] and "took" in lines[2]


def test_an_absent_domain_keeps_its_last_loss(make_step):
    stream = Ascii()
    progress = Progress(3, ["law", "code"], stream=stream, interval_s=0)
    progress.step(make_step(1, domain_loss={"law": None, "code": 2.0}))
    progress.step(make_step(2, domain_loss={"law": 3.0, "code": None}))
    assert "| code 2.00 |" in printed(stream)[0]
    assert "| law 3.00 code 2.00 |" in printed(stream)[1]


def test_weight_updates_and_alarms(make_step):
    stream = Ascii()
    progress = Progress(3, ["law", "code"], stream=stream)
    line = {
        "step": 2,
        "before": {"law": 0.25, "code": 0.75},
        "after": {"law": 0.3, "code": 0.7},
        "applied": False,
        "alarms": ["weight of law is at its cap"],
    }
    progress.weight_update(line)
    assert printed(stream) == [
        "weights after step 2: law 25.0->30.0 code 75.0->70.0 (shadow: not applied)",
        "  alarm: weight of law is at its cap",
    ]


def test_weights_that_did_not_move_are_not_listed():
    before = {"law": 0.5, "code": 0.3, "other": 0.2}
    after = {"law": 0.5, "code": 0.1, "other": 0.4}
    assert weights_text(before, after) == "code 30.0->10.0 other 20.0->40.0"
    assert weights_text(before, before) == ""


def test_evaluation_line():
    stream = Ascii()
    progress = Progress(3, ["law", "code"], stream=stream)
    progress.evaluation(
        EvalRecord(
            step=0,
            domain_loss={"law": 2.0, "code": None},
            domain_supervised_tokens={"law": 10, "code": 0},
            eval_s=61.0,
        )
    )
    assert printed(stream) == ["eval after step 0: loss 2.000 | law 2.000 | 1m01s"]


def test_other_ranks_are_silent(make_step):
    stream = Ascii()
    progress = Progress(1, ["law", "code"], stream=stream, is_main=False)
    progress.step(make_step(1))
    progress.note("text")
    progress.weight_update({"step": 1, "before": {}, "after": {}})
    progress.close()
    assert stream.getvalue() == ""


def test_bar_shows_the_step_count_and_keeps_notes(make_step):
    stream = Ascii()
    progress = Progress(3, ["law", "code"], stream=stream, bar=True, done_steps=1)
    progress.step(make_step(2))
    progress.note("a note")
    progress.step(make_step(3))
    progress.close()
    assert "a note" in stream.getvalue()
    assert "3/3 100%" in stream.getvalue() and "loss 3.970" in stream.getvalue()


@pytest.mark.parametrize(("columns", "drawn"), [(100, True), (0, False)])
def test_a_terminal_without_a_width_gets_lines(monkeypatch, columns, drawn):
    class Terminal(Ascii):
        def isatty(self):
            return True

        def fileno(self):
            return 2

    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((columns, 30)))
    assert is_terminal(Terminal()) is drawn
    assert is_terminal(Ascii()) is False


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0"),
        (3.14159, "3.14"),
        (950, "950"),
        (12345, "12.3k"),
        (9999, "10.0k"),
        (4.57e6, "4.57M"),
    ],
)
def test_si(value, text):
    assert si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (42, "42s"), (192, "3m12s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_names_are_cut_only_where_they_stay_different():
    names = ["law", "customer_support_a", "customer_support_b", "mathematics_contest"]
    assert short_names(names) == {
        "law": "law",
        "customer_support_a": "customer_support_a",
        "customer_support_b": "customer_support_b",
        "mathematics_contest": "mathematic",
    }
