"""Rows of text files: JSON lines and JSON lists cut without parsing, JSON columns; and one row parsed.

A file of columns, `{"prompt": [...], "completion": [...]}` or what pandas writes, is read whole: it takes
several times its size of memory.

What is not covered: CSV (`csv_rows.py`), and what a row must hold (`schemas.py`).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from versatune_ds.data.rows import blocks
from versatune_ds.data.rows.blocks import Block
from versatune_ds.data.rows.compression import unpack
from versatune_ds.data.rows.csv_rows import csv_rows
from versatune_ds.data.rows.files import InputFile
from versatune_ds.data.rows.reasons import BadRow, FileDamage, Reason, kind_of, not_utf8, short
from versatune_ds.foundations.errors import DataError


def text_blocks(raw: BinaryIO, file: InputFile) -> Iterator[Block]:
    """Blocks of an opened JSON, CSV or TSV file (see `readers.read_blocks`)."""
    stream = unpack(raw, file.compression, blocks.READ_BYTES)  # closes `raw` when it goes
    rows = _text_rows(stream, file)
    first, is_done = 1, False
    while not is_done:
        items: list[bytes | dict[str, Any] | BadRow] = []
        lines: list[int] = []
        size, damage = 0, None
        try:
            while size < blocks.BLOCK_BYTES and len(items) < blocks.BLOCK_ROWS:
                item, line = next(rows)
                items.append(item)
                lines += [] if line is None else [line]
                size += _size(item)
        except StopIteration:
            is_done = True
        except FileDamage as error:
            is_done, damage = True, error
        if items or damage is not None:
            yield Block(first, tuple(items), tuple(lines), b"", len(items), raw.tell(), damage)
        first += len(items)


def _size(item: bytes | dict[str, Any] | BadRow) -> int:
    """Bytes of a row, or about so many."""
    if isinstance(item, dict):
        return sum(len(value) for value in item.values() if isinstance(value, str))
    return len(item) if isinstance(item, bytes) else 0


def _text_rows(stream: io.BufferedReader, file: InputFile) -> Iterator[tuple[Any, int | None]]:
    """(a row or its text, line on which it begins if it is none itself); b"" for a blank line."""
    try:
        head = stream.peek(8)[:8]
        _refuse_foreign_content(head, file)
        if head.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        if file.kind in ("csv", "tsv"):
            rows: Iterator[tuple[Any, int | None]] = csv_rows(stream, file)
        else:
            rows = _line_rows(stream) if file.kind == "jsonl" else _json_rows(stream)
        is_empty = True
        for item, line in rows:
            is_empty = is_empty and item == b""
            yield item, line
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path=file.path) from error
    if is_empty:
        found = "the file is empty" if head == b"" else "the file holds no row"
        raise FileDamage(Reason.EMPTY_FILE, f"{found}; it needs at least one row, or remove the file")


def _refuse_foreign_content(head: bytes, file: InputFile) -> None:
    """Content that is not text: say so once instead of one complaint per line."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")):
        raise FileDamage(
            Reason.WRONG_ENCODING,
            "the file begins with a UTF-16 or UTF-32 byte-order mark; only UTF-8 is allowed. Convert it, "
            "e.g. with `iconv -f UTF-16 -t UTF-8`",
        )
    for magic, name in (
        (b"\x1f\x8b", "gzip (.gz)"),
        (b"\x28\xb5\x2f\xfd", "zstd (.zst)"),
        (b"PAR1", "Parquet (.parquet)"),
        (b"PK\x03\x04", "zip (unpack it)"),
        (b"BZh", "bzip2 (.bz2)"),
        (b"\xfd7zXZ", "xz (.xz)"),
        (b"ARROW1", "Arrow (.arrow)"),
    ):
        if head.startswith(magic):
            found = f"{file.compression} with {name} inside" if file.compression else name
            raise FileDamage(Reason.DAMAGED_FILE, f"the content is {found}, not text; name the file so")


def _json_rows(stream: io.BufferedReader) -> Iterator[tuple[Any, int | None]]:
    """Rows of a .json file: a list, JSON Lines in truth, or columns; looks ahead without moving."""
    ahead = stream.peek(blocks.READ_BYTES).lstrip()
    line, newline, rest = ahead.partition(b"\n")
    if not ahead.startswith(b"{"):
        return _ListScanner(stream).rows()
    is_line = _parsed(line) is not None
    if not (is_line and rest.strip()) and (newline or is_line or _BEGINS_LIKE_COLUMNS.match(ahead)):
        data = stream.read()
        stream = io.BufferedReader(io.BytesIO(data), blocks.READ_BYTES)  # type: ignore[arg-type]
        if (rows := column_rows(_parsed(data))) is not None:
            return ((row, 0) for row in rows)
    return _line_rows(stream) if is_line or not newline else _ListScanner(stream).rows()


