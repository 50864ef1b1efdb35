"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from launching import REPOSITORY
from recorded_runs import make_run, make_step  # noqa: F401 (fixtures)

if not torch.cuda.is_available():
    # Without a GPU our kernels run in Triton's interpreter; Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def corpus_folder() -> Path:
    """Folder with the six-domain corpus (train/, eval/, bad/); tests that need it are skipped without it."""
    folder = Path(os.environ.get("VERSATUNE_CORPUS", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "train").is_dir():
        pytest.skip(f"no corpus at {folder}; set VERSATUNE_CORPUS to a folder with train/ and eval/")
    return folder
