"""What data sets are exported to gives the rows that are meant: CSV, columns, Arrow, folders of splits, URLs."""
# ruff: noqa: E501

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from prepared import data_config, pairs, write_jsonl
from transformers import AutoTokenizer

from versatune_ds.data.cache.prepare import open_caches, prepare
from versatune_ds.data.rows import blocks as block_limits
from versatune_ds.data.rows.files import find_files
from versatune_ds.data.rows.readers import decode_block, read_blocks
from versatune_ds.foundations.errors import ConfigError, DataError

ROWS = [{"prompt": "Hi?", "completion": "Hello."}, {"prompt": "Ho?", "completion": 'a, "b"\nc'}]
TOKENS = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
CHATS = [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}] * 2
CSV = 'prompt,completion\nHi?,Hello.\nHo?,"a, ""b""\nc"\n'


def read(path: Path | str, split: str = "train") -> list[tuple[Any, Any]]:
    """(place, row) of every row of a source."""
    files = find_files(str(path), split).files
    return [item for file in files for block in read_blocks(file) for item in decode_block(file, block)]


def rows_of(path: Path | str, split: str = "train") -> list[Any]:
    return [row for _, row in read(path, split)]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize(
    ("name", "data", "rows"),
    [
        ("a.csv", CSV, ROWS),
        ("bom.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(), [ROWS[0], ROWS[1] | {"completion": 'a, "b"\r\nc'}]),
        ("a.tsv", 'prompt\tcompletion\nHi?\tHello.\nHo?\t"a, ""b""\nc"\n', ROWS),
        ("semicolon.csv", 'prompt;completion\nHi?;Hello.\nHo?;"a, ""b""\nc"\n', ROWS),
        ("index.csv", ",prompt\n0,Hi?\n\n1,\n", [{"": "0", "prompt": "Hi?"}, {"": "1", "prompt": ""}]),
        ("blank.csv", "prompt,,\nHi?,,\n", [{"prompt": "Hi?", "": ""}]),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0), ROWS),
        ("a.tsv.xz", lzma.compress(CSV.replace(",c", "\tc").replace(",H", "\tH").replace('?,"', '?\t"').encode()), ROWS),
        ("a.jsonl.bz2", bz2.compress("\n".join(map(json.dumps, ROWS)).encode()), ROWS),
        ("columns.json", json.dumps(columns(ROWS)), ROWS),
        ("columns.json.gz", gzip.compress(json.dumps(columns(ROWS), indent=2).encode(), mtime=0), ROWS),
        ("with_null.json", json.dumps(columns(ROWS) | {"system": [None, "S"]}), [ROWS[0] | {"system": None}, ROWS[1] | {"system": "S"}]),
        ("tokens.json", json.dumps(columns(TOKENS)), TOKENS),
        ("chats.json", json.dumps(columns(CHATS), indent=1), CHATS),
        ("pandas.json", json.dumps({name: dict(enumerate(cells)) for name, cells in columns(ROWS).items()}), ROWS),
        ("split.json", json.dumps({"columns": ["prompt", "completion"], "index": [0, 1], "data": [list(row.values()) for row in ROWS]}), ROWS),
        ("table.json", json.dumps({"schema": {"fields": []}, "data": ROWS}), ROWS),
        ("wrapped.json", json.dumps({"version": "1.0", "data": ROWS}, indent=1), ROWS),
        ("tagged_chat.json", json.dumps(CHATS[0] | {"tags": ["a", "b"]}), [CHATS[0] | {"tags": ["a", "b"]}]),
        # one row each, whose values are lists or objects
        ("chat.json", json.dumps(CHATS[0]), CHATS[:1]),
        ("token_row.json", json.dumps(TOKENS[0]), TOKENS[:1]),
        ("turns.json", json.dumps({"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}), [{"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}]),
        ("struct.json", json.dumps({"messages": columns(CHATS[0]["messages"])}), [{"messages": columns(CHATS[0]["messages"])}]),
        ("tagged.json", '{"tags": ["a"], "prompt": "Hi?"}\n{"tags": ["b"], "prompt": "Ho?"}', [{"tags": ["a"], "prompt": "Hi?"}, {"tags": ["b"], "prompt": "Ho?"}]),
    ],
)  # fmt: skip
def test_text_files(tmp_path: Path, name: str, data: str | bytes, rows: list[Any]) -> None:
    (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
    assert rows_of(tmp_path / name) == rows


def test_columns_on_one_line_longer_than_the_look_ahead(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(block_limits, "READ_BYTES", 64)
    for name, rows in (("a.json", pairs(200)), ("b.json", CHATS * 50), ("c.json", TOKENS * 50)):
        (tmp_path / name).write_text(json.dumps(columns(rows)))
        assert rows_of(tmp_path / name) == rows
    (tmp_path / "lines.json").write_text(
        "".join(json.dumps({"tags": ["x" * 99], "n": i}) + "\n" for i in range(5))
    )
    assert [row["n"] for row in rows_of(tmp_path / "lines.json")] == list(range(5))


def test_places_of_records_count_lines_and_rows(tmp_path: Path) -> None:
    (tmp_path / "sep.csv").write_text("sep=|\r\nprompt|completion\r\nHi?|Hello.\r\n")
    assert [(place.line, row) for place, row in read(tmp_path / "sep.csv")] == [(3, ROWS[0])]
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\nb",c\n\nd,e\n')
    assert [(place.line, place.row) for place, _ in read(tmp_path / "a.csv")] == [(2, 1), (5, 2)]


@pytest.mark.parametrize("name", ["a.arrow", "file.arrow", "a.feather"])
def test_arrow_files_in_blocks(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(block_limits, "BLOCK_ROWS", 7)
    table = pa.Table.from_pylist([row | {"unused": b"\xff"} for row in pairs(50)])
    if name == "a.feather":
        pyarrow.feather.write_feather(table, tmp_path / name, compression="zstd", chunksize=20)
    else:
        make = pa.ipc.new_stream if name == "a.arrow" else pa.ipc.new_file
        with make(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    (file,) = find_files(str(tmp_path / name)).files
    blocks = list(read_blocks(file, lambda names: [n for n in names if n != "unused"]))
    got = [item for block in blocks for item in decode_block(file, block)]
    assert [row for _, row in got] == pairs(50)
    assert [place.row for place, _ in got] == list(range(1, 51))
    assert [block.num_rows for block in blocks] == [7, 7, 6, 7, 7, 6, 7, 3]


def test_bytes_are_text_also_inside_of_turns(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_binary())]))
    turns = [{"role": "user", "content": "caf\u00e9".encode()}, {"role": "assistant", "content": b"\xff"}]
    table = pa.table({"prompt": pa.array([b"Hi?"] * 2), "messages": pa.array([turns[:1], turns[1:]], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    good, bad = rows_of(tmp_path / "a.parquet")
    assert good == {"prompt": "Hi?", "messages": [{"role": "user", "content": "caf\u00e9"}]}
    assert bad == {"prompt": "Hi?", "messages": [{"role": "assistant", "content": b"\xff"}]}


# Folders.


def saved_to_disk(folder: Path, rows: list[dict[str, Any]], split: str | None = None) -> Path:
    """As `Dataset.save_to_disk` leaves a folder, in two files, with a cache of `map` beside them."""
    folder.mkdir(parents=True)
    names = []
    for i in range(2):
        table = pa.Table.from_pylist(rows[i::2])
        names.append(f"data-0000{1 - i}-of-00002.arrow")
        with pa.ipc.new_stream(str(folder / names[-1]), table.schema) as writer:
            writer.write_table(table)
    (folder / "cache-0123456789abcdef.arrow").write_bytes((folder / names[0]).read_bytes())
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names], "_split": split})
    )
    (folder / "dataset_info.json").write_text(
        json.dumps({"features": {"prompt": {"dtype": "string", "_type": "Value"}}})
    )
    return folder