# A first value that is a list of texts or lists, or pandas' object by row number.
_BEGINS_LIKE_COLUMNS = re.compile(rb'\{\s*"[^"\\]*"\s*:\s*(?:\[\s*["\[]|\{\s*"0"\s*:)')
_WRAPPERS = ("data", "rows", "examples", "samples", "records")
_ROW_NAMES = ("messages", "conversations", "prompt", "instruction", "input_ids")


def _parsed(text: bytes) -> Any:
    """The object that a text is; None for any other."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def column_rows(value: dict[str, Any] | None) -> list[Any] | None:
    """The rows of an object that holds a whole table; None if it is none, but a row.

    Known are lists by column, pandas' `orient` columns, split and table, and a list of rows under a name that
    says so. A list of turns or of token ids is no column: each of its elements would have to be a list.

    Raises:
        FileDamage: columns of different lengths.
    """
    for name in _WRAPPERS:
        rows = (value or {}).get(name)
        if not value or not isinstance(rows, list) or any(name in value for name in _ROW_NAMES):
            continue
        if rows and all(isinstance(row, dict) for row in rows):
            return rows
        names = value.get("columns")
        if isinstance(names, list) and all(isinstance(row, list) and len(row) == len(names) for row in rows):
            return [dict(zip(names, row, strict=True)) for row in rows]
    if not value:
        return None
    columns = value
    if all(isinstance(column, dict) and all(key.isdigit() for key in column) for column in value.values()):
        keys = {key: None for column in value.values() for key in column}
        columns = {name: [column.get(key) for key in keys] for name, column in value.items()}
    cells = [cell for column in columns.values() if isinstance(column, list) for cell in column]
    turns = (isinstance(cell, dict) and not {"role", "from"}.isdisjoint(cell) for cell in cells)
    if not all(isinstance(column, list) for column in columns.values()) or any(turns):
        return None
    if not any(isinstance(cell, (str, list)) for cell in cells):
        return None
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{short(name)[1:-1]} {length}" for name, length in list(lengths.items())[:8])
        raise FileDamage(
            Reason.DAMAGED_FILE, f"columns of different lengths ({found}); each needs one cell per row"
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _line_rows(stream: io.BufferedReader) -> Iterator[tuple[bytes | BadRow, None]]:
    while line := stream.readline(blocks.MAX_ROW_BYTES + 1):
        if len(line) > blocks.MAX_ROW_BYTES and not line.endswith(b"\n"):
            size = len(line)
            while rest := stream.readline(blocks.READ_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            found = f"found a row of {size / 2**20:.1f} MiB"
            allowed = f"at most {blocks.MAX_ROW_BYTES >> 20} MiB are allowed. Split it"
            yield BadRow(Reason.ROW_TOO_LARGE, f"{found}; {allowed}"), None
        else:
            yield line.strip(), None


# A JSON list, cut into its elements by counting brackets outside of strings. Unlike a parser this survives a
# bad element, holds one element at a time, and does not recurse.
_OUTSIDE_STRING = re.compile(rb'["{}\[\],]')
_INSIDE_STRING = re.compile(rb'["\\]')
_SPACE = b" \t\r\n"


class _ListScanner:
    """Elements of a JSON list from a stream."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream = stream
        self.buffer = b""
        self.start = 0
        """Where the current element begins in the buffer."""
        self.position = 0
        self.line = 1
        """Line of `start`."""
        self.count = 0

    def rows(self) -> Iterator[tuple[bytes | BadRow, int]]:
        """(text, line on which it begins) of every element.

        Raises:
            FileDamage: this is no list, it is cut off, or something follows it.
        """
        self._open_list()
        depth = 0
        while True:
            found = self._next(_OUTSIDE_STRING)
            if found == b'"':
                self._skip_string()
            elif found in b"{[":
                depth += 1
            elif found == b",":
                if depth == 0:
                    yield self._take()
            elif depth > 0:
                depth -= 1
            else:
                if self.count or self.buffer[self.start : self.position - 1].strip(_SPACE):
                    yield self._take()
                self._close_list(found)
                return

    def _open_list(self) -> None:
        while not self.buffer[self.position :].strip(_SPACE):
            self.position = len(self.buffer)
            if not self._fill():
                raise FileDamage(Reason.EMPTY_FILE, "the file is empty; it needs at least one row")
        rest = self.buffer[self.position :]
        self.position = len(self.buffer) - len(rest.lstrip(_SPACE))
        first = self.buffer[self.position : self.position + 1]
        if first != b"[":
            what = "an object" if first == b"{" else f"{first!r}"
            raise FileDamage(
                Reason.DAMAGED_FILE,
                f"the file begins with {what}; allowed: a list of objects [{{...}}, ...], JSON Lines, "
                'or columns {"prompt": [...], "completion": [...]}',
                line=1,
            )
        self.position += 1
        self.line += self.buffer.count(b"\n", 0, self.position)
        self.start = self.position

    def _close_list(self, bracket: bytes) -> None:
        self.start = self.position
        while True:
            if bracket != b"]" or self.buffer[self.position :].strip(_SPACE):
                raise FileDamage(
                    Reason.DAMAGED_FILE,
                    f"the list ends after row {self.count}, but the file goes on; allowed: one list",
                    line=self.line,
                )
            self.position = self.start = len(self.buffer)
            if not self._fill():
                return

    def _next(self, pattern: re.Pattern[bytes]) -> bytes:
        while (match := pattern.search(self.buffer, self.position)) is None:
            self.position = len(self.buffer)
            self._need_more()
        self.position = match.end()
        return match.group()

    def _skip_string(self) -> None:
        while self._next(_INSIDE_STRING) == b"\\":
            if self.position >= len(self.buffer):
                self._need_more()
            self.position += 1

    def _take(self) -> tuple[bytes | BadRow, int]:
        text = self.buffer[self.start : self.position - 1]
        body = text.lstrip(_SPACE)
        line = self.line + text.count(b"\n", 0, len(text) - len(body))
        self.line += text.count(b"\n")
        self.start = self.position
        self.count += 1
        if not body:
            return BadRow(Reason.INVALID_JSON, "nothing between two commas; an object is needed"), line
        return body.rstrip(_SPACE), line

    def _need_more(self) -> None:
        if self._fill():
            return
        body = self.buffer[self.start :]
        inside = body.strip(_SPACE)
        line = self.line + body.count(b"\n", 0, len(body) - len(body.lstrip(_SPACE)))
        what = f"in the middle of row {self.count + 1}" if inside else f"after row {self.count}, without ]"
        hint = ", or a quote or bracket is missing in this row" if inside else ""
        raise FileDamage(
            Reason.TRUNCATED_FILE,
            f"the file ends {what}; it was cut off{hint}. Copy or correct it",
            line=line,
        )

    def _fill(self) -> bool:
        held = len(self.buffer) - self.start
        if held > blocks.MAX_ROW_BYTES:
            raise FileDamage(
                Reason.ROW_TOO_LARGE,
                f"row {self.count + 1} goes on for more than {blocks.MAX_ROW_BYTES >> 20} MiB: it is too "
                "long, or a quote or bracket is missing; the rows from here on are lost",
                line=self.line,
            )
        data = self.stream.read1(blocks.READ_BYTES)
        self.buffer = self.buffer[self.start :] + data
        self.position -= self.start
        self.start = 0
        return bool(data)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(Reason.DUPLICATE_KEY, f"the key {short(repeated)} stands twice; keep one")
    return result


