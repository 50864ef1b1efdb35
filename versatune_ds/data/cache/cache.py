"""The token cache: samples of one domain as flat, memory-mapped arrays, and the writer that makes it.

A cache is a folder:

    tokens.bin         uint16[N] or uint32[N]   token ids of all samples, one after the other
    mask.bin           uint8[N]                 1 where the token is supervised
    offsets.bin        int64[n + 1]             sample i is tokens[offsets[i] : offsets[i + 1]]
    lengths.bin        int32[n]                 tokens per sample
    supervised.bin     int32[n]                 supervised tokens per sample, counted on shifted labels
    weights.bin        float32[N]               factor of the token in the loss, 0 where it is not supervised;
                                                only there if one is neither 0 nor 1
    weight_sums.bin    float64[n]               sum of these per sample, on shifted labels; with weights.bin
    source_index.bin   int32[n]                 which of the manifest's sources the sample comes from
    source_number.bin  int64[n]                 its line or row there, from 1
    manifest.json      sizes and SHA-256 of these, sources, counts, and a hash of the manifest itself

All numbers are little-endian. N tokens, n samples. The first token of a sample has no predecessor in it and
is never a target, so its mask does not count in `supervised`.

The writer appends in the order of the rows and can be rolled back to a journalled length, which is how an
interrupted preparation goes on. Nothing in a finished cache depends on time, host or number of workers.

What is not covered: what goes into a cache and when it is out of date (`prepare.py`).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.foundations.errors import StateError
from versatune_ds.foundations.files import canonical_hash, fsync_dir, sha256_file, write_json_atomic

CACHE_SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
CHUNK = 1 << 20
"""Array elements handled at a time where a whole array could be too large for memory."""

# Files that grow with every block, and their types; tokens.bin has its type in the manifest.
APPENDED = {
    "tokens.bin": None,
    "mask.bin": "u1",
    "lengths.bin": "<i4",
    "supervised.bin": "<i4",
    "source_index.bin": "<i4",
    "source_number.bin": "<i8",
}
OFFSETS = ("offsets.bin", "<i8")
WEIGHTS = ("weights.bin", "<f4")
WEIGHT_SUMS = ("weight_sums.bin", "<f8")
REMEDY = "prepare builds damaged caches anew"


def token_dtype(vocab_size: int) -> str:
    """Type of tokens.bin: 2 bytes where the vocabulary allows it."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class TokenCache:
    """Samples of one domain and split, memory-mapped and read-only. Open with `TokenCache.open`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.domain: str = manifest["domain"]
        self.fingerprint: str = manifest["fingerprint"]
        """Hash of all content: equal caches, wherever and however they were made, have equal ones."""
        self.num_tokens: int = manifest["tokens"]
        """Tokens of all samples."""
        self.num_supervised: int = manifest["supervised_tokens"]
        """Supervised tokens of all samples, counted on shifted labels."""
        self.lengths: npt.NDArray[np.int32] = self._map("lengths.bin", "<i4")
        """int32[n], tokens per sample."""
        self.supervised: npt.NDArray[np.int32] = self._map("supervised.bin", "<i4")
        """int32[n], supervised tokens per sample, counted on shifted labels."""
        self._tokens = self._map("tokens.bin", manifest["tokens_dtype"])
        self._mask = self._map("mask.bin", "u1").view(np.bool_)
        self._offsets = self._map(*OFFSETS)
        has_weights = WEIGHTS[0] in manifest["files"]
        self.weight_sums: npt.NDArray[np.float64] | None = self._map(*WEIGHT_SUMS) if has_weights else None
        """float64[n], sum of the weights of each sample's labels; None: all weights are 1."""
        self._weights = self._map(*WEIGHTS) if has_weights else self._mask
        self._source_index = self._map("source_index.bin", "<i4")
        self._source_number = self._map("source_number.bin", "<i8")

    @classmethod
    def open(cls, folder: str | Path) -> TokenCache:
        """Open a cache; checks its manifest and the sizes of its files (see `verify` for their content).

        Raises:
            StateError: the cache is missing, incomplete, or of another version.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder, MANIFEST_FILE, "token cache"))

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return TokenCache.open, (self.folder,)

    def __len__(self) -> int:
        return int(self.manifest["samples"])

    def sample(self, i: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[Any]]:
        """Sample i: tokens uint32[len] and mask bool[len] (True: supervised), or float32[len] weights.

        Raises:
            IndexError: there is no sample i.
        """
        start, stop = self._bounds(i)
        return self._tokens[start:stop].astype(np.uint32), self._weights[start:stop]

    def source_of(self, i: int) -> tuple[str, int]:
        """(path, line or row from 1) that sample i came from, as it was called at preparation time."""
        self._bounds(i)
        return self.manifest["sources"][int(self._source_index[i])]["path"], int(self._source_number[i])

    def verify(self, full: bool = False) -> None:
        """Compare sizes, with `full` every byte, with the manifest; StateError: the first damaged file."""
        for name, expected in self.manifest["files"].items():
            check_file(self.folder / name, expected, full)

    def _bounds(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a cache with {len(self)} samples ({self.folder})")
        return int(self._offsets[i]), int(self._offsets[i + 1])

    def _map(self, name: str, dtype: str) -> npt.NDArray[Any]:
        path = self.folder / name
        _check_size(path, self.manifest["files"][name]["bytes"])
        # asarray: slices of np.memmap itself are some ten times slower than those of a plain view of it
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says about a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def check_file(path: Path, expected: Mapping[str, Any], full: bool) -> None:
    """Raise StateError where a file differs from its entry in a manifest: in size, with `full` in content."""
    _check_size(path, expected["bytes"])
    if full and sha256_file(path) != expected["sha256"]:
        raise StateError(f"{path}: the content is not what was written (SHA-256 differs); {REMEDY}")


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StateError(f"{path}: missing from the token cache ({error.strerror}); {REMEDY}") from None
    if size != expected:
        raise StateError(f"{path}: has {size} bytes, the manifest says {expected}; {REMEDY}")


def read_manifest(folder: Path, name: str, what: str) -> dict[str, Any]:
    """A manifest whose own hash is right; StateError: missing, damaged, or of another schema version."""
    path = folder / name
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StateError(f"{folder}: no {what} here ({name} is missing)") from None
    except (OSError, ValueError) as error:
        raise StateError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    if not isinstance(manifest, dict) or manifest.get("fingerprint") != manifest_fingerprint(manifest):
        raise StateError(f"{path}: the content is not what was written (its hash differs); {REMEDY}")
    if manifest.get("schema_version") != CACHE_SCHEMA_VERSION:
        raise StateError(
            f"{path}: {what} of version {manifest.get('schema_version')}, this program reads version "
            f"{CACHE_SCHEMA_VERSION}; {REMEDY}"
        )
    return manifest


def manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Hash over a manifest without its fingerprint and without paths, which do not change the content."""
    content = {name: value for name, value in manifest.items() if name != "fingerprint"}
    if "sources" in content:
        content["sources"] = [
            {key: value for key, value in source.items() if key != "path"} for source in content["sources"]
        ]
    return canonical_hash(content)


