"""Which commit a file of this source tree belongs to."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_commit(file: Path = Path(__file__)) -> str | None:
    """Commit of the source tree that `file` belongs to, "-dirty" appended when tracked files differ.

    None outside of git, and for an installed copy that lies in the checkout of something else.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=file.parent, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "--short=12", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None
