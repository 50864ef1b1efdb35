"""A block of raw rows becomes samples: decoded, checked, rendered, tokenised, shortened. A pure function.

What is not covered: reading blocks (`rows/readers.py`), and the processes that run this (`workers.py`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from versatune_ds.data.cache.cache import SampleArrays
from versatune_ds.data.chat.conversation import Conversation, Turn, to_train
from versatune_ds.data.encode.chat_encoder import ChatEncoder, EncodedSample
from versatune_ds.data.rows.blocks import Block, RowPlace
from versatune_ds.data.rows.files import InputFile
from versatune_ds.data.rows.readers import decode_block
from versatune_ds.data.rows.reasons import NEVER_FATAL, BadRow, Reason, short
from versatune_ds.data.rows.schemas import Content, RowSchema, TextRow, TokenRow

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
    reasoning: str = "keep"
    train_on: str = "all_turns"


@dataclass(frozen=True)
class EncodeTask:
    file: InputFile
    schema: RowSchema
    format: str | None
    block: Block


@dataclass(frozen=True)
class Problem:
    place: RowPlace
    domain: str
    reason: str
    message: str
    excerpt: str
    is_fatal: bool
    """It stops the preparation."""


@dataclass
class BlockResult:
    rows: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    """Names that the rows have, in the order found."""
    samples: dict[str, SampleArrays] = field(default_factory=dict)
    """By domain."""
    problems: list[Problem] = field(default_factory=list)
    """In the order of the rows."""
    notes: dict[str, Counter[str]] = field(default_factory=dict)
    """By domain: rows, and what `cache/summary.py` names."""


@dataclass(eq=False)
class _Row:
    place: RowPlace
    raw: Any
    """As it stands in the file, for the excerpt; None: it cannot be shown."""
    domain: str
    content: Content = field(init=False)


def encode_block(task: EncodeTask, settings: EncodeSettings) -> BlockResult:
    """Decode, check, render and tokenise a block: a pure function of its arguments."""
    return _BlockEncoder(task, settings).run()


class _BlockEncoder:
    def __init__(self, task: EncodeTask, settings: EncodeSettings) -> None:
        self.task = task
        self.settings = settings
        self.result = BlockResult()

    def run(self) -> BlockResult:
        by_domain: dict[str, list[tuple[_Row, EncodedSample]]] = {}
        for row, sample in self._encode(self._check_rows()):
            by_domain.setdefault(row.domain, []).append((row, sample))
        self.result.samples = {
            domain: _join(items, self.settings.dtype) for domain, items in by_domain.items()
        }
        self.result.problems.sort(key=lambda problem: problem.place.number)
        return self.result

    def _note(self, row: _Row, what: str, count: int = 1) -> None:
        self.result.notes.setdefault(row.domain, Counter())[what] += count

    def _reject(self, row: _Row, error: BadRow, is_fatal: bool | None = None) -> None:
        if is_fatal is None:
            is_fatal = self.settings.stop_at_bad_row and error.reason not in NEVER_FATAL
        excerpt = "" if row.raw is None else short(row.raw, EXCERPT_CHARS)
        self.result.problems.append(
            Problem(row.place, row.domain, error.reason.value, error.message, excerpt, is_fatal)
        )

    def _check_rows(self) -> list[_Row]:
        """Rows that fit their schema."""
        block, schema, good = self.task.block, self.task.schema, []
        for place, found in decode_block(self.task.file, block):
            at = place.number - block.first
            raw = block.items[at] if at < len(block.items) else found
            row = _Row(place, None if isinstance(raw, BadRow) else raw, schema.domain or NO_DOMAIN)
            try:
                if isinstance(found, BadRow):
                    raise found
                self.result.columns |= dict.fromkeys(found)
                row.domain = schema.domain_of(found)
                row.content = schema.parse(found, self.task.format, drop_nulls=bool(block.arrow))
                if isinstance(row.content, Conversation):
                    self.result.columns |= dict.fromkeys(sorted(row.content.unused))
                    row.content = to_train(row.content, self.settings.reasoning, self.settings.train_on)
                good.append(row)
            except BadRow as error:
                self._reject(row, error)
            if at < block.num_rows:  # else it stands for damage to the file
                self.result.rows += 1
                self._note(row, "rows")
        return good

    def _encode(self, rows: Sequence[_Row]) -> Iterator[tuple[_Row, EncodedSample]]:
        encoder = self.settings.encoder
        conversations = [row.content for row in rows if isinstance(row.content, Conversation)]
        rendered = iter(encoder.encode(conversations))
        for row in rows:
            try:
                content = row.content
                sample = next(rendered) if isinstance(content, Conversation) else encoder.plain(content)
                if isinstance(sample, BadRow):
                    raise sample
            except BadRow as error:
                self._reject(row, error)
                continue
            for what in self._worth_a_note(content, sample):
                self._note(row, what)
            for piece in self._fit(row, sample):
                yield row, piece

    def _worth_a_note(self, content: Content, sample: EncodedSample) -> Iterator[str]:
        if sample.has_special_text:
            yield "special_text"
        if sample.was_rewritten:
            yield "rewritten"
        if isinstance(content, Conversation):
            yield from sorted(content.notes)
            if any(name not in self.settings.encoder.template.text for name in content.variables):
                yield "unread_variables"
        elif sample.weights is not None:
            yield "weighted"

    def _fit(self, row: _Row, sample: EncodedSample) -> list[EncodedSample]:
        """The sample, or what `data.overlong` makes of one that does not fit a pack."""
        limit, policy, size = self.settings.pack_len, self.settings.overlong, len(sample.tokens)
        if size <= limit:
            return [sample]
        found = f"the sample has {size} tokens, batch.pack_len is {limit}"
        if policy in ("error", "drop"):
            cure = "set data.overlong to drop, truncate or split, or raise batch.pack_len"
            error = BadRow(Reason.OVERLONG, f"{found}; {cure if policy == 'error' else 'dropped'}")
            self._reject(row, error, is_fatal=policy == "error")
            return []
        pieces = [
            EncodedSample(
                sample.tokens[i : i + limit],
                sample.mask[i : i + limit],
                None if sample.weights is None else sample.weights[i : i + limit],
            )
            for i in range(0, limit if policy == "truncate" else size, limit)
        ]
        kept = [piece for piece in pieces if piece.mask[1:].any()]
        if kept:
            self._note(row, "truncated" if policy == "truncate" else "split")
            self._note(row, "pieces_dropped", len(pieces) - len(kept))
        else:
            nothing = f"{found}; {policy} leaves nothing supervised"
            self._reject(row, BadRow(Reason.OVERLONG_NOTHING_LEFT, nothing))
        return kept


def _join(items: Sequence[tuple[_Row, EncodedSample]], dtype: str) -> SampleArrays:
    samples = [sample for _, sample in items]
    rows = dict.fromkeys(row for row, _ in items)  # once, also where a row was split into several samples
    return SampleArrays(
        tokens=np.concatenate([s.tokens for s in samples]).astype(dtype),
        mask=np.concatenate([s.mask for s in samples]).view(np.uint8),
        lengths=np.array([len(s.tokens) for s in samples], dtype="<i4"),
        supervised=np.array([np.count_nonzero(s.mask[1:]) for s in samples], dtype="<i4"),
        source_number=np.array([row.place.number for row, _ in items], dtype="<i8"),
        digests=np.array([_digests(row.content) for row in rows], dtype="<u8"),
        weights=None
        if all(s.weights is None for s in samples)
        else np.concatenate([s.mask.astype("<f4") if s.weights is None else s.weights for s in samples]),
    )


def _digests(row: Content) -> tuple[int, int]:
    """Hashes of the prompt (all before the last response) and of the whole row."""
    if isinstance(row, TokenRow):
        mask = row.mask if row.weights is None else row.weights
        prompt, rest = row.tokens[~row.mask].tobytes(), row.tokens.tobytes() + mask.tobytes()
    elif isinstance(row, TextRow):
        prompt, rest = b"", repr(row).encode()
    else:
        last = max(i for i, turn in enumerate(row.turns) if turn.role == "assistant")
        turns = [
            f"{turn.role} {len(turn.content)} {turn.content}{_beside(turn)}".encode() for turn in row.turns
        ]
        prompt, rest = b"".join(turns[:last]), b"".join(turns[last:])
        if row.tools or row.variables:
            prompt += repr((row.tools, row.variables)).encode()
    first = hashlib.blake2b(prompt, digest_size=8).digest()
    whole = hashlib.blake2b(first + rest, digest_size=8).digest()
    return int.from_bytes(first, "little"), int.from_bytes(whole, "little")


def _beside(turn: Turn) -> str:
    """What a turn says beside its text; nothing where it says nothing."""
    said = (turn.reasoning, turn.calls, turn.weight if turn.role == "assistant" else None, turn.is_open)
    return "" if said == ("", (), None, False) else repr(said)
