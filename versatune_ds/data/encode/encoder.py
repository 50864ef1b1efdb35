"""A block of raw rows becomes samples: decoded, checked, rendered, tokenised, shortened. A pure function.

What is not covered: reading blocks (`rows/readers.py`), and the processes that run this (`workers.py`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from versatune_ds.data.cache.cache import SampleArrays
from versatune_ds.data.encode.chat_encoder import ChatEncoder, EncodedSample
from versatune_ds.data.rows.blocks import Block, RowPlace
from versatune_ds.data.rows.files import InputFile
from versatune_ds.data.rows.readers import decode_block
from versatune_ds.data.rows.reasons import NEVER_FATAL, BadRow, Reason, short
from versatune_ds.data.rows.schemas import Conversation, RowSchema, TokenRow

EXCERPT_CHARS = 200
NO_DOMAIN = "(unknown)"
"""Stands for the domain of a row that has none."""


@dataclass(frozen=True)
class EncodeSettings:
    """What a worker needs for all blocks."""

    encoder: ChatEncoder
    pack_len: int
    overlong: str
    stop_at_bad_row: bool
    dtype: str


@dataclass(frozen=True)
class EncodeTask:
    """A block of rows to encode."""

    file: InputFile
    schema: RowSchema
    format: str | None
    block: Block


@dataclass(frozen=True)
class Problem:
    """A row that is not trained on."""

    place: RowPlace
    domain: str
    reason: str
    message: str
    excerpt: str
    is_fatal: bool
    """It stops the preparation."""


@dataclass
class BlockResult:
    """What became of a block."""

    rows: int = 0
    samples: dict[str, SampleArrays] = field(default_factory=dict)
    """By domain."""
    problems: list[Problem] = field(default_factory=list)
    """In the order of the rows."""
    notes: dict[str, Counter[str]] = field(default_factory=dict)
    """By domain: rows, truncated, split, pieces_dropped, special_text, rewritten."""


@dataclass(frozen=True)
class _Encoded:
    """A row that became tokens."""

    domain: str
    place: RowPlace
    digests: tuple[int, int]
    sample: EncodedSample


def encode_block(task: EncodeTask, settings: EncodeSettings) -> BlockResult:
    """Decode, check, render and tokenise a block: a pure function of its arguments."""
    return _BlockEncoder(task, settings).run()


class _BlockEncoder:
    def __init__(self, task: EncodeTask, settings: EncodeSettings) -> None:
        self.task = task
        self.settings = settings
        self.result = BlockResult()

    def run(self) -> BlockResult:
        self._collect(self._encode(self._check_rows()))
        self.result.problems.sort(key=lambda problem: problem.place.number)
        return self.result

    def _note(self, domain: str, what: str, count: int = 1) -> None:
        self.result.notes.setdefault(domain, Counter())[what] += count

    def _reject(
        self, place: RowPlace, domain: str, error: BadRow, row: Any, fatal: bool | None = None
    ) -> None:
        block = self.task.block
        if block.items and place.number < block.first + len(block.items):
            raw = block.items[place.number - block.first]
            row = "" if isinstance(raw, BadRow) else raw
        if fatal is None:
            fatal = self.settings.stop_at_bad_row and error.reason not in NEVER_FATAL
        excerpt = short(row, EXCERPT_CHARS) if row != "" else ""
        problem = Problem(place, domain, error.reason.value, error.message, excerpt, fatal)
        self.result.problems.append(problem)

    def _check_rows(self) -> list[tuple[RowPlace, str, Conversation | TokenRow, Any]]:
        """Rows that fit their schema, each with place, domain and raw form."""
        schema, good = self.task.schema, []
        end = self.task.block.first + self.task.block.num_rows
        for place, row in decode_block(self.task.file, self.task.block):
            domain = schema.domain or NO_DOMAIN
            try:
                if isinstance(row, BadRow):
                    raise row
                domain = schema.domain_of(row)
                good.append((place, domain, schema.parse(row, self.task.format), row))
            except BadRow as error:
                self._reject(place, domain, error, "" if isinstance(row, BadRow) else row)
            if place.number < end:  # else it stands for damage to the file
                self.result.rows += 1
                self._note(domain, "rows")
        return good

    def _encode(self, rows: list[tuple[RowPlace, str, Conversation | TokenRow, Any]]) -> Iterator[_Encoded]:
        encoder = self.settings.encoder
        conversations = [row for _, _, row, _ in rows if isinstance(row, Conversation)]
        rendered = iter(encoder.encode(conversations))
        for place, domain, row, raw in rows:
            try:
                if isinstance(row, TokenRow):
                    sample, digests = encoder.check_tokens(row), _token_digests(row)
                else:
                    outcome = next(rendered)
                    if isinstance(outcome, BadRow):
                        raise outcome
                    sample, digests = outcome, _text_digests(row)
            except BadRow as error:
                self._reject(place, domain, error, raw)
                continue
            if sample.has_special_text:
                self._note(domain, "special_text")
            if sample.was_rewritten:
                self._note(domain, "rewritten")
            if len(sample.tokens) > self.settings.pack_len:
                yield from self._shorten(_Encoded(domain, place, digests, sample), raw)
            else:
                yield _Encoded(domain, place, digests, sample)

    def _shorten(self, item: _Encoded, raw: Any) -> list[_Encoded]:
        """Apply `data.overlong` to a sample that does not fit a pack."""
        limit, policy, sample = self.settings.pack_len, self.settings.overlong, item.sample
        found = f"the sample has {len(sample.tokens)} tokens, batch.pack_len is {limit}"
        if policy == "error":
            error = BadRow(
                Reason.OVERLONG,
                f"{found}; set data.overlong to drop, truncate or split, or raise batch.pack_len",
            )
            self._reject(item.place, item.domain, error, raw, fatal=True)
            return []
        if policy == "drop":
            self._reject(item.place, item.domain, BadRow(Reason.OVERLONG, f"{found}; dropped"), raw)
            return []
        stop = limit if policy == "truncate" else len(sample.tokens)
        pieces = [
            EncodedSample(sample.tokens[i : i + limit], sample.mask[i : i + limit])
            for i in range(0, stop, limit)
        ]
        kept = [piece for piece in pieces if piece.mask[1:].any()]
        if not kept:
            error = BadRow(Reason.OVERLONG_NOTHING_LEFT, f"{found}; {policy} leaves nothing supervised")
            self._reject(item.place, item.domain, error, raw)
            return []
        self._note(item.domain, "truncated" if policy == "truncate" else "split")
        self._note(item.domain, "pieces_dropped", len(pieces) - len(kept))
        return [_Encoded(item.domain, item.place, item.digests, piece) for piece in kept]

    def _collect(self, encoded: Iterable[_Encoded]) -> None:
        by_domain: dict[str, list[_Encoded]] = {}
        for item in encoded:
            by_domain.setdefault(item.domain, []).append(item)
        for domain, items in by_domain.items():
            samples = [item.sample for item in items]
            self.result.samples[domain] = SampleArrays(
                tokens=np.concatenate([s.tokens for s in samples]).astype(self.settings.dtype),
                mask=np.concatenate([s.mask for s in samples]).view(np.uint8),
                lengths=np.array([len(s.tokens) for s in samples], dtype="<i4"),
                supervised=np.array([np.count_nonzero(s.mask[1:]) for s in samples], dtype="<i4"),
                source_number=np.array([item.place.number for item in items], dtype="<i8"),
                digests=np.array(_first_pieces(items), dtype="<u8").reshape(-1, 2),
            )


def _first_pieces(items: Sequence[_Encoded]) -> list[tuple[int, int]]:
    """Hashes of the rows: one per row, also where a row was split into several samples."""
    return [
        item.digests
        for i, item in enumerate(items)
        if i == 0 or items[i - 1].place.number != item.place.number
    ]


def _digest_pair(prompt: bytes, rest: bytes) -> tuple[int, int]:
    first = hashlib.blake2b(prompt, digest_size=8)
    prompt_digest = int.from_bytes(first.digest(), "little")
    first = hashlib.blake2b(first.digest() + rest, digest_size=8)
    return prompt_digest, int.from_bytes(first.digest(), "little")


def _text_digests(row: Conversation) -> tuple[int, int]:
    """Hashes of the prompt (all before the last response) and of the whole row."""
    last = max(i for i, (role, _) in enumerate(row.turns) if role == "assistant")
    prompt = "".join(f"{role} {len(content)} {content}" for role, content in row.turns[:last])
    rest = "".join(f"{role} {len(content)} {content}" for role, content in row.turns[last:])
    return _digest_pair(prompt.encode("utf-8"), rest.encode("utf-8"))


def _token_digests(row: TokenRow) -> tuple[int, int]:
    return _digest_pair(row.tokens[~row.mask].tobytes(), row.tokens.tobytes() + row.mask.tobytes())
