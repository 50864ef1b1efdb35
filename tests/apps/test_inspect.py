"""`inspect` shows what is trained on, marks exactly the supervised part, and cannot be driven by the data."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared import data_config, pairs, qwen_like_tokenizer, write_jsonl

from versatune_ds.apps.inspect import Paint, bar, escape, inspect, spread
from versatune_ds.config.load import write_resolved
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import prepare
from versatune_ds.foundations.errors import ConfigError, StateError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def config(tmp_path: Path) -> Config:
    qwen_like_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": "red \x1b[31m?", "completion": "two\nlines \u202e caf\u00e9"}, *pairs(9)]
    sources = [
        {"path": str(write_jsonl(tmp_path / "law.jsonl", rows)), "domain": "law"},
        {"path": str(write_jsonl(tmp_path / "code.jsonl", pairs(5))), "domain": "code"},
    ]
    return data_config(tmp_path, tmp_path / "tokenizer", sources, pack_len=128)


def test_samples_are_marked_and_escaped(config: Config, tmp_path: Path) -> None:
    prepare(config)
    text = "\n".join(inspect(config, io.StringIO(), samples=1, packs=0))
    assert (
        "<|im_start|>user\nred \\x1b[31m?<|im_end|>\n<|im_start|>assistant\n"
        "[[two\nlines \\u202e caf\u00e9<|im_end|>]]\n"
    ) in text
    assert f"law sample 0: {tmp_path}/law.jsonl:1," in text
    assert "\x1b" not in text


def test_colours_on_a_terminal_only_and_not_with_no_color(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    prepare(config)
    coloured = "\n".join(inspect(config, Terminal(), samples=1, domain="code"))
    assert "\x1b[32manswer 0.<|im_end|>\x1b[0m" in coloured
    assert "law sample" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[answer 0.<|im_end|>]]" in "\n".join(inspect(config, Terminal(), samples=1, domain="code"))


def test_statistics_and_packs(config: Config) -> None:
    caches = prepare(config).caches["train"]
    lines = list(inspect(config, io.StringIO(), samples=0, packs=1))
    law = next(line for line in lines if line.startswith("train law"))
    assert caches[0] is not None
    assert law.split()[2:4] == ["10", f"{caches[0].num_tokens:,}"]
    assert f"{caches[0].lengths.max():,}" in law
    assert any(line.startswith("15 samples fill") and "packs of 128 tokens" in line for line in lines)
    assert any(line.startswith("pack 0:") for line in lines)


def test_unknown_domains_and_unprepared_data_are_errors(config: Config) -> None:
    with pytest.raises(ConfigError, match="did you mean 'law'"):
        list(inspect(config, io.StringIO(), domain="lav"))
    with pytest.raises(StateError, match=r"run: versatune-ds prepare --config here\.yaml"):
        list(inspect(config, io.StringIO(), config_path="here.yaml"))


def test_helpers() -> None:
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]
    assert escape("a\tb\x00\u2028\n\U0001f600") == "a\\tb\\x00\u2028\n\U0001f600"
    assert bar(np.array([0, 1, 100])) == " ▁█"
    assert Paint(io.StringIO()).bars.isascii()


def test_the_command_line(config: Config, tmp_path: Path) -> None:
    """Both verbs, with overrides, as a user calls them."""
    write_resolved(config, tmp_path / "c.yaml")

    def call(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "versatune_ds.cli.main", verb, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )

    for expected in ("prepared: ", "nothing to do"):
        done = call("prepare", "--config", str(tmp_path / "c.yaml"), "batch.pack_len=200")
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    arguments = [
        "--config",
        str(tmp_path / "c.yaml"),
        "--domain",
        "code",
        "--samples",
        "1",
        "batch.pack_len=200",
    ]
    shown = call("inspect", *arguments)
    assert shown.returncode == 0, shown.stderr
    assert "[[answer 0.<|im_end|>]]" in shown.stdout
    assert "packs of 200 tokens" in shown.stdout
