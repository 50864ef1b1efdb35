"""Progress of countable work: lines at their time, the last one always, nothing on other ranks."""

from versatune_ds.observability.counting import WorkProgress


def test_lines_say_how_far_it_is(capsys):
    progress = WorkProgress("judging", "texts", 10, done=4, interval_s=0.0)
    progress.advance(3)
    progress.advance(3)
    progress.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("judging: 7/10 texts | ") and "ETA" in first
    assert last.startswith("judging: 10/10 texts | ") and "took" in last


def test_only_the_last_line_is_sure_and_other_ranks_are_silent(capsys):
    for is_main in (True, False):
        progress = WorkProgress("generating", "texts", 2, is_main=is_main, interval_s=1e9)
        progress.advance(1)
        progress.advance(1)
    assert capsys.readouterr().err.count("\n") == 1
