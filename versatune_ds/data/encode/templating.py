"""Conversations become token ids and a mask of supervised tokens, rendered together.

The whole conversation is rendered once to text, with the character spans that the assistant wrote; the text
is tokenised once, with offsets; a token is supervised if it lies inside a span. So the ids are exactly those
of `tokenizer.apply_chat_template(messages, tokenize=True)`, and the mask cannot slip against them.

Where the spans come from:

- The template marks them with {% generation %} (our built-in ones do): the marked text.
- It does not (the official ones of Qwen and Llama-3): a turn begins where the same template, given the
  messages before it and asked for a generation prompt, ends; that rendering must be a prefix of the whole.

In both cases a turn ends with its stop token, which is always supervised; what the template puts after it
(the newline after <|im_end|>) is not. The stop token is found by rendering: the first special token after the
text of a last assistant turn. A token that lies partly outside a span is not supervised: at inference the
prompt's tokens end at the span's first character, so the model could not produce such a token.

Templates that drop or rewrite earlier turns (Qwen3 removes their <think> blocks) work as long as what comes
before a turn stays a prefix; turns whose text was changed are counted.

What is not covered: tools, several templates in one tokenizer (the default one is used), and slow tokenizers.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import numpy.typing as npt

from versatune_ds.config.schema import Config
from versatune_ds.data.rows.reasons import BadRow, Reason, short
from versatune_ds.data.rows.schemas import Conversation, TokenRow
from versatune_ds.foundations.errors import ConfigError, unknown_name
from versatune_ds.foundations.files import canonical_hash
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

BUILT_IN_TEMPLATES = ("chatml", "alpaca", "llama2", "llama3")
_END_OF_TURN = re.compile(r"\{%- set end_of_turn = (.+?) -%\}")
_GENERATION_TAG = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")
_PROBE = "versatune probe answer"
MAX_HEAD_CHARS = 256
HEAD_LOOKAHEAD_CHARS = 48
"""Enough for a few words of a turn; where it is not, the whole text is tokenised again with offsets."""


# The tokenizer and its template


def load_tokenizer(config: Config) -> Any:
    """The fast tokenizer that `model.tokenizer` (or `model.source`) names.

    Raises:
        ConfigError: it cannot be found or loaded, or it is not a fast one (no character offsets).
    """
    from transformers import AutoTokenizer

    name = config.model.tokenizer or config.model.source
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    if looks_local and not os.path.isdir(name):
        raise ConfigError(f"model.tokenizer: {name} is not a folder; give a folder or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=config.model.trust_remote_code, use_fast=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"the tokenizer {name} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
        raise ConfigError(
            f"the tokenizer {name} ({type(tokenizer).__name__}) is not a fast one; a tokenizer.json "
            "is needed, because masks come from character offsets"
        )
    return tokenizer


def template_text(tokenizer: Any, name: str) -> str:
    """The Jinja text of a built-in template, or of the tokenizer's own one for the name `tokenizer`.

    A built-in template whose stop token is not in the vocabulary uses the tokenizer's eos token instead, and
    says so.

    Raises:
        ConfigError: the name is unknown, the tokenizer has no template, or it has no eos token.
    """
    if name == "tokenizer":
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template; name one in data.chat_template: "
                + ", ".join(BUILT_IN_TEMPLATES)
            )
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several named templates, none of them the default
            raise ConfigError(f"the tokenizer's chat template cannot be used: {error}") from None
    if name not in BUILT_IN_TEMPLATES:
        raise ConfigError(unknown_name("chat template", name, ("tokenizer", *BUILT_IN_TEMPLATES)))
    text = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text("utf-8").rstrip("\n")
    match = _END_OF_TURN.search(text)
    assert match is not None, name
    stop = match.group(1)
    if stop == "eos_token" or stop.strip("'") in _special_texts(tokenizer):
        if stop == "eos_token":
            _require_eos(tokenizer, name)
        return text
    eos = _require_eos(tokenizer, name)
    _say_once(
        f"the {name} template ends turns with {stop.strip(chr(39))}, which is not a special token of this "
        f"tokenizer; its eos token {eos} is used instead"
    )
    return text.replace(match.group(0), "{%- set end_of_turn = eos_token -%}")


@functools.cache
def _say_once(text: str) -> None:
    logger.warning(text)


def _require_eos(tokenizer: Any, name: str) -> str:
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"the {name} template ends turns with the eos token, and the tokenizer has none; "
            "set eos_token in tokenizer_config.json"
        )
    return str(tokenizer.eos_token)


def set_chat_template(tokenizer: Any, name: str) -> None:
    """Give `tokenizer` the template that `data.chat_template: name` trains with, so that it is exported.

    Raises:
        ConfigError: as `template_text`.
    """
    tokenizer.chat_template = template_text(tokenizer, name)


def stop_token(tokenizer: Any, name: str) -> str:
    """Text of the token that ends an assistant turn under `data.chat_template: name`.

    An exported model should stop at it; for base models it often differs from the eos token.

    Raises:
        ConfigError: as `ChatEncoder.build`.
    """
    return ChatEncoder.build(tokenizer, name).stop_text


def _special_texts(tokenizer: Any) -> list[str]:
    """Texts of all tokens that are cut out of text before it is tokenised as words, eos included."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if tokenizer.eos_token is not None:
        added.add(str(tokenizer.eos_token))
    return sorted(added, key=lambda text: (-len(text), text))


