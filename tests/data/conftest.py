"""Fixtures of the tests of data preparation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prepared import qwen_like_tokenizer

from versatune_ds.data.encode import encoder as encode


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tokenizer with the special tokens of Qwen2.5."""
    folder = tmp_path_factory.mktemp("tokenizer")
    qwen_like_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def encoded_blocks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with every block that is encoded in this process."""
    calls: list[Any] = []
    original = encode.encode_block

    def count(task: Any, settings: Any) -> Any:
        calls.append(task)
        return original(task, settings)

    monkeypatch.setattr(encode, "encode_block", count)
    return calls


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, also after a test that set up its own handlers."""
    logger = logging.getLogger("versatune_ds")
    propagate, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.INFO, logger="versatune_ds"):
        yield caplog
    logger.propagate = propagate
