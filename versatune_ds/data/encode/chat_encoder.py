"""Conversations become token ids and a mask of supervised tokens, from one rendering.

The whole conversation is rendered once to text, with the character spans that the assistant wrote
(`templating.py`); the text is tokenised once, with offsets; a token is supervised if it lies inside a span.
So the ids are exactly those of `tokenizer.apply_chat_template(messages, tokenize=True)`, and the mask cannot
slip against them.

A token that lies partly outside a span is not supervised: at inference the prompt's tokens end at the span's
first character, so the model could not produce such a token.

What is not covered: tokenizers whose own method does more than its fast tokenizer (refused).
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.data.chat.conversation import Conversation, Turn
from versatune_ds.data.encode.templating import ChatRenderer, RenderedChat
from versatune_ds.data.encode.tokenizer import require_rows, warn_once
from versatune_ds.data.rows.reasons import BadRow, Reason
from versatune_ds.data.rows.schemas import TextRow, TokenRow
from versatune_ds.foundations.errors import ConfigError
from versatune_ds.foundations.files import canonical_hash

MAX_HEAD_CHARS = 256
HEAD_LOOKAHEAD_CHARS = 48
"""Enough for a few words of a turn; where it is not, the whole text is tokenised again with offsets."""


def stop_token(tokenizer: Any, name: str) -> str:
    """Text of the token that ends an assistant turn under `data.chat_template: name`.

    An exported model should stop at it; for base models it often differs from the eos token.

    Raises:
        ConfigError: as `ChatEncoder.build`.
    """
    return ChatEncoder.build(tokenizer, name).template.stop_text


@dataclass(frozen=True)
class EncodedSample:
    """Tokens of a sample.

    Attributes:
        tokens: uint32[n].
        mask: bool[n], True where the token is supervised.
        weights: float32[n], factor of each token in the loss, 0 where it is not supervised; None: 1 or 0.
        has_special_text: a prompt holds the text of a special token, which became that token.
        was_rewritten: the template changed the text of a turn that is context only.
    """

    tokens: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.bool_]
    weights: npt.NDArray[np.float32] | None = None
    has_special_text: bool = False
    was_rewritten: bool = False


@dataclass
class ChatEncoder:
    """Renders and tokenises conversations; picklable, light, the same in every process."""

    tokenizer_json: str
    template: ChatRenderer
    vocab_size: int
    """Entries of the tokenizer."""
    num_ids: int
    """Ids that a sample may hold: rows of the model's embedding, or up to the tokenizer's last one."""
    split_special_tokens: bool = False
    stop_id: int = field(init=False)
    """The token that ends an assistant turn."""

    def __post_init__(self) -> None:
        text = self.template.stop_text
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ConfigError(f"the stop token {text} becomes {len(ids)} tokens; it must be one")
        self.stop_id = ids[0]
        self._eos_id = self._special_id("eos_token")
        # what rows are padded with: the pad token, or one that ends a text
        self._padding_ids = {self._special_id("pad_token"), self._eos_id, self.stop_id} - {None}

    @classmethod
    def build(cls, tokenizer: Any, name: str, rows: int | None = None) -> ChatEncoder:
        """The encoder of a loaded tokenizer with `data.chat_template: name`.

        Args:
            rows: of the model's embedding, where they are known.

        Raises:
            ConfigError: no usable template: unknown, broken, without a stop token, or one that rewrites what
                it rendered before when turns are added; or an id of the tokenizer has no row.
        """
        if rows is not None:
            require_rows(tokenizer, rows)
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoder = cls(
            tokenizer_json=backend.to_str(),
            template=ChatRenderer.of(tokenizer, name),
            vocab_size=len(tokenizer),
            num_ids=rows or max(tokenizer.get_vocab().values()) + 1,  # ids may have holes
            split_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False)),
        )
        encoder._check_against(tokenizer)
        if "strftime_now" in encoder.template.text:
            warn_once("the chat template writes today's date into every sample that it renders")
        return encoder

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "backend"}

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and the template: equal ones give equal ids and masks."""
        variables = sorted(map(str, self.template.variables.items()))
        return canonical_hash([self.tokenizer_json, self.template.text, variables, self.vocab_size])

    @functools.cached_property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self.tokenizer_json)
        backend.encode_special_tokens = self.split_special_tokens
        # Offsets with the spaces that belong to a token, so that one across the start of a turn is seen.
        backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        return backend

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedSample | BadRow]:
        """Ids and masks of conversations, in order; a `BadRow` where one cannot be rendered or supervised."""
        rendered: list[RenderedChat | BadRow] = []
        for conversation in conversations:
            try:
                rendered.append(self.template.render_spans(conversation))
            except BadRow as error:
                rendered.append(error)
        chats = {i: item for i, item in enumerate(rendered) if not isinstance(item, BadRow)}
        quick = self._encode_by_heads(chats) if self._tokens_are_fixed_texts else {}
        rest = [i for i in chats if i not in quick]
        encodings = self.backend.encode_batch([chats[i].text for i in rest], add_special_tokens=False)
        slow = {i: self._with_mask(chats[i], e) for i, e in zip(rest, encodings, strict=True)}
        return [
            item if isinstance(item, BadRow) else quick[i] if i in quick else slow[i]
            for i, item in enumerate(rendered)
        ]

    def plain(self, row: TokenRow | TextRow) -> EncodedSample:
        """A row without turns as a sample; BadRow as in `check_tokens`."""
        return self.check_tokens(row) if isinstance(row, TokenRow) else self.encode_text(row)

    def encode_text(self, row: TextRow) -> EncodedSample:
        """A text behind the token that `detect` starts texts from (BOS, or EOS where there is none), then EOS
        unless it was cut. All but the first token is trained on.

        Raises:
            BadRow: nothing is.
        """
        ids = self.backend.encode(row.text, add_special_tokens=False).ids
        bos, eos = (self._special_id(name) for name in ("bos_token", "eos_token"))
        start = [token for token in (eos if bos is None else bos,) if token is not None]
        end = [eos] if row.is_finished and eos is not None else []
        tokens = np.array([*start, *ids, *end], dtype=np.uint32)
        mask = np.arange(len(tokens)) >= len(start)
        if not mask[1:].any():
            raise BadRow(Reason.NOTHING_SUPERVISED, "the text is a single token, and nothing comes before it")
        weights = None if row.weight == 1 else np.where(mask, np.float32(row.weight), np.float32(0))
        has_special = any(text in row.text for text in self.template.special_texts)
        return EncodedSample(tokens, mask, weights, has_special_text=has_special)

    def check_tokens(self, row: TokenRow) -> EncodedSample:
        """A pre-tokenised row as a sample; BadRow: an id beyond the vocabulary, or nothing is supervised."""
        bad = np.flatnonzero((row.tokens < 0) | (row.tokens >= self.num_ids))
        if bad.size:
            raise BadRow(
                Reason.INVALID_TOKEN,
                f"input_ids[{bad[0]}] is {row.tokens[bad[0]]}; allowed: 0 .. {self.num_ids - 1}",
            )
        for place, tokens, mask in (
            ("ends", row.tokens[::-1], row.mask[::-1]),
            ("begins", row.tokens, row.mask),
        ):
            run = int(np.argmin(np.append(tokens == tokens[0], False)))
            is_end = place == "begins" or tokens[0] in (self.stop_id, self._eos_id) or mask[0]
            if tokens[0] in self._padding_ids and (run > 1 or not is_end):
                raise BadRow(
                    Reason.INVALID_ATTENTION_MASK,
                    f"input_ids {place} with {run} times the token {tokens[0]}, which is padding. Take it "
                    "off: every token of a row is seen by those after it",
                )
        if not row.mask[1:].any():
            raise BadRow(
                Reason.NOTHING_SUPERVISED,
                "no token is supervised (the first one never is: nothing comes before it)",
            )
        return EncodedSample(row.tokens.astype(np.uint32), row.mask, row.weights)

    def _special_id(self, name: str) -> int | None:
        """Of `bos_token` and the like; None where the tokenizer has none."""
        text = self.template.variables.get(name)
        return None if text is None else self.backend.token_to_id(str(text))

    # Tokens and mask.

    def _with_mask(self, rendered: RenderedChat, encoding: Any) -> EncodedSample | BadRow:
        tokens = np.array(encoding.ids, dtype=np.uint32)
        weights = np.zeros(len(tokens), dtype=np.float32)
        for start, end, weight in rendered.spans:
            first = _first_token(encoding, start)
            # Its token may reach over white space around it.
            stop = _first_token(encoding, end - len(self.template.stop_text), or_across=True)
            if stop == len(tokens) or tokens[stop] != self.stop_id:
                return BadRow(
                    Reason.NO_STOP_TOKEN,
                    f"the stop token {self.template.stop_text} at the end of an assistant turn did not "
                    "become a token",
                )
            weights[first : stop + 1] = weight
        for start, end in rendered.context:
            weights[_first_token(encoding, start, or_across=True) : _first_token(encoding, end)] = 0
        if not weights[1:].any():
            return BadRow(Reason.NOTHING_SUPERVISED, "no token is supervised")
        return _sample(tokens, weights, rendered)

    # The same without offsets of whole texts, which make tokenising a third slower.

    @functools.cached_property
    def _tokens_are_fixed_texts(self) -> bool:
        """Does a token id stand for the same characters wherever it occurs?"""
        from tokenizers import normalizers

        normalizer = self.backend.normalizer
        return normalizer is None or isinstance(normalizer, normalizers.NFC)

    @functools.cached_property
    def _template_specials(self) -> re.Pattern[str]:
        """Special tokens that the template writes."""
        values = [str(value) for value in self.template.variables.values()]
        written = [
            text for text in self.template.special_texts if text in self.template.text or text in values
        ]
        return re.compile("|".join(map(re.escape, written)))

    @functools.cached_property
    def _is_special(self) -> npt.NDArray[np.bool_]:
        table = np.zeros(self.num_ids, dtype=np.bool_)
        table[[self.backend.token_to_id(text) for text in self.template.special_texts]] = True
        return table

    def _encode_by_heads(self, chats: Mapping[int, RenderedChat]) -> dict[int, EncodedSample]:
        """Samples whose turns begin shortly after a special token, by their keys; the others are left out.

        Special tokens cut the text before anything else, so the n-th in the text is the n-th among the ids.
        From there on only the head of a turn, up to a little past its start, is tokenised with offsets. If
        the ids before the start equal those of the whole text, they cover the same characters.
        """
        plans = {i: plan for i, chat in chats.items() if (plan := self._plan_heads(chat)) is not None}
        texts = [plan.item.text for plan in plans.values()]
        whole = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        heads = [head for plan in plans.values() for head in plan.heads]
        encoded_heads = iter(self.backend.encode_batch(heads, add_special_tokens=False))
        samples = {}
        for (i, plan), encoding in zip(plans.items(), whole, strict=True):
            tokens = np.array(encoding.ids, dtype=np.uint32)
            weights = self._weights_by_heads(plan, tokens, [next(encoded_heads) for _ in plan.heads])
            if weights is not None:
                samples[i] = _sample(tokens, weights, plan.item)
        return samples

    def _plan_heads(self, item: RenderedChat) -> _HeadPlan | None:
        if item.has_special_text or item.context:
            return None
        found = [match.span() for match in self._template_specials.finditer(item.text)]
        number_of_end = {end: number for number, (_, end) in enumerate(found)}
        turns, heads = [], []
        for start, end, weight in item.spans:
            before = bisect.bisect_right(found, start, key=lambda span: span[1]) - 1
            anchor = found[before][1] if before >= 0 else 0
            following = found[before + 1][0]  # at the latest the turn's own stop token
            if start - anchor > MAX_HEAD_CHARS or end not in number_of_end or following < start:
                return None
            turns.append((before, start - anchor, number_of_end[end], weight))
            heads.append(item.text[anchor : min(start + HEAD_LOOKAHEAD_CHARS, following)])
        return _HeadPlan(item, len(found), turns, heads)

    def _weights_by_heads(
        self, plan: _HeadPlan, tokens: npt.NDArray[np.uint32], heads: Sequence[Any]
    ) -> npt.NDArray[np.float32] | None:
        """The weights, or None where the head does not settle them."""
        specials = np.flatnonzero(self._is_special[tokens])
        if len(specials) != plan.num_specials:
            return None
        weights = np.zeros(len(tokens), dtype=np.float32)
        for (before, skip, last, weight), head in zip(plan.turns, heads, strict=True):
            anchor = int(specials[before]) + 1 if before >= 0 else 0
            count = _first_token(head, skip)
            stop = int(specials[last])
            is_same = head.ids[:count] == tokens[anchor : anchor + count].tolist()
            if count == len(head) or not is_same or tokens[stop] != self.stop_id or anchor + count > stop:
                return None
            weights[anchor + count : stop + 1] = weight
        return weights

    def _check_against(self, tokenizer: Any) -> None:
        """Ids equal those of the tokenizer's own method, on a conversation of two rounds."""
        turns: tuple[Turn, ...] = (
            Turn("user", "A b\nc?"),
            Turn("assistant", " Yes, 1 2."),
            Turn("user", "\u00e9\u4e2d"),
            Turn("assistant", "No."),
        )
        sample = self.encode([Conversation(turns)])[0]
        if isinstance(sample, BadRow):  # a template may take single rounds only; rows then decide
            turns = turns[:2]
            sample = self.encode([Conversation(turns)])[0]
        if isinstance(sample, BadRow):
            raise ConfigError(f"the chat template cannot be trained with: {sample}")
        expected = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            chat_template=self.template.text,
            tokenize=True,
            return_dict=False,
        )
        if sample.tokens.tolist() != list(expected):
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} tokenises in its own way, which workers cannot "
                "repeat; prepare pre-tokenised rows (input_ids, labels) with it instead"
            )


@dataclass(frozen=True)
class _HeadPlan:
    item: RenderedChat
    num_specials: int
    turns: list[tuple[int, int, int, float]]
    """Per turn: number of the special token before it, characters in between, number of its stop token, and
    its weight."""
    heads: list[str]


def _sample(
    tokens: npt.NDArray[np.uint32], weights: npt.NDArray[np.float32], item: RenderedChat
) -> EncodedSample:
    mask = weights > 0
    fractions = weights if (weights[mask] != 1).any() else None
    return EncodedSample(tokens, mask, fractions, item.has_special_text, item.was_rewritten)


def _first_token(encoding: Any, at: int, *, or_across: bool = False) -> int:
    """Index of the first token that begins at character `at` or later, or (`or_across`) ends behind it.

    Bisection asks for about log2(n) offsets; the list of all of them would take longer than the rendering.
    """

    def is_past(i: int) -> bool:
        start, end = encoding.token_to_chars(i)
        return bool(start >= at or (or_across and end > at))

    return bisect.bisect_left(range(len(encoding)), True, key=is_past)
