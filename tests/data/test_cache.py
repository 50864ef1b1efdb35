"""A cache gives back what was written, and notices what is not."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from versatune_ds.data.cache import cache as cache_module
from versatune_ds.data.cache.cache import CacheWriter, SampleArrays, TokenCache, count_repeats, token_dtype
from versatune_ds.foundations.errors import StateError

SAMPLES = [([1, 2, 3], [0, 1, 1]), ([70_000], [1]), ([4, 5], [1, 1]), ([6] * 9, [0] * 8 + [1])]
SOURCES = [{"path": "a.jsonl", "sha256": "x"}, {"path": "b.jsonl", "sha256": "y"}]


def samples(chosen: list[tuple[list[int], list[int]]], first_line: int, dtype: str = "<u4") -> SampleArrays:
    n = len(chosen)
    return SampleArrays(
        tokens=np.concatenate([tokens for tokens, _ in chosen]).astype(dtype),
        mask=np.concatenate([mask for _, mask in chosen]).astype("u1"),
        lengths=np.array([len(tokens) for tokens, _ in chosen], dtype="<i4"),
        supervised=np.array([sum(mask[1:]) for _, mask in chosen], dtype="<i4"),
        source_number=np.arange(first_line, first_line + n, dtype="<i8"),
        digests=np.arange(2 * n, dtype="<u8").reshape(n, 2),
    )


def write(folder: Path) -> TokenCache:
    writer = CacheWriter(folder, "<u4", {})
    writer.append("law", 0, samples(SAMPLES[:3], 1))
    writer.append("law", 1, samples(SAMPLES[3:], 7))
    writer.sync()
    writer.finish_domain("law", {"domain": "law", "sources": SOURCES})
    writer.drop_temporary("law")
    return TokenCache.open(folder / "law")


def test_round_trip(tmp_path: Path) -> None:
    cache = write(tmp_path)
    assert len(cache) == 4
    for i, (tokens, mask) in enumerate(SAMPLES):
        got_tokens, got_mask = cache.sample(i)
        assert got_tokens.dtype == np.uint32
        assert got_mask.dtype == np.bool_
        assert (got_tokens.tolist(), got_mask.tolist()) == (tokens, [bool(m) for m in mask])
    assert cache.lengths.tolist() == [3, 1, 2, 9]
    assert cache.supervised.tolist() == [2, 0, 1, 1], "the first token of a sample is never a target"
    assert (cache.num_tokens, cache.num_supervised, cache.domain) == (15, 4, "law")
    assert [cache.source_of(i) for i in (0, 2, 3)] == [("a.jsonl", 1), ("a.jsonl", 3), ("b.jsonl", 7)]
    with pytest.raises(IndexError, match="sample 4 of a cache with 4"):
        cache.sample(4)
    with pytest.raises(IndexError):
        cache.sample(-1)


def test_weights_begin_where_the_first_ones_come(tmp_path: Path) -> None:
    """A block without, one with, one without; sums leave out the first token of a sample."""
    writer = CacheWriter(tmp_path, "<u4", {})
    writer.append("law", 0, samples(SAMPLES[:2], 1))
    weighted = samples(SAMPLES[2:3], 3)
    writer.append("law", 0, dataclasses.replace(weighted, weights=np.array([0.5, 0.25], dtype="<f4")))
    writer.append("law", 1, samples(SAMPLES[3:], 7))
    writer.sync()
    writer.finish_domain("law", {"domain": "law", "sources": SOURCES})
    cache = TokenCache.open(tmp_path / "law")
    cache.verify(full=True)
    assert [cache.sample(i)[1].tolist() for i in range(3)] == [[0, 1, 1], [1], [0.5, 0.25]]
    assert cache.weight_sums is not None and cache.weight_sums.tolist() == [2, 0, 0.25, 1]
    assert cache.sample(3)[1].dtype == np.float32


def test_a_cache_can_be_sent_to_another_process(tmp_path: Path) -> None:
    cache = write(tmp_path)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.sample(0)[0].tolist() == [1, 2, 3]
    assert copy.fingerprint == cache.fingerprint


def test_the_fingerprint_is_the_content_not_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path / "a").fingerprint
    monkeypatch.setitem(SOURCES[0], "path", "elsewhere.jsonl")
    assert write(tmp_path / "b").fingerprint == first
    monkeypatch.setattr(sys.modules[__name__], "SAMPLES", [([1, 2, 4], [0, 1, 1]), *SAMPLES[1:]])
    assert write(tmp_path / "c").fingerprint != first


def test_small_vocabularies_take_two_bytes() -> None:
    assert [token_dtype(size) for size in (32_000, 65_536, 65_537)] == ["<u2", "<u2", "<u4"]


def test_a_cut_file_is_noticed_when_opened(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "law" / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match=r"tokens.bin: has 59 bytes, the manifest says 60.*prepare"):
        TokenCache.open(tmp_path / "law")


@pytest.mark.parametrize("name", ["tokens.bin", "mask.bin", "offsets.bin", "supervised.bin"])
def test_a_flipped_bit_is_noticed_by_full_verification(tmp_path: Path, name: str) -> None:
    cache = write(tmp_path)
    cache.verify(full=True)
    path = tmp_path / "law" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    cache.verify()
    with pytest.raises(StateError, match=f"{name}: the content is not what was written"):
        cache.verify(full=True)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text.replace('"samples": 4', '"samples": 5'), "its hash differs"),
        (lambda text: text[:50], "cannot be read"),
        (lambda text: "[]", "its hash differs"),
        (None, "no token cache here"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, damage: object, expected: str) -> None:
    write(tmp_path)
    path = tmp_path / "law" / "manifest.json"
    if callable(damage):
        path.write_text(damage(path.read_text()))
    else:
        path.unlink()
    with pytest.raises(StateError, match=expected):
        TokenCache.open(tmp_path / "law")


def test_another_schema_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr(cache_module, "CACHE_SCHEMA_VERSION", 99)
    with pytest.raises(StateError, match="of version 1, this program reads version 99"):
        TokenCache.open(tmp_path / "law")


def test_a_writer_goes_on_from_a_journalled_state(tmp_path: Path) -> None:
    undisturbed = write(tmp_path / "a").fingerprint
    writer = CacheWriter(tmp_path / "b", "<u4", {})
    writer.append("law", 0, samples(SAMPLES[:3], 1))
    sizes = writer.sync()
    writer.append("law", 0, samples(SAMPLES[:2], 50))  # lost: after the last sync
    writer.write_text("stray.txt", "x")
    writer = CacheWriter(tmp_path / "b", "<u4", sizes)
    assert not (tmp_path / "b" / "stray.txt").exists()
    writer.append("law", 1, samples(SAMPLES[3:], 7))
    writer.sync()
    writer.finish_domain("law", {"domain": "law", "sources": SOURCES})
    assert TokenCache.open(tmp_path / "b" / "law").fingerprint == undisturbed


@pytest.mark.parametrize("chunk", [2, 4, 1 << 20])
def test_repeats_and_conflicts_are_counted_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK", chunk)
    pairs = [(1, 10), (1, 10), (1, 11), (2, 20), (2, 20), (2, 20), (3, 30), (1, 12)]
    path = tmp_path / "digests"
    path.write_bytes(np.array(pairs, dtype="<u8").tobytes())
    repeated = len(pairs) - len(set(pairs))
    conflicting = len(set(pairs)) - len({prompt for prompt, _ in pairs})
    assert (repeated, conflicting) == (3, 2)
    assert count_repeats(path) == (repeated, conflicting)
