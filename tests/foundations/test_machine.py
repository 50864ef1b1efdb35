"""What a run records about the code it runs."""

from __future__ import annotations

import re
import subprocess

from versatune_ds.foundations.machine import git_commit


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
