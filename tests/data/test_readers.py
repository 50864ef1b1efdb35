"""Files are found, cut into rows with the right places, and decoded, whatever their container."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from prepared import pairs, write_jsonl

from versatune_ds.data.rows import blocks as block_limits
from versatune_ds.data.rows.files import InputFile, find_files
from versatune_ds.data.rows.json_rows import parse_json
from versatune_ds.data.rows.readers import decode_block, read_blocks
from versatune_ds.data.rows.reasons import BadRow, FileDamage, Reason
from versatune_ds.foundations.errors import ConfigError, DataError

ROWS = pairs(700)


def read(path: Path) -> list[tuple[Any, Any]]:
    """(place, row) of every row of a file."""
    (file,) = find_files(str(path)).files
    return [item for block in read_blocks(file) for item in decode_block(file, block)]


def rows_of(path: Path) -> list[Any]:
    return [row for _, row in read(path)]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.json", "b.json", "c.json.gz"]
)
def test_text_containers_give_the_same_rows(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    text = lines if ".jsonl" in name or name in ("a.ndjson", "b.json") else json.dumps(ROWS, indent=2)
    data = text.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data[:1000]) + gzip.compress(data[1000:])
    if name.endswith(".zst"):
        data = zstandard.compress(data[:1000]) + zstandard.compress(data[1000:])
    (tmp_path / name).write_bytes(data)
    assert rows_of(tmp_path / name) == ROWS


def test_parquet_rows_come_in_blocks_with_row_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=100)
    got = read(tmp_path / "a.parquet")
    assert [row for _, row in got] == ROWS
    assert [place.row for place, _ in got] == list(range(1, 701))


def test_places_of_lines_count_blank_lines_and_crlf(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\r\n\n{"a": 3}')
    assert [(place.line, row) for place, row in read(tmp_path / "a.jsonl")] == [
        (1, {"a": 1}), (4, {"a": 2}), (6, {"a": 3}),
    ]  # fmt: skip


def test_places_in_a_json_list_are_rows_and_their_first_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n[\n {"a":\n 1},\n\n {"a": "]}\\"[,{"}, 5,\n{"a": 3}\n]\n')
    got = [(place.row, place.line, str(row)) for place, row in read(tmp_path / "a.json")]
    assert [item[:2] for item in got] == [(1, 3), (2, 6), (3, 6), (4, 7)]
    assert got[1][2] == str({"a": ']}"[,{'})
    assert "a number" in got[2][2]


def test_a_json_list_does_not_depend_on_where_the_stream_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"a": 'x\\"]}[{,' * i, "b": [{"c": []}] * (i % 3)} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(block_limits, "READ_BYTES", size)
        assert rows_of(tmp_path / "a.json") == rows


def test_damage_keeps_its_line_on_the_way_to_another_process() -> None:
    damage = pickle.loads(pickle.dumps(FileDamage(Reason.TRUNCATED_FILE, "cut off", line=3)))
    assert (damage.reason, damage.message, damage.line) == (Reason.TRUNCATED_FILE, "cut off", 3)


def test_blocks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_limits, "BLOCK_BYTES", 2000)
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    blocks = list(read_blocks(InputFile(str(path), "jsonl")))
    assert len(blocks) > 10
    assert max(sum(map(len, block.items)) for block in blocks) < 2200
    assert [block.first for block in blocks][:2] == [1, 1 + blocks[0].num_rows]


def test_a_row_over_the_limit_is_refused_and_the_next_one_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_limits, "MAX_ROW_BYTES", 500)
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": 1}, {"a": "x" * 5000}, {"a": 3}])
    rows = rows_of(path)
    assert rows[0] == {"a": 1}
    assert rows[1].reason == Reason.ROW_TOO_LARGE
    assert rows[2] == {"a": 3}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_stream_cut_off_gives_the_rows_before_the_cut(tmp_path: Path, suffix: str) -> None:
    # text that hardly packs, so that many blocks of the compressor come before the cut
    rows = [{"prompt": hex(hash((i, "p")))[2:] * 20, "completion": str(i)} for i in range(30_000)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = gzip.compress(data, 1) if suffix == ".gz" else zstandard.compress(data)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    *good, last = rows_of(path)
    assert last.reason == Reason.TRUNCATED_FILE
    assert len(good) > len(rows) // 2
    assert good == rows[: len(good)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', Reason.DUPLICATE_KEY),
        ('{"a": {"b": 1, "b": 1}}', Reason.DUPLICATE_KEY),
        ('{"a": ', Reason.INVALID_JSON),
        ("[" * 100_000, Reason.INVALID_JSON),
        ('{"a": ' + "9" * 5000 + "}", Reason.INVALID_JSON),
        ("\x00\x00", Reason.INVALID_JSON),
        ("[1]", Reason.NOT_AN_OBJECT),
        ("null", Reason.NOT_AN_OBJECT),
    ],
)
def test_rows_that_are_no_json_objects(text: str, reason: Reason) -> None:
    with pytest.raises(BadRow) as caught:
        parse_json(text.encode())
    assert caught.value.reason == reason


def test_folders_and_globs_give_sorted_files_and_name_what_they_ignore(tmp_path: Path) -> None:
    hidden = (".hidden.jsonl", "_SUCCESS", ".cache/d.jsonl", "sub/_old/e.jsonl", "sub/_f.jsonl")
    for name in ("b.jsonl", "a.json.gz", "sub/c.parquet", "notes.txt", *hidden):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files(str(tmp_path))
    assert [Path(f.path).name for f in found.files] == ["a.json.gz", "b.jsonl", "c.parquet"]
    names = [path.removeprefix(f"{tmp_path}/") for path in found.ignored]
    assert sorted(names) == [".cache/", ".hidden.jsonl", "_SUCCESS", "notes.txt", "sub/_f.jsonl", "sub/_old/"]
    globbed = find_files([str(tmp_path / "**" / "*.parquet"), str(tmp_path / "b*")])
    assert [Path(f.path).name for f in globbed.files] == ["c.parquet", "b.jsonl"]
    outright = find_files([str(tmp_path / "sub" / "_f.jsonl"), str(tmp_path / "sub" / "_old")])
    assert [Path(f.path).name for f in outright.files] == ["_f.jsonl", "e.jsonl"]


def test_links_that_lead_back_do_not_repeat_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert len(find_files(str(tmp_path)).files) == 1


@pytest.mark.parametrize(
    ("make", "pattern", "expected"),
    [
        (None, "missing.jsonl", "no such file"),
        (None, "*.jsonl", "no file matches"),
        ("data.pkl", "data.pkl", "cannot be read; allowed: .jsonl"),
        (
            "a.orc",
            "a.orc",
            r"""python -c 'import pandas; pandas.read_orc\('"'"'\S*a.orc""",
        ),
        ("readme.txt", ".", "no data file found"),
        ("a.parquet.gz", "a.parquet.gz", "cannot be read"),
    ],
)
def test_nothing_to_read_is_an_error(tmp_path: Path, make: str | None, pattern: str, expected: str) -> None:
    if make:
        (tmp_path / make).write_text("x")
    with pytest.raises(DataError, match=expected):
        find_files(str(tmp_path / pattern))


def test_hub_names_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (file,) = find_files("hub:owner/name", "train").files
    with pytest.raises(ConfigError, match=r"versatune-ds\[hub\]"):
        list(read_blocks(file))


def test_hub_rows_are_streamed_at_the_given_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name: str, **options: Any) -> Any:
        calls.append((name, options))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    file = InputFile("hub:owner/name", "hub", split="train", revision="abc")
    got = [item for block in read_blocks(file) for item in decode_block(file, block)]
    assert [row for _, row in got] == ROWS
    assert got[-1][0].row == 700
    assert calls == [("owner/name", {"split": "train", "streaming": True, "revision": "abc"})]
