"""A disk that is full during the preparation: a clear error, nothing half-written accepted, it goes on."""

from __future__ import annotations

import pytest
from prepared import data_config, pairs, qwen_like_tokenizer, write_jsonl
from small_disk import fill, make_read_only, small_disk

from versatune_ds.data.cache import unit_writer
from versatune_ds.data.cache.prepare import open_caches, prepare
from versatune_ds.foundations.errors import StateError

ROWS = 3000


@pytest.fixture
def case(tmp_path):
    """A configuration whose cache folder lies on a disk of 4 MiB, and a filler to delete."""
    qwen_like_tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "law.jsonl", pairs(ROWS))
    with small_disk(tmp_path / "disk", "4m") as disk:
        cache = str(disk / "cache")
        initial = {"law": 1, "code": 0}
        yield disk, data_config(tmp_path, tmp_path / "tokenizer", source, cache_dir=cache, initial=initial)


@pytest.mark.parametrize("leave_bytes", [0, 16 << 10, 64 << 10, 256 << 10])
def test_a_full_disk_is_named_and_the_preparation_goes_on_when_there_is_room(case, leave_bytes, monkeypatch):
    disk, config = case
    monkeypatch.setattr(unit_writer, "JOURNAL_EVERY_S", 0.0)
    filler = fill(disk, leave_bytes)
    with pytest.raises(StateError, match=r"no space left|No space left") as failure:
        prepare(config, progress=False)
    assert str(config.data.cache_dir) in str(failure.value)
    with pytest.raises(StateError, match="versatune-ds prepare"):  # training takes no half of a cache
        open_caches(config)
    filler.unlink()
    prepare(config, progress=False)
    (law, _) = open_caches(config)["train"]
    law.verify(full=True)
    assert len(law) == ROWS


def test_a_read_only_cache_folder_is_named(case):
    disk, config = case
    make_read_only(disk)
    with pytest.raises(StateError, match="Read-only file system"):
        prepare(config, progress=False)
