"""One raw row followed to its token ids: what stands in the file, what was read, the text, the tokens.

Also tells what the tokens of a sample are: said, thought, or the result of a tool.

What is not covered: `data.overlong`; the whole row is shown, whatever its length.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from versatune_ds.config.schema import Config, Source
from versatune_ds.data.chat.conversation import Conversation, Turn, to_train
from versatune_ds.data.encode.chat_encoder import ChatEncoder
from versatune_ds.data.encode.tokenizer import embedding_rows, load_tokenizer
from versatune_ds.data.rows.files import TABLES, InputFile, find_files
from versatune_ds.data.rows.readers import decode_block, read_blocks
from versatune_ds.data.rows.reasons import BadRow
from versatune_ds.data.rows.schemas import RowSchema
from versatune_ds.foundations.errors import ConfigError, DataError
from versatune_ds.report.page import Fold, MarkedText, Page, PageSection, Stretch, Table

TEXT, THOUGHT, TOOL = "", "thought", "tool result"
"""What a token is."""
THOUGHTS = re.compile(
    r"<(think|thinking)>.*?</\1>|\[THINK\].*?\[/THINK\]|<\|channel\|>analysis.*?(?=<\|end)", re.DOTALL
)


def token_kinds(encoder: ChatEncoder, conversation: Conversation) -> list[str]:
    """What each token of the rendered conversation is: `TEXT`, `THOUGHT` or `TOOL`.

    Raises:
        BadRow: it cannot be rendered.
    """
    text = encoder.template.render_spans(conversation).text
    kinds = np.full(len(text) + 1, TEXT, dtype="U16")
    for match in THOUGHTS.finditer(text):
        kinds[slice(*match.span())] = THOUGHT
    at = 0
    for turn in conversation.turns:
        said = TOOL if turn.role == "tool" else TEXT
        for part, kind in ((turn.reasoning.strip(), THOUGHT), (turn.content.strip(), said)):
            found = text.find(part, at)
            if part and found >= 0:
                at = found + len(part)
                kinds[found:at] = kind or kinds[found:at]
    offsets = encoder.backend.encode(text, add_special_tokens=False).offsets
    return [str(kinds[start]) for start, _ in offsets]


def trace(config: Config, row: str, *, domain: str | None = None) -> Page:
    """A page about one row of the raw data.

    Args:
        config: the run's settings; nothing needs to be prepared.
        row: `N` or `FILE:N`: the N-th line (JSON Lines) or row, from 1, of the first file or of this one.
        domain: look only at its sources.

    Raises:
        ConfigError: `row` is no such text, or the tokenizer cannot be used.
        DataError: no such file or row.
    """
    name, _, number = row.rpartition(":")
    if not number.isdigit() or int(number) == 0:
        raise ConfigError(f"--row {row}: give N or FILE:N, where N is a line or row from 1")
    file, source = _find(config, name, domain)
    tokenizer = load_tokenizer(config)
    encoder = ChatEncoder.build(tokenizer, config.data.chat_template, embedding_rows(config))
    names = tuple(config.domains.names)
    schema = RowSchema(source.format, source.columns, source.domain, source.domain_column, names)
    format, raw, found = _read(file, int(number), schema)
    place = f"{file.path}:{number}"
    sections = [PageSection("raw", "in the file", texts=[MarkedText("", [Stretch(raw)])])]
    try:
        if isinstance(found, BadRow):
            raise found
        about = f"domain {schema.domain_of(found)}, format {format or 'unknown'}"
        content = schema.parse(found, format, drop_nulls=file.kind in TABLES)
        if isinstance(content, Conversation):
            content = to_train(content, config.data.reasoning, config.data.train_on)
            offered = [str(tool.get("function", tool).get("name")) for tool in content.tools]
            about += f", tools {', '.join(offered)}" if offered else ""
            about += (
                f", template variables {json.dumps(dict(content.variables))}" if content.variables else ""
            )
            turns = [text for turn in content.turns for text in _turn_texts(turn)]
            sections.append(PageSection("read", "as read", escape(about), texts=turns))
            (sample,) = encoder.encode([content])
            if isinstance(sample, BadRow):
                raise sample
            kinds = token_kinds(encoder, content)
        else:
            sample = encoder.plain(content)
            kinds = [TEXT] * len(sample.tokens)
    except BadRow as error:
        said = f"{error.message} ({error.reason.value})"
        return Page(place, [*sections, PageSection("rejected", "not trained on", said)])
    weights = (sample.mask if sample.weights is None else sample.weights).astype(float)
    runs = marked_runs(sample.tokens, weights, kinds, tokenizer)
    sections.append(PageSection("rendered", "as rendered", texts=[MarkedText("", runs)]))
    texts = tokenizer.convert_ids_to_tokens(sample.tokens.tolist())
    rows = [
        (str(i), [str(token), escape(text), kind, f"{weight:g}"])
        for i, (token, text, weight, kind) in enumerate(
            zip(sample.tokens, texts, weights, kinds, strict=True)
        )
    ]
    table = Table(["position", "id", "token", "kind", "weight"], rows, kind="texts")
    return Page(
        place, [*sections, PageSection("tokens", f"as {len(rows):,} tokens", folds=[Fold("all", table)])]
    )


def _turn_texts(turn: Turn) -> Iterator[MarkedText]:
    about = [turn.role, *([f"weight {turn.weight:g}"] if turn.weight is not None else [])]
    title = ", ".join([*about, *turn.about.values(), *(["continued"] if turn.is_open else [])])
    if turn.reasoning:
        yield MarkedText(f"{title}, thoughts", [Stretch(escape(turn.reasoning))])
    if turn.content or not turn.calls:
        yield MarkedText(escape(title), [Stretch(escape(turn.content))])
    for call in turn.calls:
        text = json.dumps(call["function"], ensure_ascii=False)
        yield MarkedText(f"{title}, call", [Stretch(escape(text))])


def _find(config: Config, name: str, domain: str | None) -> tuple[InputFile, Source]:
    """The file that ends in `name`, or the first one, and its source."""
    known = []
    for source in (*config.data.train, *config.data.eval):
        if domain is None or source.domain in (None, domain):
            for file in find_files(source.path, source.split).files:
                if f"/{file.path}".endswith(f"/{name}" if name else ""):
                    return file, source
                known.append(file.path)
    raise DataError(f"no source holds it; there are {', '.join(known[:8]) or 'none'}", path=name)


def _read(file: InputFile, number: int, schema: RowSchema) -> tuple[str | None, str, dict[str, Any] | BadRow]:
    """(format of the file, the row's raw text, the row)."""
    format, last = None, 0
    for block in read_blocks(file):
        rows = []
        if format is None:
            rows = list(decode_block(file, block))
            format = next(
                filter(None, (schema.detect(row) for _, row in rows if isinstance(row, dict))), None
            )
        last = block.first + block.num_rows - 1
        if number <= last or block.damage is not None:
            for place, row in rows or decode_block(file, block):
                if place.number == number:
                    at = number - block.first
                    item = block.items[at] if at < len(block.items) else row
                    raw = item.decode("utf-8", "backslashreplace") if isinstance(item, bytes) else ""
                    if isinstance(item, dict):
                        raw = json.dumps(item, ensure_ascii=False, indent=1, default=str)
                    return format, escape(raw), row
    raise DataError(
        f"has no {file.unit} {number}: the last one is {last}, or the {file.unit} is blank", path=file.path
    )


def marked_runs(
    tokens: npt.NDArray[np.uint32], weights: npt.NDArray[np.float64], kinds: Sequence[str], tokenizer: Any
) -> list[Stretch]:
    """A sample's text in runs of one kind and weight (0: context).

    Whole beginnings are decoded and compared, because decoders drop a space in front of what they are given.
    """
    decode = functools.partial(
        tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    marks = list(zip(weights.tolist(), kinds, strict=True))
    ends = [*(i for i in range(1, len(marks)) if marks[i] != marks[i - 1]), len(marks)]
    runs, before, start = [], "", 0
    for end in ends:
        text = decode(tokens[:end].tolist())
        run = text[len(before) :] if text.startswith(before) else decode(tokens[start:end].tolist())
        runs.append(Stretch(escape(run), marks[start][1], marks[start][0]))
        before, start = text, end
    return runs


def escape(text: str) -> str:
    """Text without control, format and unassigned characters (they become \\x.., \\u....); newlines stay."""
    return "".join(
        c if c == "\n" or not unicodedata.category(c).startswith("C") else ascii(c)[1:-1] for c in text
    )