@dataclass(frozen=True)
class SampleArrays:
    """Encoded samples of one domain, in order, ready to be appended."""

    tokens: npt.NDArray[Any]
    """Of the cache's token type, all samples joined."""
    mask: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    source_number: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]
    """uint64[n, 2]: hash of the prompt (all but the last response) and of the whole row."""
    weights: npt.NDArray[np.float32] | None = None
    """As many as tokens; None: those of the mask."""


class CacheWriter:
    """Appends samples of several domains under one folder; made anew or rolled back to a journalled state.

    Args:
        folder: of the unit that is being prepared; every domain gets a sub-folder.
        dtype: type of tokens.bin.
        sizes: bytes of each file (relative path) to go on from; files are cut to these, others removed.
    """

    DIGESTS = "digests.tmp"

    def __init__(self, folder: Path, dtype: str, sizes: Mapping[str, int]) -> None:
        self.folder = folder
        self.dtype = dtype
        self._sizes = dict(sizes)
        self._unsynced: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)
        for name, size in sizes.items():
            path = folder / name
            if path.stat().st_size < size:
                raise StateError(f"{path}: shorter than its journal says")
            os.truncate(path, size)
        for path in folder.rglob("*"):
            if path.is_file() and str(path.relative_to(folder)) not in sizes:
                path.unlink()

    def append(self, domain_folder: str, source_index: int, samples: SampleArrays) -> None:
        """Write samples behind those that are there."""
        n = len(samples.lengths)
        name, masks = f"{domain_folder}/{WEIGHTS[0]}", f"{domain_folder}/mask.bin"
        if samples.weights is not None or name in self._sizes:
            if name not in self._sizes and masks in self._sizes:  # what came before has its masks
                for mask in _parts(self.folder / masks, "u1"):
                    self._write(name, mask.astype(WEIGHTS[1]).data)
            weights = samples.mask if samples.weights is None else samples.weights
            self._write(name, weights.astype(WEIGHTS[1]).data)
        for name, values in (
            ("tokens.bin", samples.tokens),
            ("mask.bin", samples.mask),
            ("lengths.bin", samples.lengths),
            ("supervised.bin", samples.supervised),
            ("source_index.bin", np.full(n, source_index, dtype="<i4")),
            ("source_number.bin", samples.source_number),
            (self.DIGESTS, samples.digests),
        ):
            self._write(f"{domain_folder}/{name}", np.ascontiguousarray(values).data)

    def write_text(self, name: str, text: str) -> None:
        self._write(name, text.encode("utf-8"))

    def _write(self, name: str, data: Any) -> None:
        # Opened for each block: hundreds of domains would else need thousands of open files.
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "ab") as file:
            file.write(data)
        self._sizes[name] = path.stat().st_size
        self._unsynced.add(name)

    def sync(self) -> dict[str, int]:
        """Make everything durable; returns the bytes of each file, for the journal."""
        for name in sorted(self._unsynced):
            with open(self.folder / name, "rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()
        return dict(self._sizes)

    def finish_domain(self, domain_folder: str, about: Mapping[str, Any]) -> dict[str, Any]:
        """Write offsets and manifest of a domain once all samples are in and the files are synced.

        Args:
            domain_folder: with at least one sample.
            about: what the manifest says beside sizes and hashes.
        """
        folder = self.folder / domain_folder
        duplicates, conflicting = count_repeats(folder / self.DIGESTS)
        samples, tokens = _write_offsets(folder)
        supervised = sum(int(part.sum(dtype=np.int64)) for part in _parts(folder / "supervised.bin", "<i4"))
        manifest: dict[str, Any] = {
            "schema_version": CACHE_SCHEMA_VERSION,
            **about,
            "samples": samples,
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_dtype": self.dtype,
            "duplicates": duplicates,
            "conflicting": conflicting,
            "files": {name: file_entry(folder / name) for name in (*APPENDED, OFFSETS[0])},
        }
        if (folder / WEIGHTS[0]).exists():
            _write_weight_sums(folder)
            manifest["files"] |= {name: file_entry(folder / name) for name in (WEIGHTS[0], WEIGHT_SUMS[0])}
        manifest["fingerprint"] = manifest_fingerprint(manifest)
        write_json_atomic(folder / MANIFEST_FILE, manifest)
        return manifest

    def drop_temporary(self, domain_folder: str) -> None:
        """Remove what only the preparation needed."""
        (self.folder / domain_folder / self.DIGESTS).unlink(missing_ok=True)
        fsync_dir(self.folder / domain_folder)


def _parts(path: Path, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """A flat array file, some elements at a time."""
    size = CHUNK * np.dtype(dtype).itemsize
    with open(path, "rb") as file:
        while data := file.read(size):
            yield np.frombuffer(data, dtype=dtype)


def _write_offsets(folder: Path) -> tuple[int, int]:
    """offsets.bin from lengths.bin; returns (samples, tokens)."""
    samples = total = 0
    with open(folder / OFFSETS[0], "wb") as file:
        file.write(np.zeros(1, dtype=OFFSETS[1]).data)
        for lengths in _parts(folder / "lengths.bin", "<i4"):
            ends = np.cumsum(lengths, dtype=OFFSETS[1]) + total
            file.write(ends.data)
            samples, total = samples + len(lengths), int(ends[-1])
        file.flush()
        os.fsync(file.fileno())
    return samples, total


def _write_weight_sums(folder: Path) -> None:
    """weight_sums.bin from weights.bin; a sample's first token is no label."""
    weights = np.memmap(folder / WEIGHTS[0], dtype=WEIGHTS[1], mode="r")
    offsets = np.fromfile(folder / OFFSETS[0], dtype=OFFSETS[1])
    sums = [float(weights[a + 1 : b].sum(dtype=np.float64)) for a, b in itertools.pairwise(offsets)]
    with open(folder / WEIGHT_SUMS[0], "wb") as file:
        file.write(np.array(sums, dtype=WEIGHT_SUMS[1]).data)
        file.flush()
        os.fsync(file.fileno())


def count_repeats(path: Path) -> tuple[int, int]:
    """(rows that repeat an earlier one, answers that conflict with another one to the same prompt).

    Args:
        path: uint64[n, 2] hashes of prompt and row. 64 bits: one false repeat in about 10^9 rows.
    """
    rows = path.stat().st_size // 16
    # Equal rows have equal prompts, so parts by prompt can be counted one after the other.
    num_parts = 1 + rows // (4 * CHUNK)
    distinct_rows = distinct_prompts = 0
    for part in range(num_parts):
        parts = (flat.reshape(-1, 2) for flat in _parts(path, "<u8"))
        chosen = [pairs[pairs[:, 0] % num_parts == part] for pairs in parts]
        pairs = np.concatenate([np.empty((0, 2), dtype="<u8"), *chosen])
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        differs = pairs[1:] != pairs[:-1]
        distinct_prompts += min(1, len(pairs)) + int(differs[:, 0].sum())
        distinct_rows += min(1, len(pairs)) + int(differs.any(axis=1).sum())
    return rows - distinct_rows, distinct_rows - distinct_prompts
