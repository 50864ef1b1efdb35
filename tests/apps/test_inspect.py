"""`inspect` shows what is trained on, marks exactly the supervised part, and cannot be driven by the data."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import data_config, pairs, qwen_like_tokenizer, write_jsonl

from versatune_ds.apps.inspect import bar, inspect, spread, to_lines
from versatune_ds.apps.trace import escape, trace
from versatune_ds.config.load import write_resolved
from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import prepare
from versatune_ds.foundations.errors import ConfigError, DataError, StateError
from versatune_ds.report.page import MarkedText, Page, PageSection, Stretch, to_html


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown(config: Config, stream: io.StringIO | None = None, **options: Any) -> str:
    return "\n".join(to_lines(inspect(config, **options), stream or io.StringIO()))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    qwen_like_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": "red \x1b[31m?", "completion": "two\nlines \u202e caf\u00e9"}, *pairs(9)]
    sources = [
        {"path": str(write_jsonl(tmp_path / "law.jsonl", rows)), "domain": "law"},
        {"path": str(write_jsonl(tmp_path / "code.jsonl", pairs(5))), "domain": "code"},
    ]
    return data_config(tmp_path, tmp_path / "tokenizer", sources, pack_len=128)


def test_a_domain_without_data_does_not_hide_the_others(config: Config, tmp_path: Path) -> None:
    config = data_config(
        tmp_path, tmp_path / "tokenizer", [{"path": str(tmp_path / "law.jsonl"), "domain": "law"}]
    )
    prepare(config)
    assert "law sample 0" in shown(config, samples=1)


def test_samples_are_marked_and_escaped(config: Config, tmp_path: Path) -> None:
    prepare(config)
    text = shown(config, samples=1, packs=0)
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
    coloured = shown(config, Terminal(), samples=1, domain="code")
    assert "\x1b[32manswer 0.<|im_end|>\x1b[0m" in coloured
    assert "law sample" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[answer 0.<|im_end|>]]" in shown(config, Terminal(), samples=1, domain="code")


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def thinking(tmp_path: Path, name: str = "a.jsonl", **data: Any) -> Config:
    """A domain of one sample whose answer begins with a thought."""
    qwen_like_tokenizer(chat_template=THINKING).save_pretrained(tmp_path / "tokenizer")
    row = {"prompt": "<b>1 + 2?</b>", "completion": "<think>\nadd\n</think>\n\nThree."}
    write_jsonl(tmp_path / "a.jsonl", [row, {"prompt": "x"}])
    options = {"names": ("law",), "chat_template": "tokenizer", "on_bad_row": "skip", **data}
    return data_config(tmp_path, tmp_path / "tokenizer", tmp_path / name, **options)


def test_thoughts_are_told_from_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    config = thinking(tmp_path)
    prepare(config)
    assert "assistant\n[[thought: <think>\nadd\n</think>]][[\n\nThree.<|im_end|>]]\n" in shown(config)
    coloured = "\x1b[35m<think>\nadd\n</think>\x1b[0m\x1b[32m\n\nThree.<|im_end|>\x1b[0m"
    assert coloured in shown(config, Terminal())
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    moved = thinking(tmp_path)
    prepare(moved)
    assert "[[thought: <think>" in shown(moved)


def test_pieces_of_a_sample_know_what_their_tokens_are(tmp_path: Path) -> None:
    config = thinking(tmp_path, pack_len=20, overlong="split")
    prepare(config)
    text = shown(config, samples=9)
    assert "law sample 1:" in text
    assert "thought: " in text


def test_calls_results_thoughts_and_weights_of_a_row(tmp_path: Path) -> None:
    qwen_like_tokenizer().save_pretrained(tmp_path / "tokenizer")
    call = {"type": "function", "function": {"name": "rain", "arguments": {"where": "Oslo"}}}
    chat = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "reasoning_content": "look",
            "content": "",
            "tool_calls": [call],
            "weight": 0.5,
        },
        {"role": "tool", "content": "heavy rain"},
        {"role": "assistant", "content": "Yes."},
    ]
    row = {"messages": chat, "tools": [{"type": "function", "function": {"name": "rain", "parameters": {}}}]}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    options = {"names": ("law",), "chat_template": "hermes", "pack_len": 2048}
    config = data_config(tmp_path, tmp_path / "tokenizer", path, **options)
    prepare(config)
    followed = "\n".join(to_lines(trace(config, "1"), io.StringIO()))
    for part in (
        "format messages, tools rain",
        "--- assistant, weight 0.5, thoughts\nlook\n",
        '--- assistant, weight 0.5, call\n{"name": "rain", "arguments": {"where": "Oslo"}}',
        "--- tool\nheavy rain",
    ):
        assert part in followed
    for text in (followed, shown(config)):
        assert "[[0.5: thought: " in text
        assert "((tool result: heavy rain))" in text
        assert "[[Yes.<|im_end|>]]" in text
    masked = data_config(tmp_path, tmp_path / "tokenizer", path, reasoning="mask", **options)
    assert "((thought: <think>\nlook\n</think>" in "\n".join(to_lines(trace(masked, "1"), io.StringIO()))


def test_weights_are_shown() -> None:
    runs = [
        Stretch("a", "", 1.0),
        Stretch("b", "", 0.5),
        Stretch("c", "thought", 0.0),
        Stretch("d", "tool result", 0.0),
        Stretch("e", "", 0.0),
    ]
    page = Page("t", [PageSection("s", "s", texts=[MarkedText("", runs)])])
    assert "[[a]][[0.5: b]]((thought: c))((tool result: d))e" in to_lines(page, io.StringIO())
    line = "\x1b[32ma\x1b[0m\x1b[32m0.5: b\x1b[0m\x1b[2;35mc\x1b[0m\x1b[36md\x1b[0me"
    assert line in to_lines(page, Terminal())
    html = to_html(page)
    for part in (
        '" supervised">a<',
        'data-weight="0.5">b<',
        '"thought context">c<',
        '"tool-result context">d<',
    ):
        assert part in html


def test_the_page_is_whole_escaped_and_needs_nothing_else(tmp_path: Path) -> None:
    config = thinking(tmp_path)
    prepare(config)
    html = to_html(inspect(config))
    assert "&lt;b&gt;1 + 2?&lt;/b&gt;" in html
    assert '<span class="thought supervised">&lt;think&gt;' in html
    for forbidden in ("<b>", "<script", "http://", "https://", "<link", "@import"):
        assert forbidden not in html


def test_a_row_is_followed_from_its_text_to_its_tokens(tmp_path: Path) -> None:
    config = thinking(tmp_path)  # nothing is prepared
    text = "\n".join(to_lines(trace(config, "1"), io.StringIO()))
    parts = [
        '{"prompt": "<b>1 + 2?</b>", "completion": "<think>\\nadd',
        "domain law, format prompt_completion",
        "--- assistant\n<think>\nadd",
        "[[thought: <think>\nadd\n</think>]][[\n\nThree.<|im_end|>]]",
        " tokens\nposition",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    (last,) = [
        line for line in text.splitlines() if line.split()[2:3] == ["<|im_end|>"] and line.endswith("1")
    ]
    assert last.split()[1] == "2"
    rejected = "\n".join(to_lines(trace(config, "a.jsonl:2", domain="law"), io.StringIO()))
    assert '{"prompt": "x"}' in rejected
    assert "== not trained on\ncompletion is missing" in rejected
    assert "(missing_field)" in rejected
    for row, error, expected in (
        ("3", DataError, "has no line 3: the last one is 2"),
        ("b.jsonl:1", DataError, "no source holds it; there are .*a.jsonl"),
        ("first", ConfigError, "give N or FILE:N"),
        ("0", ConfigError, "from 1"),
    ):
        with pytest.raises(error, match=expected):
            trace(config, row)


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json"])
def test_rows_of_other_files_are_followed(tmp_path: Path, name: str) -> None:
    config = thinking(tmp_path, name)
    rows = [{"prompt": "Q?", "completion": "A.", "id": "7"}, {"prompt": "R?", "completion": "B.", "id": "8"}]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text(
            "prompt,completion,id\nQ?,A.,7\nR?,B.,8\n" if name == "a.csv" else json.dumps(rows)
        )
    text = "\n".join(to_lines(trace(config, "2"), io.StringIO()))
    assert '"id": "8"' in text
    assert "[[B.<|im_end|>]]" in text


def test_a_text_row_is_trained_on_as_a_whole(tmp_path: Path) -> None:
    qwen_like_tokenizer(chat_template=THINKING).save_pretrained(tmp_path / "tokenizer")
    source = {"path": str(tmp_path / "a.jsonl"), "domain": "law", "format": "text"}
    config = data_config(
        tmp_path, tmp_path / "tokenizer", [source], names=("law",), chat_template="tokenizer"
    )
    rows = [{"text": "All of it.", "finished": True}, {"text": "Cut he", "finished": False}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, cut = ("\n".join(to_lines(trace(config, n), io.StringIO())) for n in "12")
    assert "[[All of it.<|im_end|>]]" in whole and "[[Cut he]]" in cut


def test_statistics_and_packs(config: Config) -> None:
    caches = prepare(config).caches["train"]
    lines = shown(config, samples=0, packs=1).splitlines()
    law = next(line for line in lines if line.startswith("train law"))
    assert caches[0] is not None
    assert law.split()[2:4] == ["10", f"{caches[0].num_tokens:,}"]
    assert f"{caches[0].lengths.max():,}" in law
    assert any(line.startswith("15 samples fill") and "packs of 128 tokens" in line for line in lines)
    assert any(line.startswith("pack 0:") for line in lines)


def test_unknown_domains_and_unprepared_data_are_errors(config: Config) -> None:
    with pytest.raises(ConfigError, match="did you mean 'law'"):
        inspect(config, domain="lav")
    with pytest.raises(StateError, match="run: versatune-ds prepare --config CONFIG"):
        inspect(config)


def test_helpers() -> None:
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 5) == [0, 1]
    assert escape("a\tb\x00\u2028\n\U0001f600") == "a\\tb\\x00\u2028\n\U0001f600"
    assert bar(np.array([0, 1, 100])) == " ▁█"


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
    paged = call("inspect", *arguments, "--row", "2", "--html", str(tmp_path / "page.html"))
    assert (paged.returncode, paged.stdout) == (0, f"{tmp_path}/page.html\n"), paged.stderr
    assert "as rendered" in (tmp_path / "page.html").read_text()