def test_save_to_disk_gives_the_files_of_its_state_in_their_order(tmp_path: Path) -> None:
    assert rows_of(saved_to_disk(tmp_path / "saved", ROWS)) == ROWS
    saved_to_disk(tmp_path / "more" / "b", pairs(2))
    saved_to_disk(tmp_path / "more" / "a", ROWS)
    assert rows_of(tmp_path / "more") == ROWS + pairs(2), "a folder of saved data sets"
    (tmp_path / "saved" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"state.json lists data-00000-of-00002.arrow, which is not there"):
        find_files(str(tmp_path / "saved"))
    (tmp_path / "more" / "a" / "state.json").write_text(
        json.dumps({"_indices_data_files": [{"filename": "indices.arrow"}]})
    )
    with pytest.raises(DataError, match=r"flatten_indices\(\)"):
        find_files(str(tmp_path / "more"))


def test_a_saved_data_set_dict_is_read_by_its_splits(tmp_path: Path) -> None:
    for split, rows in (("train_sft", ROWS), ("test_sft", pairs(2))):
        saved_to_disk(tmp_path / split, rows, split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train_sft", "test_sft"]}')
    assert rows_of(tmp_path, "train_sft") == ROWS
    assert rows_of(tmp_path, "test_sft") == pairs(2)
    assert find_files(str(tmp_path), "train_sft").other_splits == (
        f"{tmp_path} (train_sft is read): test_sft (2)",
    )
    with pytest.raises(DataError, match=r"holds train_sft, test_sft, and not train; set `split`"):
        find_files(str(tmp_path))


def repository(folder: Path, names: list[str], **files: str) -> Path:
    """A folder of files whose only prompt is their name; `files`: README and others."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"prompt": [name]}), folder / name)
        else:
            (folder / name).write_text(json.dumps({"prompt": name}))
    for name, text in files.items():
        (folder / name.replace("_md", ".md").replace("_json", ".json")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("names", "split", "read", "others"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"], "train", [0, 1], "test (1)"),
        (["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"], "test_sft", [1], "train_sft (1)"),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], "train", [0], "test (1), validation (1)"),
        (["train.jsonl", "dev.jsonl"], "validation", [1], "train (1)"),
        (["train.jsonl", "test.jsonl", "val.jsonl"], "train+validation", [0, 2], "test (1)"),
        (["train/a.jsonl", "eval/a.jsonl"], "train", [0], "test (1)"),
        (["main/train-00000.parquet", "main/test-00000.parquet"], "test", [1], "train (1)"),
        (["law_train.jsonl", "law_test.jsonl", "extra.jsonl"], "train", [0, 2], "test (1)"),
        (["contracts.jsonl", "attested.jsonl", "latest.jsonl", "devotion.jsonl"], "train", [0, 1, 2, 3], None),
        (["test.jsonl"], "train", [0], None),
        (["test/a.jsonl", "test/b.jsonl"], "train", [0, 1], None),
    ],
)  # fmt: skip
def test_splits_are_told_from_names(
    tmp_path: Path, names: list[str], split: str, read: list[int], others: str | None
) -> None:
    folder = repository(tmp_path / "train", names, README_md="x", dataset_infos_json='{"default": {}}')
    found = find_files(f"{folder}/", split)
    assert sorted(Path(file.path).relative_to(folder).as_posix() for file in found.files) == sorted(
        names[i] for i in read
    )
    assert found.other_splits == ((f"{folder} ({split} is read): {others}",) if others else ())
    assert {"README.md", "dataset_infos.json"} <= {Path(name).name for name in found.ignored}


CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: [v2/part-*.jsonl, "extra/**"]
  - split: held_out
    path: v2/late.jsonl
- config_name: old
  data_files: v1/*.jsonl
---
# A data set
"""
PARTS = ["v1/a.jsonl", "v2/part-0.jsonl", "v2/part-1.jsonl", "v2/late.jsonl", "extra/deep/b.jsonl"]


@pytest.mark.parametrize("names", [["train.jsonl", "a.jsonl"], ["a.jsonl", "b.jsonl"], ["test.jsonl"]])
def test_a_split_that_is_not_there_is_not_replaced_by_another(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(DataError, match="and not validation; set `split`"):
        find_files(str(repository(tmp_path, names)), "validation")


def test_splits_are_told_from_the_readme(tmp_path: Path) -> None:
    folder = repository(tmp_path / "repo", PARTS, README_md=CARD)
    assert [row["prompt"] for row in rows_of(folder)] == [PARTS[1], PARTS[2], PARTS[4]]
    assert [row["prompt"] for row in rows_of(folder, "held_out")] == [PARTS[3]]
    folder = repository(tmp_path / "two", PARTS, README_md=CARD.replace("default", "new"))
    with pytest.raises(DataError, match=r"holds the configurations new, old; name the files of one"):
        find_files(str(folder))
    folder = repository(
        tmp_path / "one",
        PARTS,
        README_md="---\r\nconfigs:\r\n- config_name: x\r\n  data_dir: v1\r\n  data_files: '*.jsonl'\r\n---",
    )
    assert [row["prompt"] for row in rows_of(folder)] == PARTS[:1]
    assert len(find_files(str(folder)).ignored) == len(PARTS) - 1 + 1, (
        "what the README does not list is named"
    )
    folder = repository(tmp_path / "bad", PARTS, README_md="---\na: [\n---")
    with pytest.raises(DataError, match=r"README.md: the YAML at the beginning is not valid"):
        find_files(str(folder))


README_LABELS = """---
dataset_info:
  features:
  - name: prompt
    dtype: string
  - name: topic
    dtype:
      class_label:
        names:
          '1': code
          '0': law
---
"""


@pytest.mark.parametrize("where", ["schema", "dataset_info.json", "dataset_infos.json", "README.md"])
def test_class_labels_are_read_by_name(tmp_path: Path, tokenizer: Path, where: str) -> None:
    label = {
        "topic": {"names": ["law", "code"], "_type": "ClassLabel"},
        "prompt": {"dtype": "string", "_type": "Value"},
    }
    table = pa.Table.from_pylist([row | {"topic": i % 2} for i, row in enumerate(pairs(5))])
    if where == "schema":
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": label}})})
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet")
    about = {
        "dataset_info.json": json.dumps({"features": label}),
        "dataset_infos.json": json.dumps({"default": {"features": label}}),
        "README.md": README_LABELS,
    }
    if where in about:
        (folder / where).write_text(about[where])
    config = data_config(tmp_path, tokenizer, [{"path": str(folder), "domain_column": "topic"}])
    law, code = prepare(config).caches["train"]
    assert (len(law or []), len(code or [])) == (3, 2)
    if where in about:  # other names are other data, though the file is the same
        (folder / where).write_text(
            about[where].replace("law", "tax").replace("code", "law").replace("tax", "code")
        )
        law, code = prepare(config).caches["train"]
        assert (len(law or []), len(code or [])) == (2, 3)


def test_class_labels_out_of_range_or_null_and_numbers_without_names(tmp_path: Path, tokenizer: Path) -> None:
    table = pa.Table.from_pylist([row | {"topic": i - 1} for i, row in enumerate(pairs(4))])
    label = {"info": {"features": {"topic": {"names": ["law", "code"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(label)}), tmp_path / "a.parquet")
    null, _, _, beyond = rows_of(tmp_path / "a.parquet")
    assert null["topic"] is None
    assert beyond.message == "topic is 2; allowed: 0 .. 1, the class labels"
    pq.write_table(table, tmp_path / "b.parquet")
    config = data_config(
        tmp_path, tokenizer, [{"path": str(tmp_path / "b.parquet"), "domain_column": "topic"}]
    )
    with pytest.raises(DataError, match="is a number, and the file's metadata hold no name for it"):
        prepare(config)


def test_what_datasets_itself_writes(tmp_path: Path, tokenizer: Path) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["law", "code"])
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(messages=datasets.Sequence(turn), topic=label)
    rows = [{"messages": columns(CHATS[0]["messages"]), "topic": i % 2} for i in range(5)]
    data = datasets.Dataset.from_list(rows, features=features)
    splits = datasets.DatasetDict(train=data, test=data.select([0]))
    splits.save_to_disk(str(tmp_path / "saved"))
    for name, part in splits.items():
        (tmp_path / "repo" / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(str(tmp_path / "repo" / "data" / f"{name}-00000-of-00001.parquet"))
    for folder in ("saved", "repo"):
        config = data_config(
            tmp_path, tokenizer, [{"path": str(tmp_path / folder), "domain_column": "topic"}], cache_dir=str(tmp_path / "cache" / folder)
        )  # fmt: skip
        prepared = prepare(config)
        assert [len(cache or []) for cache in prepared.caches["train"]] == [3, 2]
        assert f"splits not read in {tmp_path}/{folder} (train is read): test (1)" in prepared.table()


def test_hub_rows_have_their_class_labels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        prompt=datasets.Value("string"), topic=datasets.ClassLabel(names=["law", "code"])
    )
    data = datasets.Dataset.from_list([{"prompt": "a", "topic": 1}], features=features).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: data)
    assert rows_of("hub:owner/name") == [{"prompt": "a", "topic": "code"}]


# URLs.


@pytest.fixture
def memory() -> Any:
    """A file system behind memory://."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    yield files
    for path in files.find("/"):
        files.rm_file(path)


def test_urls_of_files_globs_and_folders(memory: Any, tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    pq.write_table(pa.Table.from_pylist(pairs(5)), tmp_path / "a.parquet")
    memory.pipe(
        {
            "/d/a.jsonl": lines,
            "/d/sub/b.csv.gz": gzip.compress(CSV.encode()),
            "/d/.git/c.jsonl": b"x",
            "/d/notes.txt": b"x",
        }
    )
    memory.pipe({"/p/a.parquet": (tmp_path / "a.parquet").read_bytes()})
    for name in saved_to_disk(tmp_path / "saved", ROWS).iterdir():
        memory.pipe(f"/saved/{name.name}", name.read_bytes())
    assert rows_of("memory://d/a.jsonl") == ROWS
    assert rows_of("memory://p/*.parquet") == pairs(5)
    assert rows_of("memory://d/") == ROWS * 2
    assert rows_of("memory://saved") == ROWS
    found = find_files("memory://d")
    assert [path.rpartition("/")[2] for path in found.ignored] == ["notes.txt", "c.jsonl"]
    for pattern, text in (
        ("memory://d/x.jsonl", "no such file"),
        ("memory://d/*.x", "no file matches"),
        ("memory://d/notes.txt", "cannot be read"),
    ):
        with pytest.raises(DataError, match=text):
            find_files(pattern)


def test_url_data_is_hashed_prepared_once_and_found_again(
    memory: Any, tmp_path: Path, tokenizer: Path
) -> None:
    local = write_jsonl(tmp_path / "a.jsonl", pairs(4))
    memory.pipe("/d/a.jsonl", local.read_bytes())
    config = data_config(tmp_path, tokenizer, "memory://d/a.jsonl", names=("law",))
    cache = prepare(config).caches["train"][0]
    assert cache is not None
    assert cache.source_of(3) == ("memory://d/a.jsonl", 4)
    open_caches(config)
    assert prepare(data_config(tmp_path, tokenizer, local, names=("law",))).reused, (
        "the same content, wherever"
    )
    memory.pipe("/d/a.jsonl", write_jsonl(local, pairs(5)).read_bytes())
    assert not prepare(config).reused


def test_what_keeps_a_url_from_being_read_is_said_with_its_cure(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3://b/a.jsonl: s3:// .* not installed: `pip install s3fs`"):
        find_files("s3://b/a.jsonl")
    with pytest.raises(ConfigError, match="no file system is known for foo://"):
        find_files("foo://b/a.jsonl")
    memory.pipe("/d/a.jsonl", b'{"prompt": "a"}')
    (file,) = find_files("memory://d/a.jsonl").files

    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no credentials")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", fail)
    with pytest.raises(
        DataError, match=r"memory://d/a.jsonl: cannot be read \(RuntimeError: no credentials\); check"
    ):
        list(read_blocks(file))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_nulls_in_calls_are_values_in_json_and_absent_fields_in_tables(
    tmp_path: Path, tokenizer: Path, name: str
) -> None:
    def call(**arguments: Any) -> dict[str, Any]:
        function = {"name": "rain", "arguments": arguments}
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }

    rows = [{"messages": [{"role": "user", "content": "Q"}, call(where="Oslo", unit=None)]}]
    if name == "a.jsonl":
        write_jsonl(tmp_path / name, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    config = data_config(tmp_path, tokenizer, tmp_path / name, names=("law",), chat_template="hermes")
    cache = prepare(config).caches["train"][0]
    assert cache is not None
    text = AutoTokenizer.from_pretrained(tokenizer).decode(cache.sample(0)[0].tolist())
    assert '"where": "Oslo"' in text
    assert ('"unit": null' in text) == (name == "a.jsonl")


def test_cells_of_a_csv_hold_lists_and_objects_as_json(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.csv").write_text('input_ids,labels\n"[5, 6, 7]","[-100, 6, 7]"\n')
    chat = json.dumps(CHATS[0]["messages"]).replace('"', '""')
    (tmp_path / "b.csv").write_text(f'id;messages\n1;"{chat}"\n')
    sources = [{"path": str(tmp_path / f"{name}.csv"), "domain": "law"} for name in "ab"]
    cache = prepare(data_config(tmp_path, tokenizer, sources, names=("law",))).caches["train"][0]
    assert cache is not None
    assert cache.sample(0)[0].tolist() == [5, 6, 7]
    text = AutoTokenizer.from_pretrained(tokenizer).decode(cache.sample(1)[0].tolist())
    assert text.startswith("<|im_start|>user\nQ<|im_end|>")


# What is not used is named once.


def test_columns_that_are_not_used_are_named_once(tmp_path: Path, tokenizer: Path) -> None:
    rows = [row | {"id": i} | ({"late": 1} if i == 1500 else {}) for i, row in enumerate(pairs(1600))]
    sources = [
        {"path": str(write_jsonl(tmp_path / "a.jsonl", rows)), "domain": "law"},
        {"path": str(tmp_path / "b.parquet"), "domain": "law"},
        {"path": str(write_jsonl(tmp_path / "c.jsonl", pairs(2))), "domain": "code"},
    ]
    pq.write_table(
        pa.Table.from_pylist([row | {"id": 1, "source": "x"} for row in pairs(2, 2000)]),
        tmp_path / "b.parquet",
    )
    config = data_config(tmp_path, tokenizer, sources)
    prepared = prepare(config)
    assert [r.manifest.get("unused_columns") for r in prepared.reports] == [["id", "late", "source"], None]
    for table in (prepared.table(), prepare(config).table()):
        assert [line for line in table.splitlines() if "not used" in line] == [
            "note: train law: columns not used: id, late, source"
        ]
