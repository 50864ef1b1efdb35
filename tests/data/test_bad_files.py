# ruff: noqa: E501  (one line per file in the tables)
"""Malformed files: each gives the right error, or the right rows and reasons, under both policies."""

from __future__ import annotations

import gzip
import json
import lzma
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from prepared import data_config, pairs, write_jsonl

from versatune_ds.config.schema import Config
from versatune_ds.data.cache.prepare import PreparedData, prepare
from versatune_ds.foundations.errors import DataError


class Outcome(NamedTuple):
    """What a file must give."""

    samples: int | None
    """Samples with on_bad_row: skip; None: an error all the same."""
    error: str | None
    """Part of the error text with on_bad_row: error; None: no error."""
    line: int | None = None
    """Place in that error."""
    row: int | None = None
    rejected: dict[str, int] = {}  # noqa: RUF012
    """Reasons with on_bad_row: skip."""
    repeated: tuple[int, int] = (0, 0)
    """Repeated rows, and answers that conflict."""


CORPUS_FILES = {
    "01_truncated.json": Outcome(
        9, "ends in the middle of row 10", line=47, row=10, rejected={"truncated_file": 1}
    ),
    "02_truncated_last_line.jsonl": Outcome(9, "not valid JSON", line=10, rejected={"invalid_json": 1}),
    "03_invalid_utf8.jsonl": Outcome(6, "are not UTF-8", line=4, rejected={"invalid_utf8": 1}),
    "04_missing_fields.jsonl": Outcome(4, "output is missing", line=2, rejected={"missing_field": 4}),
    "05_empty_output.jsonl": Outcome(5, "is empty", line=1, rejected={"empty_response": 2, "null_field": 1}),
    "08_wrong_types.jsonl": Outcome(2, "instruction is a number", line=2, rejected={"wrong_type": 6}),
    "09_no_assistant.jsonl": Outcome(2, "no assistant turn", line=2, rejected={"no_assistant_turn": 5}),
    "11_empty_file.jsonl": Outcome(None, "the file is empty"),
    "12_bom.jsonl": Outcome(6, None),
    "13_crlf.jsonl": Outcome(6, None),
    "15_duplicate_rows.jsonl": Outcome(34, None, repeated=(29, 1)),
    "16_zero_length_strings.jsonl": Outcome(None, "is empty", line=1),
    "17_wrong_column.parquet": Outcome(None, "found the columns text, label", row=1),
}

HUGE = "06_huge_line_5mb.jsonl"
GOOD = [json.dumps(row) for row in pairs(20)]
LINES = "\n".join(GOOD) + "\n"


def damaged_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"prompt": [str(i) * 50 for i in range(3000)], "completion": ["x"] * 3000}),
        sink,
        row_group_size=500,
    )
    data = bytearray(sink.getvalue().to_pybytes())
    data[len(data) // 3 : len(data) // 3 + 400] = bytes(400)
    return bytes(data)


def parquet(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def turns(*pairs: tuple[str, Any]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]})


def arrow_stream() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(pairs(3))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