# Rendering


class _Marks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: puts marks around what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012
    # U+FDD0 and U+FDD1 are noncharacters, never used in text.
    START, END = "\ufdd0versatune(\ufdd1", "\ufdd0versatune)\ufdd1"

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{self.START}{caller()}{self.END}"


_MARK = re.compile(f"{re.escape(_Marks.START)}|{re.escape(_Marks.END)}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _compile(text: str) -> jinja2.Template:
    """A sandboxed template with what transformers offers to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(text)


@dataclass(frozen=True)
class EncodedSample:
    """Tokens of a sample.

    Attributes:
        tokens: uint32[n].
        mask: bool[n], True where the token is supervised.
        has_special_text: a prompt holds the text of a special token, which became that token.
        was_rewritten: the template changed the text of a turn.
    """

    tokens: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.bool_]
    has_special_text: bool = False
    was_rewritten: bool = False


@dataclass
class ChatEncoder:
    """Renders and tokenises conversations; picklable, light, the same in every process."""

    tokenizer_json: str
    template: str
    variables: dict[str, Any]
    """What the template sees beside the messages: the tokenizer's special tokens."""
    special_texts: list[str]
    vocab_size: int
    split_special_tokens: bool = False
    stop_text: str = ""
    stop_id: int = -1
    _backend: Any = field(default=None, repr=False)
    _compiled: Any = field(default=None, repr=False)

    @classmethod
    def build(cls, tokenizer: Any, name: str) -> ChatEncoder:
        """The encoder of a loaded tokenizer with `data.chat_template: name`.

        Raises:
            ConfigError: no usable template: unknown, broken, without a stop token, or one that rewrites what
                it rendered before when turns are added.
        """
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encoder = cls(
            tokenizer_json=backend.to_str(),
            template=template_text(tokenizer, name),
            variables=dict(tokenizer.special_tokens_map),
            special_texts=_special_texts(tokenizer),
            vocab_size=len(tokenizer),
            split_special_tokens=bool(getattr(tokenizer, "split_special_tokens", False)),
        )
        encoder._find_stop_token()
        encoder._check_against(tokenizer)
        if "strftime_now" in encoder.template:
            _say_once("the chat template writes today's date into every sample that it renders")
        return encoder

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_backend": None, "_compiled": None}

    @property
    def fingerprint(self) -> str:
        """Hash of the tokenizer and the template: equal ones give equal ids and masks."""
        return canonical_hash(
            [self.tokenizer_json, self.template, sorted(map(str, self.variables.items())), self.vocab_size]
        )

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        if self._backend is None:
            import tokenizers

            self._backend = tokenizers.Tokenizer.from_str(self.tokenizer_json)
            self._backend.encode_special_tokens = self.split_special_tokens
        return self._backend

    def encode(self, conversations: Sequence[Conversation]) -> list[EncodedSample | BadRow]:
        """Ids and masks of conversations, in order; a `BadRow` where one cannot be rendered or supervised."""
        rendered: list[_Rendered | BadRow] = []
        for conversation in conversations:
            try:
                rendered.append(self._render_spans(conversation))
            except BadRow as error:
                rendered.append(error)
        done: dict[int, EncodedSample | BadRow] = {
            i: item for i, item in enumerate(rendered) if isinstance(item, BadRow)
        }
        if self._tokens_are_fixed_texts:
            done |= self._encode_by_heads(rendered)
        rest = [(i, item) for i, item in enumerate(rendered) if i not in done and isinstance(item, _Rendered)]
        encodings = self.backend.encode_batch([item.text for _, item in rest], add_special_tokens=False)
        for (i, item), encoding in zip(rest, encodings, strict=True):
            done[i] = self._with_mask(item, encoding)
        return [done[i] for i in range(len(rendered))]

    def check_tokens(self, row: TokenRow) -> EncodedSample:
        """A pre-tokenised row as a sample.

        Raises:
            BadRow: a token id is not in the vocabulary, or nothing is supervised.
        """
        bad = np.flatnonzero((row.tokens < 0) | (row.tokens >= self.vocab_size))
        if bad.size:
            raise BadRow(
                Reason.INVALID_TOKEN,
                f"input_ids[{bad[0]}] is {row.tokens[bad[0]]}; allowed: 0 .. {self.vocab_size - 1}",
            )
        if not row.mask[1:].any():
            raise BadRow(
                Reason.NOTHING_SUPERVISED,
                "no token is supervised (the first one never is: nothing comes before it)",
            )
        return EncodedSample(row.tokens.astype(np.uint32), row.mask)

    # Text and spans.

    def render(self, turns: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
        """The conversation as text, with marks where the template has {% generation %}.

        Raises:
            BadRow: the template refuses these messages.
        """
        if self._compiled is None:
            self._compiled = _compile(self.template)
        try:
            text: str = self._compiled.render(
                messages=[{"role": role, "content": content} for role, content in turns],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise BadRow(
                Reason.REFUSED_BY_TEMPLATE, f"the chat template refuses the messages: {error}"
            ) from None
        return text

    @functools.cached_property
    def _marks_turns(self) -> bool:
        return _GENERATION_TAG.search(self.template) is not None

    @functools.cached_property
    def _special_prefixes(self) -> tuple[str, ...]:
        return tuple(sorted({text[:2] for text in self.special_texts}))

    def _render_spans(self, conversation: Conversation) -> _Rendered:
        turns = conversation.turns
        special_text = False
        for i, (role, content) in enumerate(turns):
            if not any(prefix in content for prefix in self._special_prefixes):
                continue
            if role == "assistant" and self.stop_text in content:
                raise BadRow(
                    Reason.STOP_TOKEN_IN_TEXT,
                    f"the response (turn {i + 1}) holds the text of the stop token {self.stop_text}; "
                    "the model would stop there. Remove it",
                )
            special_text = special_text or any(text in content for text in self.special_texts)
        text = self.render(turns)
        if self._marks_turns:
            text, starts = self._take_marks(text)
        else:
            starts = self._starts_by_prefix(turns, text)
        responses = [content for role, content in turns if role == "assistant"]
        if len(starts) != len(responses):
            raise BadRow(
                Reason.REFUSED_BY_TEMPLATE,
                f"the template marks {len(starts)} assistant turns, the conversation has {len(responses)}; "
                "every one is trained on. Use another data.chat_template",
            )
        spans = self._close(starts, responses, text)
        changed = any(content.strip() not in text for _, content in turns)
        return _Rendered(text, spans, special_text, changed)

    def _take_marks(self, marked: str) -> tuple[str, list[int]]:
        """Text without marks, and where each marked turn begins; parts of one turn count as one."""
        text = ""
        starts: list[int] = []
        position = 0
        for match in _MARK.finditer(marked):
            text += marked[position : match.start()]
            position = match.end()
            if match.group() == _Marks.START and (not starts or self.stop_text in text[starts[-1] :]):
                starts.append(len(text))
        return text + marked[position:], starts

    def _starts_by_prefix(self, turns: Sequence[tuple[str, str]], text: str) -> list[int]:
        starts = []
        for i, (role, _) in enumerate(turns):
            if role != "assistant":
                continue
            prompt = self.render(turns[:i], add_generation_prompt=True)
            if not text.startswith(prompt):
                raise BadRow(
                    Reason.REFUSED_BY_TEMPLATE,
                    f"the chat template renders what comes before turn {i + 1} in another way once the turn "
                    "is there, so the supervised part cannot be told. Set data.chat_template to a built-in "
                    "template, or use a template with {% generation %} blocks",
                )
            starts.append(len(prompt))
        return starts

    def _close(self, starts: Sequence[int], responses: Sequence[str], text: str) -> list[tuple[int, int]]:
        """A turn goes from its start to the end of the first stop token; responses hold none of their own.

        Between the two stands the response, perhaps with something in front or shortened from the front. If
        it does not, the stop token belongs to a later turn.
        """
        spans = []
        for start, response in zip(starts, responses, strict=True):
            found = text.find(self.stop_text, start)
            written, given = text[start : max(found, start)].strip(), response.strip()
            if found < 0 or not (written.endswith(given[-16:]) or given.endswith(written[-16:])):
                raise BadRow(
                    Reason.NO_STOP_TOKEN,
                    f"the chat template puts no stop token {self.stop_text} right after a response (found "
                    f"{short(text[start : start + 50])}). Use a built-in data.chat_template",
                )
            spans.append((start, found + len(self.stop_text)))
        return spans

    # Tokens and mask.

    def _with_mask(self, rendered: _Rendered, encoding: Any) -> EncodedSample | BadRow:
        tokens = np.array(encoding.ids, dtype=np.uint32)
        mask = np.zeros(len(tokens), dtype=np.bool_)
        for start, end in rendered.spans:
            first = _first_token(encoding, len(tokens), lambda span, at=start: span[0] >= at)
            stop = _first_token(encoding, len(tokens), lambda span, at=end: span[1] > at or span[0] >= at)
            if stop == 0 or tokens[stop - 1] != self.stop_id:
                return BadRow(
                    Reason.NO_STOP_TOKEN,
                    f"the stop token {self.stop_text} at the end of an assistant turn did not become a token",
                )
            mask[first:stop] = True
        if not mask[1:].any():
            return BadRow(Reason.NOTHING_SUPERVISED, "no token is supervised")
        return EncodedSample(tokens, mask, rendered.has_special_text, rendered.was_rewritten)

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
        values = [str(value) for value in self.variables.values()]
        written = [text for text in self.special_texts if text in self.template or text in values]
        return re.compile("|".join(map(re.escape, written)))

    @functools.cached_property
    def _is_special(self) -> npt.NDArray[np.bool_]:
        table = np.zeros(max(self.vocab_size, self.backend.get_vocab_size()), dtype=np.bool_)
        table[[self.backend.token_to_id(text) for text in self.special_texts]] = True
        return table

    def _encode_by_heads(self, rendered: Sequence[_Rendered | BadRow]) -> dict[int, EncodedSample]:
        """Samples whose turns begin shortly after a special token, by index; the others are left out.

        Special tokens cut the text before anything else, so the n-th in the text is the n-th among the ids.
        From there on only the head of a turn, up to a little past its start, is tokenised with offsets. If
        the ids before the start equal those of the whole text, they cover the same characters.
        """
        plans = {
            i: plan
            for i, item in enumerate(rendered)
            if isinstance(item, _Rendered) and (plan := self._plan_heads(item)) is not None
        }
        texts = [plan.item.text for plan in plans.values()]
        whole = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        heads = [head for plan in plans.values() for head in plan.heads]
        encoded_heads = iter(self.backend.encode_batch(heads, add_special_tokens=False))
        samples = {}
        for (i, plan), encoding in zip(plans.items(), whole, strict=True):
            tokens = np.array(encoding.ids, dtype=np.uint32)
            mask = self._mask_by_heads(plan, tokens, [next(encoded_heads) for _ in plan.heads])
            if mask is not None:
                samples[i] = EncodedSample(tokens, mask, False, plan.item.was_rewritten)
        return samples

    def _plan_heads(self, item: _Rendered) -> _HeadPlan | None:
        if item.has_special_text:
            return None
        found = [match.span() for match in self._template_specials.finditer(item.text)]
        number_of_end = {end: number for number, (_, end) in enumerate(found)}
        turns, heads = [], []
        for start, end in item.spans:
            before = bisect.bisect_right(found, start, key=lambda span: span[1]) - 1
            anchor = found[before][1] if before >= 0 else 0
            following = found[before + 1][0]  # at the latest the turn's own stop token
            if start - anchor > MAX_HEAD_CHARS or end not in number_of_end or following < start:
                return None
            turns.append((before, start - anchor, number_of_end[end]))
            heads.append(item.text[anchor : min(start + HEAD_LOOKAHEAD_CHARS, following)])
        return _HeadPlan(item, len(found), turns, heads)

    def _mask_by_heads(
        self, plan: _HeadPlan, tokens: npt.NDArray[np.uint32], heads: Sequence[Any]
    ) -> npt.NDArray[np.bool_] | None:
        """The mask, or None where the head does not settle it."""
        specials = np.flatnonzero(self._is_special[tokens])
        if len(specials) != plan.num_specials:
            return None
        mask = np.zeros(len(tokens), dtype=np.bool_)
        for (before, skip, last), head in zip(plan.turns, heads, strict=True):
            anchor = int(specials[before]) + 1 if before >= 0 else 0
            count = _first_token(head, len(head), lambda span, at=skip: span[0] >= at)
            stop = int(specials[last])
            is_same = head.ids[:count] == tokens[anchor : anchor + count].tolist()
            if count == len(head) or not is_same or tokens[stop] != self.stop_id or anchor + count > stop:
                return None
            mask[anchor + count : stop + 1] = True
        return mask

    # Checks at the start.

    def _find_stop_token(self) -> None:
        turns = [("user", "versatune probe question"), ("assistant", _PROBE)]
        try:
            text = _MARK.sub("", self.render(turns))
        except BadRow as error:
            raise ConfigError(f"the chat template does not render a simple conversation: {error}") from None
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}") from None
        _, found, tail = text.rpartition(_PROBE)
        if not found:
            raise ConfigError("the chat template leaves out responses; use another data.chat_template")
        specials = "|".join(map(re.escape, self.special_texts))
        match = re.match(rf"\s*({specials})", tail) if specials else None
        if match is None:
            raise ConfigError(
                f"the chat template puts no stop token after the assistant's text (found {short(tail)}), so "
                "a model trained with it would never stop. Use a built-in data.chat_template "
                f"({', '.join(BUILT_IN_TEMPLATES)}), or let the template write eos_token there"
            )
        self.stop_text = match.group(1)
        ids = self.backend.encode(self.stop_text, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ConfigError(f"the stop token {self.stop_text} becomes {len(ids)} tokens; it must be one")
        self.stop_id = ids[0]

    def _check_against(self, tokenizer: Any) -> None:
        """Ids equal those of the tokenizer's own method, on a conversation of two rounds."""
        turns: tuple[tuple[str, str], ...] = (
            ("user", "A b\nc?"),
            ("assistant", " Yes, 1 2."),
            ("user", "\u00e9\u4e2d"),
            ("assistant", "No."),
        )
        sample = self.encode([Conversation(turns)])[0]
        if isinstance(sample, BadRow):
            # A template may take single rounds only; rows then decide.
            sample = self.encode([Conversation(turns[:2])])[0]
            turns = turns[:2]
        if isinstance(sample, BadRow):
            raise ConfigError(f"the chat template cannot be trained with: {sample}")
        expected = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=self.template,
            tokenize=True,
            return_dict=False,
        )
        if sample.tokens.tolist() != list(expected):
            raise ConfigError(
                f"the tokenizer {type(tokenizer).__name__} tokenises in its own way, which workers cannot "
                "repeat; prepare pre-tokenised rows (input_ids, labels) with it instead"
            )


@dataclass(frozen=True)
class _Rendered:
    text: str
    spans: list[tuple[int, int]]
    has_special_text: bool
    was_rewritten: bool


@dataclass(frozen=True)
class _HeadPlan:
    item: _Rendered
    num_specials: int
    turns: list[tuple[int, int, int]]
    """Per turn: number of the special token before it, characters in between, number of its stop token."""
    heads: list[str]


def _first_token(encoding: Any, count: int, is_past: Any) -> int:
    """Index of the first token whose (start, end) characters are past a point; offsets never fall.

    Bisection asks for about 2 log2(n) offsets; the list of all of them would take longer than the rendering.
    """
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if is_past(encoding.token_to_chars(middle)):
            high = middle
        else:
            low = middle + 1
    return low