def _cause(error: json.JSONDecodeError) -> str:
    """What most often stands behind an error, and the cure."""
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos :].strip()
    if error.msg == "Extra data" and rest == ",":
        return " (a comma after the object; remove it: JSON Lines needs none)"
    if error.msg == "Extra data" and rest.startswith("{"):
        return " (two objects on one line; give each a line of its own)"
    if before.endswith(",") and rest[:1] in ("}", "]"):
        return f" (a comma in front of {rest[0]}; remove it)"
    if rest.startswith("'"):
        return " (texts in single quotes, as Python prints them; write rows with json.dumps)"
    if error.doc.strip() in ("[", "]"):
        return " (a list over several lines; name the file .json)"
    if error.msg.startswith("Unterminated string"):
        return " (the row is cut off or a quote is missing)"
    return " (the row is cut off)" if error.pos >= len(error.doc) - 1 else ""


def parse_json(data: bytes) -> dict[str, Any]:
    """One row from its JSON text; BadRow: not UTF-8, not JSON, no object, or a key twice in one object."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None
    except json.JSONDecodeError as error:
        raise BadRow(
            Reason.INVALID_JSON, f"not valid JSON: {error.msg} at character {error.pos + 1}{_cause(error)}"
        ) from None
    except RecursionError:
        raise BadRow(Reason.INVALID_JSON, "nested too deeply to be read as JSON") from None
    except ValueError as error:  # an integer with thousands of digits
        raise BadRow(Reason.INVALID_JSON, f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        cure = " (a list of rows: name the file .json)" if value and isinstance(value, list) else ""
        found = f"found {kind_of(value)}: {short(value)}"
        raise BadRow(Reason.NOT_AN_OBJECT, f"{found}; a row must be an object {{...}}{cure}")
    return value