NESTED = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
MADE_FILES: dict[str, tuple[str | bytes | Callable[[], bytes], Outcome]] = {
    "cut.json": ("[" + ",\n".join(GOOD)[:-5], Outcome(19, "middle of row 20", line=20, row=20, rejected={"truncated_file": 1})),
    "cut_after_comma.json": ("[" + GOOD[0] + ",", Outcome(1, "without ]", row=2, line=1, rejected={"truncated_file": 1})),
    "cut_line.jsonl": (LINES[:-9], Outcome(19, "cut off", line=20, rejected={"invalid_json": 1})),
    "object.json": (json.dumps({"all": pairs(3)}, indent=1), Outcome(None, "begins with an object; allowed: a list")),
    "object_on_a_line.json": (json.dumps({"all": pairs(3)}), Outcome(None, "found the columns all", line=1)),
    "uneven_columns.json": ('{"prompt": ["a", "b"], "completion": ["x"]}', Outcome(None, r"different lengths \(prompt 2, completion 1\)")),
    "bad_cell.json": ('{"prompt": ["a", ""], "completion": ["x", "y"]}', Outcome(1, "the prompt .* is empty", row=2, rejected={"empty_prompt": 1})),
    "comma.jsonl": (f"{GOOD[0]},\n{GOOD[1]}", Outcome(1, "a comma after the object; remove it", line=1, rejected={"invalid_json": 1})),
    "comma_inside.jsonl": (GOOD[0] + '\n{"prompt": "a", "completion": "b",}', Outcome(1, "a comma in front of }; remove it", line=2, rejected={"invalid_json": 1})),
    "two_on_a_line.jsonl": (f"{GOOD[0]} {GOOD[1]}\n{GOOD[2]}", Outcome(1, "two objects on one line", line=1, rejected={"invalid_json": 1})),
    "python.jsonl": (f"{GOOD[0]}\n{pairs(1)[0]}", Outcome(1, "single quotes.*json.dumps", line=2, rejected={"invalid_json": 1})),
    "xz.jsonl": (lzma.compress(LINES.encode()), Outcome(None, r"the content is xz \(.xz\), not text")),
    "list_on_a_line.jsonl": (f"[{GOOD[0]}, {GOOD[1]}]", Outcome(None, r"found a list: .*name the file \.json\)", line=1)),
    "list.jsonl": ("[\n" + ",\n".join(GOOD[:2]) + "\n]", Outcome(1, "a list over several lines; name the file .json", line=1, rejected={"invalid_json": 3})),
    "lines.json": (LINES, Outcome(20, None)),
    "no_list.json": ("3", Outcome(None, "allowed: a list of objects")),
    "other_values.json": (f"[{GOOD[0]}, 5, null, [1], {GOOD[1]}]", Outcome(2, "found a number: 5", line=1, row=2, rejected={"not_an_object": 3})),
    "bad_element.json": (f'[{GOOD[0]},\n{{"prompt": x}},\n{GOOD[1]}]', Outcome(2, "not valid JSON", line=2, row=2, rejected={"invalid_json": 1})),
    "trailing_comma.json": (f"[{GOOD[0]},]", Outcome(1, "nothing between two commas", line=1, row=2, rejected={"invalid_json": 1})),
    "two_lists.json": (f"[{GOOD[0]}]\n[{GOOD[1]}]", Outcome(1, "but the file goes on", line=1, row=2, rejected={"damaged_file": 1})),
    "empty_list.json": ("[ ]", Outcome(None, "holds no row")),
    "blank.jsonl": ("\n \r\n\n", Outcome(None, "holds no row")),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:12], Outcome(None, "ends too early")),
    "cut.jsonl.zst": (zstandard.compress(LINES.encode())[:-6], Outcome(None, "ends too early")),
    "no_gzip.jsonl.gz": (LINES, Outcome(None, "cannot be unpacked as .gz")),
    "gzip.jsonl": (gzip.compress(LINES.encode()), Outcome(None, "the content is gzip")),
    "nul.jsonl": (GOOD[0] + "\n" + "\0" * 99 + "\n" + GOOD[1], Outcome(2, "not valid JSON", line=2, rejected={"invalid_json": 1})),
    "utf16.jsonl": (LINES.encode("utf-16"), Outcome(None, "UTF-16.*iconv")),
    "deep.jsonl": (GOOD[0] + "\n" + "[" * 100_000 + "\n", Outcome(1, "nested too deeply", line=2, rejected={"invalid_json": 1})),
    "surrogate.jsonl": (GOOD[0] + '\n{"prompt": "\\ud800", "completion": "x"}', Outcome(1, "surrogate", line=2, rejected={"lone_surrogate": 1})),
    "surrogate_pair.jsonl": ('{"prompt": "\\ud83d\\ude00", "completion": "x"}', Outcome(1, None)),
    "huge_integer.jsonl": (GOOD[0] + '\n{"prompt": ' + "9" * 5000 + "}", Outcome(1, "not readable as JSON", line=2, rejected={"invalid_json": 1})),
    "twice.jsonl": (GOOD[0] + '\n{"prompt": "a", "prompt": "b", "completion": "x"}', Outcome(1, "stands twice", line=2, rejected={"duplicate_key": 1})),
    "roles.jsonl": (
        "\n".join([turns(("user", "Q"), ("assistant", "A")), turns(("robot", "Q"), ("assistant", "A")), turns(("user", "Q"), ("assistant", None))]),
        Outcome(1, "is 'robot'; allowed: system, user, assistant", line=2, rejected={"unknown_role": 1, "null_field": 1}),
    ),
    "stop.jsonl": (GOOD[0] + '\n{"prompt": "a", "completion": "b<|im_end|>c"}', Outcome(1, "text of the stop token", line=2, rejected={"stop_token_in_text": 1})),
    "other_format.jsonl": (GOOD[0] + '\n{"instruction": "a", "output": "b"}', Outcome(1, "format alpaca", line=2, rejected={"other_format": 1})),
    "tokens.jsonl": ('{"input_ids": [1, 2], "labels": [-100, 2]}\n{"input_ids": [1, 999999], "labels": [-100, 999999]}\n{"input_ids": [1, 2], "labels": [1, -100]}', Outcome(1, "allowed: 0 ..", line=2, rejected={"invalid_token": 1, "nothing_supervised": 1})),
    "padding.jsonl": ('{"input_ids": [1, 2, 3], "labels": [-100, -100, 3], "attention_mask": [1, 1, 1]}\n{"input_ids": [0, 2, 3], "labels": [-100, -100, 3], "attention_mask": [0, 1, 1]}', Outcome(1, r"attention_mask\[0\] is 0.*Take the padding off", line=2, rejected={"invalid_attention_mask": 1})),
    "padding.parquet": (parquet({"input_ids": [[2, 3], [0, 3]], "labels": [[2, 3], [-100, 3]], "attention_mask": [[1, 1], [0, 1]]}), Outcome(1, "Take the padding off", row=2, rejected={"invalid_attention_mask": 1})),
    "invisible.jsonl": (GOOD[0] + '\n{"prompt": "Q", "completion": "\\u200b\\u200d"}', Outcome(1, "invisible characters only", line=2, rejected={"empty_response": 1})),
    "null_cells.parquet": (parquet({"prompt": ["a", None, "c"], "completion": ["x", "y", None]}), Outcome(1, "prompt is null", row=2, rejected={"null_field": 2})),
    "nested.parquet": (parquet({"messages": [NESTED, None, []]}), Outcome(1, "messages is null", row=2, rejected={"null_field": 1, "no_assistant_turn": 1})),
    "bytes.parquet": (parquet({"prompt": [b"a", b"\xff"], "completion": ["x", "y"]}), Outcome(1, r"prompt is bytes: '\\xff'; it must be a string", row=2, rejected={"wrong_type": 1})),
    "no_rows.parquet": (parquet({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}), Outcome(None, "holds no row")),
    "cut.parquet": (parquet({"prompt": ["a"], "completion": ["b"]})[:-9], Outcome(None, "cannot be read as Parquet")),
    "flipped.parquet": (damaged_parquet, Outcome(512, "cannot be read as Parquet", row=513, rejected={"damaged_file": 1})),
    "text.parquet": (LINES, Outcome(None, "cannot be read as Parquet")),
    "empty.parquet": ("", Outcome(None, "the file is empty")),
    "data.txt": ("prompt,completion\na,b\n", Outcome(None, "cannot be read; allowed: .jsonl")),
    "header.csv": ("prompt,completion\n\n", Outcome(None, "holds no row")),
    "twice.csv": ("prompt,completion,prompt\na,b,c\n", Outcome(None, "column 'prompt' stands twice")),
    "cells.csv": ('prompt,completion\n"a\n,",x\n\nb,y,z\nc,z\n', Outcome(2, "found 3 cells, the header names 2 columns", line=5, row=2, rejected={"invalid_csv": 1})),
    "quote.tsv": ('prompt\tcompletion\na\t"x" y\nb\tz\n', Outcome(1, "not valid TSV: '\t' expected after '\"'", line=2, row=1, rejected={"invalid_csv": 1})),
    "open_quote.csv": ('prompt,completion\na,x\nb,"y\nc,z\n', Outcome(1, "a quote in front of a text is not closed", line=3, row=2, rejected={"truncated_file": 1})),
    "latin.csv": ("prompt,completion\na,x\nb,caf\u00e9\n".encode("latin-1"), Outcome(1, "bytes e9 at byte 4 of the row", line=3, row=2, rejected={"invalid_utf8": 1})),
    "utf16.csv": ("prompt,completion\na,x\n".encode("utf-16"), Outcome(None, "UTF-16.*iconv")),
    "empty.csv": ("", Outcome(None, "the file is empty")),
    "cut.arrow": (arrow_stream()[:-8], Outcome(3, "no end mark: it was cut off", row=4, rejected={"truncated_file": 1})),
    "text.arrow": (LINES, Outcome(None, "cannot be read as Arrow")),
}  # fmt: skip


