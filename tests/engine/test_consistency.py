"""Ranks with different code, settings, models or data are told apart, and the odd ones are named."""

from __future__ import annotations

import shutil

import pytest
from prepared import data_config, pairs, qwen_like_tokenizer, write_jsonl

import versatune_ds
from versatune_ds.data.cache.prepare import prepare
from versatune_ds.engine.preflight import checks as preflight
from versatune_ds.engine.preflight import consistency
from versatune_ds.foundations import distributed
from versatune_ds.foundations.errors import DataError, StateError


def test_the_minority_is_named_with_its_host_and_part():
    parts = [{"code": "a", "data": "x"}, {"code": "b", "data": "x"}, {"code": "a", "data": "x"}]
    (found,) = consistency.differences(["n1", "n2", "n3"], parts)
    assert found == "code (rank 1 on n2 has b; the others have a)"
    assert consistency.differences(["n1"] * 2, [parts[0], parts[2]]) == []


def test_a_part_that_one_rank_lacks_is_a_difference():
    (found,) = consistency.differences(["n1", "n2"], [{"eval cache of law": "a"}, {}])
    assert "eval cache of law" in found and "nothing" in found


def test_a_difference_raises_on_every_rank(monkeypatch):
    everyone = [("n1", {"code": "a"}), ("n2", {"code": "b"})]
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: everyone)
    with pytest.raises(StateError, match=r"not have the same code.*rank 1 on n2 has b"):
        consistency.require_consistency("code", {"code": "a"})


def test_code_hashes_follow_content_and_names(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(consistency._package(versatune_ds), package)
    ours = consistency.folder_hash(consistency._package(versatune_ds), ".py")
    assert consistency.folder_hash(package, ".py") == ours
    (package / "notes.txt").write_text("not code")
    assert consistency.folder_hash(package, ".py") == ours
    with open(package / "engine" / "train.py", "a") as file:
        file.write("\n")
    assert consistency.folder_hash(package, ".py") != ours


def test_model_folders_are_compared_by_settings_and_weight_sizes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"0" * (consistency.HASHED_BYTES + 1))
    before = consistency.folder_fingerprint(str(tmp_path))
    weights.write_bytes(b"0" * (consistency.HASHED_BYTES + 2))
    larger = consistency.folder_fingerprint(str(tmp_path))
    (tmp_path / "config.json").write_text("{ }")
    assert len({before, larger, consistency.folder_fingerprint(str(tmp_path))}) == 3
    assert consistency.folder_fingerprint("owner/name") == "owner/name"


@pytest.fixture
def prepared(tmp_path):
    qwen_like_tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = write_jsonl(tmp_path / "law.jsonl", pairs(20))
    config = data_config(
        tmp_path,
        tmp_path / "tokenizer",
        source,
        eval=[{"path": str(source), "domain": "law"}],
        initial={"law": 1, "code": 0},
    )
    prepare(config, progress=False)
    return config


def test_fingerprints_of_a_run(prepared):
    parts = consistency.code_and_settings(prepared)
    assert {"code of versatune_ds", "configuration", "model folder", "version of torch"} <= parts.keys()


def test_a_cache_with_a_flipped_bit_is_refused_before_training(prepared):
    """Its size is right, so opening it alone would not tell."""
    caches = preflight.open_verified_caches(prepared)
    tokens = caches["train"][0].folder / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(StateError, match=r"tokens\.bin: the content is not what was written") as failure:
        preflight.open_verified_caches(prepared)
    assert "versatune-ds prepare" in str(failure.value)
    prepare(prepared, progress=False)
    preflight.open_verified_caches(prepared)


def test_the_ranks_of_a_node_share_the_check(prepared, monkeypatch):
    """Two ranks look at different files, together at all."""
    looked: list[set[str]] = []
    monkeypatch.setattr(preflight, "check_file", lambda path, *rest, **kw: looked[-1].add(str(path)))
    for rank in ("0", "1"):
        looked.append(set())
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("LOCAL_SIZE", "2")
        caches = preflight.open_verified_caches(prepared)
    everything = {
        str(cache.folder / name)
        for of_split in caches.values()
        for cache in of_split
        if cache is not None
        for name in cache.manifest["files"]
    }
    assert looked[0] and looked[1] and not looked[0] & looked[1]
    assert looked[0] | looked[1] == everything


@pytest.mark.parametrize("what", ["truncated", "half copied", "gone"])
def test_other_damage_of_a_cache_is_named(prepared, what):
    folder = preflight.open_verified_caches(prepared)["train"][0].folder
    if what == "truncated":
        content = (folder / "mask.bin").read_bytes()
        (folder / "mask.bin").write_bytes(content[:-1])
    elif what == "half copied":
        (folder / "offsets.bin").unlink()
    else:
        shutil.rmtree(folder.parent)
    with pytest.raises(StateError, match="versatune-ds prepare"):
        preflight.open_verified_caches(prepared)


def test_a_source_that_changed_after_prepare_is_named(prepared, tmp_path):
    write_jsonl(tmp_path / "law.jsonl", pairs(21))
    with pytest.raises(StateError, match=r"law\.jsonl.*changed|changed.*law\.jsonl") as failure:
        preflight.open_verified_caches(prepared)
    assert "versatune-ds prepare" in str(failure.value)
    (tmp_path / "law.jsonl").unlink()
    with pytest.raises(DataError, match=r"law\.jsonl"):
        preflight.open_verified_caches(prepared)
