"""Preparation: once, whole, reused, resumed after a kill, and refused when something is not the same."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from prepared import content, data_config, pairs, write_jsonl

from versatune_ds.apps.detect.generate import GeneratedText
from versatune_ds.cli.main import main
from versatune_ds.config.load import load_config, write_resolved
from versatune_ds.data.cache import prepare as prepare_module
from versatune_ds.data.cache import units
from versatune_ds.data.cache.cache import TokenCache
from versatune_ds.data.cache.prepare import open_caches, prepare
from versatune_ds.data.encode import encoder as encode
from versatune_ds.data.rows import blocks
from versatune_ds.foundations.errors import ConfigError, DataError, StateError


def texts(cache: TokenCache | None, tokenizer: Path) -> list[str]:
    from transformers import AutoTokenizer

    assert cache is not None
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return [loaded.decode(cache.sample(i)[0].tolist()) for i in range(len(cache))]


def test_rows_keep_their_order_and_places(tmp_path: Path, tokenizer: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    write_jsonl(tmp_path / "b.jsonl", pairs(2, start=3))
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    config = data_config(tmp_path, tokenizer, [{"path": paths, "domain": "law"}])
    cache = prepare(config).caches["train"][0]
    assert [text.split("\n")[1] for text in texts(cache, tokenizer)] == [
        f"question {i}?<|im_end|>" for i in range(5)
    ]
    assert cache is not None
    assert [cache.source_of(i)[1] for i in range(5)] == [1, 2, 3, 1, 2]
    assert cache.source_of(4)[0] == str(tmp_path / "b.jsonl")


def test_processes_change_nothing(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "INLINE_BYTES", 0)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 7)
    rows = [*pairs(40), {"prompt": "x"}, *pairs(40)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    inline = data_config(
        tmp_path, tokenizer, tmp_path / "a.jsonl", cache_dir=str(tmp_path / "1"), on_bad_row="skip"
    )
    parallel = data_config(
        tmp_path,
        tokenizer,
        tmp_path / "a.jsonl",
        cache_dir=str(tmp_path / "2"),
        on_bad_row="skip",
        num_workers=2,
    )
    prepare(inline)
    prepare(parallel)
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_domains_by_column_and_several_sources_of_a_domain(tmp_path: Path, tokenizer: Path) -> None:
    rows = [row | {"topic": "law" if i % 3 else "code"} for i, row in enumerate(pairs(9))]
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    write_jsonl(tmp_path / "law.jsonl", pairs(2, start=100))
    sources = [
        {"path": str(tmp_path / "mixed.jsonl"), "domain_column": "topic"},
        {"path": str(tmp_path / "law.jsonl"), "domain": "law"},
    ]
    law, code, other = prepare(
        data_config(tmp_path, tokenizer, sources, names=("law", "code", "other/weird"))
    ).caches["train"]
    assert (len(law or []), len(code or []), other) == (8, 3, None)
    assert texts(law, tokenizer)[-1].startswith("<|im_start|>user\nquestion 101?")


def test_pretokenised_rows_are_taken_as_they_are(tmp_path: Path, tokenizer: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, 8]}
    cache = prepare(data_config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", [row]))).caches[
        "train"
    ][0]
    assert cache is not None
    tokens, mask = cache.sample(0)
    assert (tokens.tolist(), mask.tolist()) == ([5, 6, 7, 8], [True, False, True, True])
    assert cache.supervised.tolist() == [2], "labels are shifted: nothing predicts the first token"


def test_what_detection_writes_is_training_data_as_it_is(tmp_path: Path, tokenizer: Path) -> None:
    lines = [
        GeneratedText(0, "A text that ends.", 5, finished=True),
        GeneratedText(1, " \n", 1, finished=True),
        GeneratedText(2, "A text that was cut", 5, finished=False),
    ]
    write_jsonl(tmp_path / "sequences.jsonl", [line.to_json() for line in lines])
    source = {"path": str(tmp_path / "sequences.jsonl"), "domain": "law", "format": "text"}
    prepared = prepare(data_config(tmp_path, tokenizer, [source]))
    cache = prepared.caches["train"][0]
    assert texts(cache, tokenizer) == [
        "<|im_end|>A text that ends.<|im_end|>",
        "<|im_end|>A text that was cut",
    ]
    assert cache is not None and all(
        cache.sample(i)[1].tolist()[1:] == [True] * (n - 1) for i, n in enumerate(cache.lengths)
    )


def test_ids_are_held_against_the_embedding_before_the_work(
    tmp_path: Path, tokenizer: Path, encoded_blocks: list[Any]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tokenizer, model)
    rows = [{"input_ids": [5, 6, 70_000], "labels": [5, 6, 70_000]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    config = {"model_type": "llama", "vocab_size": 70_001}
    (model / "config.json").write_text(json.dumps(config))
    cache = prepare(data_config(tmp_path, model, path)).caches["train"][0]
    assert cache is not None
    assert cache.sample(0)[0].tolist() == [5, 6, 70_000]
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    encoded_blocks.clear()
    for verb in (prepare, open_caches):
        with pytest.raises(ConfigError, match=r"tokenizer has ids up to 3\d\d .* embedding has 300 rows"):
            verb(data_config(tmp_path, model, write_jsonl(path, pairs(3))))
    assert not encoded_blocks


def test_a_hub_data_set_is_asked_for_once_and_trained_on_without_the_hub(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: iter(pairs(3)))
    monkeypatch.setattr(units, "hub_revision", lambda path: asked.append(path) or "commit1")
    config = data_config(tmp_path, tokenizer, "hub:owner/name", names=("law",))
    with pytest.raises(StateError, match="is not prepared"):
        open_caches(config)
    cache = prepare(config).caches["train"][0]
    assert cache is not None
    assert cache.source_of(2) == ("hub:owner/name", 3)
    assert len(asked) == 1
    open_caches(config)
    assert len(asked) == 1
    monkeypatch.setattr(units, "hub_revision", lambda path: "commit2")
    assert not prepare(config).reused


def test_a_second_run_does_nothing(tmp_path: Path, tokenizer: Path, encoded_blocks: list[Any]) -> None:
    config = data_config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", pairs(5)))
    assert not prepare(config).reused
    before, blocks = content(tmp_path / "cache"), len(encoded_blocks)
    (tmp_path / "moved").mkdir()
    os.replace(tmp_path / "a.jsonl", tmp_path / "moved" / "a.jsonl")
    moved = data_config(tmp_path, tokenizer, tmp_path / "moved" / "a.jsonl")
    for again in (moved, moved):  # moved files are the same data
        prepared = prepare(again)
        assert prepared.reused
        assert len(encoded_blocks) == blocks
        assert content(tmp_path / "cache") == before
        assert "reused" in prepared.table()


def test_one_changed_domain_leaves_the_others_alone(
    tmp_path: Path, tokenizer: Path, encoded_blocks: list[Any]
) -> None:
    sources = [
        {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", pairs(5))), "domain": name}
        for name in ("law", "code")
    ]
    config = data_config(tmp_path, tokenizer, sources)
    prepare(config)
    encoded_blocks.clear()
    write_jsonl(tmp_path / "law.jsonl", pairs(6))
    reports = prepare(config).reports
    assert [report.reused for report in reports] == [False, True]
    assert len(encoded_blocks) == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"pack_len": 256}, "batch.pack_len"),
        ({"overlong": "drop"}, "data.overlong"),
        ({"on_bad_row": "skip"}, "data.on_bad_row"),
        ({"chat_template": "alpaca"}, "tokenizer_and_template"),
        ({"rows": 6}, r"\S*a\.jsonl \(changed since\)"),
    ],
)
def test_training_refuses_caches_of_other_settings(
    tmp_path: Path, tokenizer: Path, change: dict[str, Any], what: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(5))
    initial = {"law": 1.0, "code": 0.0}
    prepare(data_config(tmp_path, tokenizer, path, initial=initial))
    assert open_caches(data_config(tmp_path, tokenizer, path, initial=initial))["train"][0] is not None
    if rows := change.pop("rows", None):
        write_jsonl(path, pairs(rows))
    config = data_config(tmp_path, tokenizer, path, initial=initial, **change)
    with pytest.raises(StateError, match=rf"differs in: {what}\nrun: versatune-ds prepare --config CONFIG"):
        open_caches(config)
    prepare(config)
    open_caches(config)


def test_training_refuses_missing_caches_and_domains(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(5))
    config = data_config(tmp_path, tokenizer, path)
    with pytest.raises(
        StateError, match=r"train data of law is not prepared.*\nrun: versatune-ds prepare --config"
    ):
        open_caches(config)
    prepare(config)
    with pytest.raises(DataError, match="no training data for code, whose initial weight"):
        open_caches(config)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_pointer_in_place_of_a_file_is_named(tmp_path: Path, tokenizer: Path, name: str) -> None:
    model = shutil.copytree(tokenizer, tmp_path / "model")
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    config = data_config(tmp_path, model, write_jsonl(tmp_path / "a.jsonl", pairs(1)))
    with pytest.raises(ConfigError, match=rf"{name}: a Git LFS pointer lies there.*git lfs pull"):
        prepare(config)


def test_domains_may_be_named_like_files_of_ours_or_like_paths(tmp_path: Path, tokenizer: Path) -> None:
    """Alone in their units, and together in one."""
    names = (
        "unit.json",
        "rejected.jsonl",
        "manifest.json",
        "tokens.bin",
        ".",
        "..",
        "a/b",
        "a_b",
        "é",
        ".lock",
    )
    (tmp_path / "all").mkdir()
    files = {name: write_jsonl(tmp_path / f"{i}.jsonl", pairs(i + 1)) for i, name in enumerate(names)}
    for i, name in enumerate(names):
        rows = [json.loads(line) | {"of": name} for line in files[name].read_text().splitlines()]
        write_jsonl(tmp_path / "all" / f"{i}.jsonl", rows)
    alone = [{"path": str(path), "domain": name} for name, path in files.items()]
    for sources in (alone, [{"path": str(tmp_path / "all"), "domain_column": "of"}]):
        config = data_config(tmp_path, tokenizer, sources, names=names)
        prepare(config)
        sizes = [len(cache) for cache in open_caches(config)["train"] if cache is not None]
        assert sizes == list(range(1, len(names) + 1))
        assert prepare(config).reused


def test_the_printed_command_prepares_what_was_missing(tmp_path: Path, tokenizer: Path) -> None:
    """Overrides included, and words with blanks."""
    path = tmp_path / "my settings.yaml"
    write_resolved(data_config(tmp_path, tokenizer, write_jsonl(tmp_path / "a b.jsonl", pairs(5))), path)
    overrides = [f"data.cache_dir={tmp_path}/my cache", "domains.initial={law: 1, code: 0}"]
    config = load_config(path, overrides)
    with pytest.raises(StateError) as caught:
        open_caches(config)
    assert main(shlex.split(str(caught.value).rpartition("\nrun: ")[2])[1:]) == 0
    assert open_caches(config)["train"][0] is not None


def test_the_same_content_is_found_although_its_times_changed(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(5))
    config = data_config(tmp_path, tokenizer, path, names=("law",))
    prepare(config)
    os.utime(path, (1, 1))
    open_caches(config)
    assert prepare(config).reused


def test_a_damaged_cache_is_refused_in_training_and_made_again(
    tmp_path: Path, tokenizer: Path, messages: pytest.LogCaptureFixture
) -> None:
    config = data_config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", pairs(50)), names=("law",))
    prepare(config)
    before = content(tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*/law/tokens.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StateError, match=r"tokens.bin: has \d+ bytes.*\nrun: versatune-ds prepare"):
        open_caches(config)
    assert not prepare(config).reused
    assert "damaged cache, it is made again" in messages.text
    assert content(tmp_path / "cache") == before
    path.write_bytes(bytes(len(path.read_bytes())))  # same size, other content
    assert not prepare(config).reused
    assert content(tmp_path / "cache") == before


def test_a_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(5))
    original = encode.encode_block

    def change_the_file(task: Any, settings: Any) -> Any:
        write_jsonl(path, pairs(5, start=1))
        return original(task, settings)

    monkeypatch.setattr(encode, "encode_block", change_the_file)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(data_config(tmp_path, tokenizer, path))
    assert content(tmp_path / "cache") == {}


LONG = {"prompt": "question " * 20, "completion": "answer " * 60}
LONG_PROMPT = {"prompt": "question " * 100, "completion": "answer"}


@pytest.mark.parametrize(
    ("policy", "lengths", "notes", "rejected"),
    [
        ("drop", [], {}, {"overlong": 2}),
        ("truncate", [64], {"truncated": 1, "pieces_dropped": 0}, {"overlong_nothing_left": 1}),
        ("split", None, {"split": 2}, {}),
    ],
)
def test_overlong_samples(
    tmp_path: Path,
    tokenizer: Path,
    policy: str,
    lengths: list[int] | None,
    notes: dict[str, int],
    rejected: dict[str, int],
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [LONG, LONG_PROMPT, *pairs(1)])
    config = data_config(tmp_path, tokenizer, path, overlong=policy, pack_len=64, names=("law",))
    prepared = prepare(config)
    cache, unit = prepared.caches["train"][0], prepared.reports[0].manifest
    assert cache is not None
    assert cache.lengths.max() <= 64
    assert cache.supervised.min() > 0, "a piece without supervised tokens was kept"
    if lengths is not None:
        assert cache.lengths[:-1].tolist() == lengths
    assert notes.items() <= unit["domains"]["law"]["notes"].items()
    assert unit["rejected"].get("law", {}) == rejected


def test_split_pieces_join_to_the_sample(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "question " * 90, "completion": "answer " * 90}])
    whole = prepare(data_config(tmp_path, tokenizer, path, pack_len=4096)).caches["train"][0]
    split = prepare(data_config(tmp_path, tokenizer, path, pack_len=64, overlong="split"))
    pieces = split.caches["train"][0]
    assert whole is not None
    assert pieces is not None
    joined = [t for i in range(len(pieces)) for t in pieces.sample(i)[0].tolist()]
    dropped = split.reports[0].manifest["domains"]["law"]["notes"]["pieces_dropped"]
    assert joined == whole.sample(0)[0].tolist()[64 * dropped :]
    assert dropped > 0
    assert split.reports[0].manifest["domains"]["law"]["duplicates"] == 0


def test_an_overlong_sample_is_an_error_by_default_also_when_bad_rows_are_skipped(
    tmp_path: Path, tokenizer: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*pairs(2), LONG])
    with pytest.raises(
        DataError, match=r"a.jsonl:3: the sample has \d+ tokens, batch.pack_len is 64.*data.overlong"
    ):
        prepare(data_config(tmp_path, tokenizer, path, pack_len=64, on_bad_row="skip"))


def test_repeated_and_conflicting_rows_are_kept_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    row, conflict = pairs(1)[0], {"prompt": "question 0?", "completion": "another"}
    path = write_jsonl(tmp_path / "a.jsonl", [row] * 4 + [conflict, *pairs(2, start=5)])
    prepared = prepare(data_config(tmp_path, tokenizer, path))
    counts = prepared.reports[0].manifest["domains"]["law"]
    assert (counts["samples"], counts["duplicates"], counts["conflicting"]) == (7, 3, 1)


def test_rejected_rows_are_listed_with_place_reason_and_a_safe_excerpt(
    tmp_path: Path, tokenizer: Path
) -> None:
    hostile = {"prompt": "\x1b[31m\u202e \ud800", "completion": "x"}
    rows: list[Any] = [*pairs(1), hostile, {"prompt": "p", "completion": ""}, 7]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prepared = prepare(data_config(tmp_path, tokenizer, path, on_bad_row="skip"))
    text = (prepared.reports[0].folder / "rejected.jsonl").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    assert [(e["line"], e["domain"], e["reason"]) for e in entries] == [
        (2, "law", "lone_surrogate"), (3, "law", "empty_response"), (4, "law", "not_an_object"),
    ]  # fmt: skip
    assert all(entry["path"] == str(path) for entry in entries)
    assert text.isascii()
    assert all(e["excerpt"].isprintable() and e["excerpt"].isascii() for e in entries)
    assert "lone_surrogate" in prepared.table()


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(1))
    with pytest.raises(ConfigError, match="is not a folder"):
        prepare(data_config(tmp_path, tmp_path / "missing", path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        prepare(data_config(tmp_path, tmp_path / "empty", path))