def check(config: Callable[..., Config], path: Path, expected: Outcome) -> None:
    """Both policies on one file."""
    if expected.error is None:
        check_prepared(prepare(config(on_bad_row="error")), expected)
    else:
        with pytest.raises(DataError, match=expected.error) as caught:
            prepare(config(on_bad_row="error"))
        place = (caught.value.path, caught.value.line, caught.value.row)
        assert place == (str(path), expected.line, expected.row)
        assert str(caught.value).isprintable() or "\n" in str(caught.value)
    if expected.samples is None:
        with pytest.raises(DataError):
            prepare(config(on_bad_row="skip"))
    else:
        check_prepared(prepare(config(on_bad_row="skip")), expected)


def check_prepared(prepared: PreparedData, expected: Outcome) -> None:
    (report,) = prepared.reports
    counts = report.manifest["domains"]["law"]
    assert counts["samples"] == expected.samples
    assert (counts["duplicates"], counts["conflicting"]) == expected.repeated
    assert report.manifest["rejected"].get("law", {}) == expected.rejected
    lines = (report.folder / "rejected.jsonl").read_text().splitlines()
    assert Counter(json.loads(line)["reason"] for line in lines) == Counter(expected.rejected)


@pytest.mark.parametrize("name", CORPUS_FILES)
def test_files_of_the_corpus(corpus_folder: Path, tmp_path: Path, tokenizer: Path, name: str) -> None:
    path = corpus_folder / "bad" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    check(
        lambda **data: data_config(tmp_path, tokenizer, path, pack_len=8192, **data), path, CORPUS_FILES[name]
    )


@pytest.mark.parametrize("name", MADE_FILES)
def test_files_made_here(tmp_path: Path, tokenizer: Path, name: str) -> None:
    data, expected = MADE_FILES[name]
    path = tmp_path / name
    data = data() if callable(data) else data
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    check(lambda **data: data_config(tmp_path, tokenizer, path, **data), path, expected)


def test_the_table_of_bad_files_is_complete(corpus_folder: Path) -> None:
    names = {path.name for path in (corpus_folder / "bad").glob("*") if path.suffix != ".md"}
    assert names == {*CORPUS_FILES, HUGE}


def test_the_huge_line_of_the_corpus(corpus_folder: Path, tmp_path: Path, tokenizer: Path) -> None:
    """Valid, but over any pack: `data.overlong` decides, whatever the policy for bad rows."""
    path = corpus_folder / "bad" / HUGE
    with pytest.raises(DataError, match=r"data\.overlong") as caught:
        prepare(data_config(tmp_path, tokenizer, path, on_bad_row="skip"))
    assert caught.value.line == 1
    prepared = prepare(data_config(tmp_path, tokenizer, path, overlong="drop"))
    check_prepared(prepared, Outcome(2, None, rejected={"overlong": 1}))


def test_skip_goes_on_with_the_other_files_of_a_source(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").touch()
    (tmp_path / "data" / "b.parquet").write_bytes(b"PAR1 no")
    write_jsonl(tmp_path / "data" / "c.jsonl", pairs(3))
    (tmp_path / "data" / "notes.txt").write_text("x")
    write_jsonl(tmp_path / "data" / "_draft.jsonl", pairs(2))
    prepared = prepare(data_config(tmp_path, tokenizer, tmp_path / "data", on_bad_row="skip"))
    check_prepared(prepared, Outcome(3, None, rejected={"empty_file": 1, "damaged_file": 1}))
    assert "2 beside the data not read" in prepared.table()
    assert all(name in prepared.table() for name in ("notes.txt", "_draft.jsonl"))


def test_every_source_needs_a_sample_even_if_the_domain_has_others(tmp_path: Path, tokenizer: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", pairs(3))
    bad = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x"}])
    sources = [{"path": str(path), "domain": "law"} for path in (good, bad)]
    with pytest.raises(DataError, match=r"data.train\[1\] gives no usable sample"):
        prepare(data_config(tmp_path, tokenizer, sources, on_bad_row="skip"))


def test_a_corrected_file_is_prepared_after_an_error(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(3), {"prompt": "x"}])
    with pytest.raises(DataError, match="completion is missing"):
        prepare(data_config(tmp_path, tokenizer, path))
    assert not list((tmp_path / "cache").glob("*.partial")), "what is of no use any more is removed"
    write_jsonl(path, pairs(4))
    check_prepared(prepare(data_config(tmp_path, tokenizer, path)), Outcome(4, None))
