"""Raw rows from files, with the place of each: JSON Lines, JSON lists, Parquet, folders, globs, the hub.

`find_files` turns a `path` setting into an ordered list of files. `read_blocks` streams one file as blocks of
raw rows: it only finds where rows begin and end, so one process can feed many. `decode_block` turns a block
into Python dicts, in the process that uses them. Memory is bounded by a few blocks, whatever the file's size.

A row or file that cannot be used becomes a `BadRow` in its place; whether that stops the work is decided by
the caller. Accepted without a word: a UTF-8 byte-order mark at the start, CRLF line ends, blank lines.

    .jsonl .ndjson          one JSON object per line
    .json                   a list of objects, or JSON Lines when the first line is a whole object
    .parquet                top-level columns are the row's fields
    .gz .zst after these    compressed (not Parquet, which has its own compression)
    hub:owner/name          a data set on the hub, streamed with `datasets` (extra `hub`)

What is not covered: CSV, TSV, Arrow files and data sets on the hub that need a configuration name.
"""

from __future__ import annotations

import glob as globbing
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from versatune_ds.foundations.errors import ConfigError, DataError
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

BLOCK_BYTES = 1 << 19
"""Raw bytes in a block: about 0.2 s of tokenisation, so that the last block of a run delays little."""
BLOCK_ROWS = 512
MAX_ROW_BYTES = 1 << 24
"""A longer row (16 MiB, about 4 million tokens) is refused unread: it would not fit a worker's memory."""
READ_BYTES = 1 << 20
HUB_PREFIX = "hub:"
EXTENSIONS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst")
ALLOWED_FILES = "allowed: .jsonl, .ndjson, .json (each also with .gz or .zst) and .parquet"


class Reason(str, Enum):
    """Why a row is not trained on: a fixed vocabulary, so that tables of different runs can be compared."""

    # The file.
    EMPTY_FILE = "empty_file"
    DAMAGED_FILE = "damaged_file"
    TRUNCATED_FILE = "truncated_file"
    WRONG_ENCODING = "wrong_encoding"
    # The row as text.
    ROW_TOO_LARGE = "row_too_large"
    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    DUPLICATE_KEY = "duplicate_key"
    NOT_AN_OBJECT = "not_an_object"
    # The row against its schema.
    UNKNOWN_COLUMNS = "unknown_columns"
    OTHER_FORMAT = "other_format"
    MISSING_FIELD = "missing_field"
    NULL_FIELD = "null_field"
    WRONG_TYPE = "wrong_type"
    UNSUPPORTED_FIELD = "unsupported_field"
    UNKNOWN_ROLE = "unknown_role"
    NO_ASSISTANT_TURN = "no_assistant_turn"
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_RESPONSE = "empty_response"
    LONE_SURROGATE = "lone_surrogate"
    UNKNOWN_DOMAIN = "unknown_domain"
    LENGTH_MISMATCH = "length_mismatch"
    INVALID_TOKEN = "invalid_token"
    INVALID_LABEL = "invalid_label"
    INVALID_ATTENTION_MASK = "invalid_attention_mask"
    # The row as tokens.
    REFUSED_BY_TEMPLATE = "refused_by_template"
    STOP_TOKEN_IN_TEXT = "stop_token_in_text"
    NO_STOP_TOKEN = "no_stop_token"
    NOTHING_SUPERVISED = "nothing_supervised"
    # By `data.overlong`, whatever `data.on_bad_row` says.
    OVERLONG = "overlong"
    OVERLONG_NOTHING_LEFT = "overlong_nothing_left"


WHOLE_FILE = (Reason.EMPTY_FILE, Reason.DAMAGED_FILE, Reason.TRUNCATED_FILE, Reason.WRONG_ENCODING)
"""Reasons that concern a file, or the rest of it from a place on, and not one row."""


class BadRow(Exception):
    """A row that cannot be used: what was found and what is allowed, without its place."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class InputFile:
    """One file (or hub data set) to read."""

    path: str
    """As found from the setting; for the hub `hub:owner/name`."""
    kind: str
    """`jsonl`, `json`, `parquet` or `hub`."""
    compression: str = ""
    """`.gz`, `.zst` or nothing."""
    split: str = ""
    """Split, hub only."""
    revision: str = ""
    """Commit of the data set, hub only."""

    @property
    def unit(self) -> str:
        """What a place in this file counts: `line` or `row`, from 1."""
        return "line" if self.kind == "jsonl" else "row"


@dataclass(frozen=True)
class FoundFiles:
    """Files of a source in reading order, and what lay beside them and is not read.

    The latter are files of unknown kind, and inside folders names that begin with `.` or `_`; of a folder so
    named only its own name.
    """

    files: tuple[InputFile, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """Some rows of a file in order; item i has the place `first + i`."""

    first: int
    """Line or row number, from 1, of the first item."""
    items: tuple[Any, ...] = ()
    """Per row: bytes of JSON (b"" is a blank line), a dict, or a BadRow. Empty for an Arrow block."""
    lines: tuple[int, ...] = ()
    """JSON lists: the line on which each row begins."""
    arrow: bytes = b""
    """Parquet: the rows as an Arrow IPC stream."""
    num_rows: int = 0
    consumed: int = 0
    """Bytes of the file read so far, for the progress bar."""
    damage: BadRow | None = None
    """Why the file ends here although it should not."""
    damage_line: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a row stands: line and/or row number, from 1."""

    number: int
    line: int | None = None
    row: int | None = None


# Finding files


def find_files(path: str | Sequence[str], split: str = "train") -> FoundFiles:
    """Files of a source's `path`: in the order of the list, inside folders and globs sorted by path.

    Args:
        path: a file, a folder (searched recursively), a glob (`**` too), `hub:owner/name`, or a list.
        split: for hub names.

    Raises:
        DataError: nothing there, nothing readable, or a file of an unknown kind is named outright.
    """
    files: dict[str, InputFile] = {}
    ignored: list[str] = []
    for pattern in [path] if isinstance(path, str) else path:
        pattern = os.path.expanduser(pattern)
        is_named, candidates, hidden = _candidates(pattern)
        ignored += hidden
        for candidate in candidates:
            file = _input_file(candidate, split)
            if file is None and is_named:
                raise DataError(f"files of this kind cannot be read; {ALLOWED_FILES}", path=candidate)
            if file is None:
                ignored.append(candidate)
            elif file.path in files or _identity(file.path) in map(_identity, files):
                logger.warning("%s is given twice by %s; it is read once", file.path, path)
            else:
                files[file.path] = file
        if not files:
            beside = f" (it holds {', '.join(ignored[:3])})" if ignored else ""
            raise DataError(f"no data file found{beside}; {ALLOWED_FILES}", path=pattern)
    return FoundFiles(tuple(files.values()), tuple(name for name in ignored if name not in files))


def _identity(path: str) -> str:
    return path if path.startswith(HUB_PREFIX) else os.path.realpath(path)


def _candidates(pattern: str) -> tuple[bool, list[str], list[str]]:
    """(was a file named outright?, files that `pattern` stands for, hidden names in a folder)."""
    if pattern.startswith(HUB_PREFIX) or os.path.isfile(pattern):
        return True, [pattern], []
    if os.path.isdir(pattern):
        return False, *_walk(pattern)
    if globbing.has_magic(pattern):
        found = sorted(p for p in globbing.glob(pattern, recursive=True) if os.path.isfile(p))
        if not found:
            raise DataError("no file matches; check the pattern and the working folder", path=pattern)
        return False, found, []
    if os.path.exists(pattern):
        raise DataError("neither a file nor a folder; " + ALLOWED_FILES, path=pattern)
    raise DataError(
        f"no such file or folder (working folder: {os.getcwd()}); check `path` of the source", path=pattern
    )


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """Files below a folder, and hidden files and folders there (these with a slash at the end); sorted."""

    def refuse(error: OSError) -> None:
        raise DataError(f"folder cannot be read: {error.strerror}", path=error.filename)

    files: list[str] = []
    hidden: list[str] = []
    visited: set[str] = set()  # links may lead back up
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        visited.add(os.path.realpath(parent))
        for name in sorted(names):
            (hidden if _is_hidden(name) else files).append(os.path.join(parent, name))
        hidden += [os.path.join(parent, name, "") for name in sorted(filter(_is_hidden, folders))]
        folders[:] = sorted(
            name
            for name in folders
            if not _is_hidden(name) and os.path.realpath(os.path.join(parent, name)) not in visited
        )
    return files, hidden


def _is_hidden(name: str) -> bool:
    """What tools name so is no data: .git, .cache, _SUCCESS, _metadata."""
    return name.startswith((".", "_"))


def _input_file(path: str, split: str) -> InputFile | None:
    if path.startswith(HUB_PREFIX):
        return InputFile(path, "hub", split=split)
    stem, extension = os.path.splitext(path.lower())
    compression = ""
    if extension in COMPRESSIONS:
        compression = extension
        extension = os.path.splitext(stem)[1]
    kind = EXTENSIONS.get(extension)
    if kind is None or (kind == "parquet" and compression):
        return None
    return InputFile(path, kind, compression)


# Blocks


def read_blocks(
    file: InputFile, select: Callable[[list[str]], list[str] | None] = lambda names: None
) -> Iterator[Block]:
    """The file's rows, in order, as blocks. The cuts depend on the content only, never on time or memory.

    Args:
        file: from `find_files`.
        select: Parquet: given all column names, those to read (None: all).

    Raises:
        DataError: the file cannot be opened.
        ConfigError: a hub data set without `datasets` installed.
    """
    if file.kind == "hub":
        yield from _hub_blocks(file)
    elif file.kind == "parquet":
        yield from _parquet_blocks(file, select)
    else:
        yield from _text_blocks(file)


@dataclass
class _Collector:
    """Collects rows until a block is full."""

    raw: BinaryIO | None
    first: int = 1
    items: list[Any] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    size: int = 0
    total: int = 0
    """Rows that are not blank, in all blocks."""

    def add(self, item: bytes | BadRow, line: int | None = None) -> None:
        self.items.append(item)
        if line is not None:
            self.lines.append(line)
        if item != b"":
            self.total += 1
        self.size += len(item) if isinstance(item, bytes) else 0

    @property
    def is_full(self) -> bool:
        return self.size >= BLOCK_BYTES or len(self.items) >= BLOCK_ROWS

    def take(self, damage: BadRow | None = None, damage_line: int | None = None) -> Block:
        block = Block(
            first=self.first,
            items=tuple(self.items),
            lines=tuple(self.lines),
            num_rows=len(self.items),
            consumed=self.raw.tell() if self.raw is not None else 0,
            damage=damage,
            damage_line=damage_line,
        )
        self.first += len(self.items)
        self.items, self.lines, self.size = [], [], 0
        return block


class _Damage(Exception):
    """The file cannot be read on from here."""

    def __init__(self, reason: Reason, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.problem = BadRow(reason, message)
        self.line = line


def _text_blocks(file: InputFile) -> Iterator[Block]:
    with _open(file) as raw:
        collector = _Collector(raw)
        rows: Iterator[tuple[bytes | BadRow, int | None]]
        try:
            stream = _decompress(raw, file.compression)
            head = stream.peek(4)[:4]
            _refuse_foreign_content(head, file)
            if head.startswith(b"\xef\xbb\xbf"):
                stream.read(3)
            if file.kind == "json" and not _is_json_lines(stream):
                rows = _json_list_rows(stream)
            else:
                rows = ((item, None) for item in _line_rows(stream))
            for item, line in rows:
                collector.add(item, line)
                if collector.is_full:
                    yield collector.take()
            if collector.total == 0:
                found = "the file is empty" if head == b"" else "the file holds no row"
                raise _Damage(Reason.EMPTY_FILE, f"{found}; it needs at least one row, or remove the file")
        except _Damage as error:
            yield collector.take(error.problem, error.line)
            return
        except _CutOff as error:
            text = f"the {file.compression} stream ends too early ({error})"
            yield collector.take(BadRow(Reason.TRUNCATED_FILE, f"{text}; {_LOST}"))
            return
        except (zlib.error, _zstd_error()) as error:
            text = f"cannot be unpacked as {file.compression} ({error})"
            yield collector.take(BadRow(Reason.DAMAGED_FILE, f"{text}; {_LOST}"))
            return
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", path=file.path) from error
        if collector.items:
            yield collector.take()


_LOST = "the rows from here on are lost. Copy or pack the file again"


def _open(file: InputFile) -> BinaryIO:
    try:
        return open(file.path, "rb")
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror or error}", path=file.path) from None


def _refuse_foreign_content(head: bytes, file: InputFile) -> None:
    """Content that is not text: say so once instead of one complaint per line."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head == b"\x00\x00\xfe\xff":
        raise _Damage(
            Reason.WRONG_ENCODING,
            "the file begins with a UTF-16 or UTF-32 byte-order mark; only UTF-8 is allowed. Convert it, "
            "e.g. with `iconv -f UTF-16 -t UTF-8`",
        )
    for magic, name in (
        (b"\x1f\x8b", "gzip (.gz)"),
        (b"\x28\xb5\x2f\xfd", "zstd (.zst)"),
        (b"PAR1", "Parquet (.parquet)"),
        (b"PK\x03\x04", "zip (unpack it)"),
        (b"BZh", "bzip2 (unpack it)"),
    ):
        if head.startswith(magic):
            found = f"{file.compression} with {name} inside" if file.compression else name
            raise _Damage(Reason.DAMAGED_FILE, f"the content is {found}, not text; name the file so")


def _is_json_lines(stream: io.BufferedReader) -> bool:
    """Is a .json file JSON Lines in truth: does its first line hold one whole object?

    Looks ahead without moving; a first line longer than the buffer that begins with `{` counts as one.
    """
    ahead = stream.peek(READ_BYTES).lstrip()
    if not ahead.startswith(b"{"):
        return False
    line, newline, _ = ahead.partition(b"\n")
    if not newline and len(ahead) > READ_BYTES // 2:
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _line_rows(stream: io.BufferedReader) -> Iterator[bytes | BadRow]:
    """One item per line; b"" for a blank one, so that places stay right."""
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            size = len(line)
            while rest := stream.readline(READ_BYTES):
                size += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield _too_large(size)
        else:
            yield line.strip()


def _too_large(size: int) -> BadRow:
    return BadRow(
        Reason.ROW_TOO_LARGE,
        f"found a row of {size / 2**20:.1f} MiB; at most {MAX_ROW_BYTES >> 20} MiB are allowed. Split it",
    )


# A JSON list, cut into its elements by counting brackets outside of strings. Unlike a parser this survives a
# bad element, holds one element at a time, and does not recurse.
_OUTSIDE_STRING = re.compile(rb'["{}\[\],]')
_INSIDE_STRING = re.compile(rb'["\\]')
_SPACE = b" \t\r\n"


class _ListScanner:
    """Elements of a JSON list from a stream: (text, line on which it begins)."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.stream = stream
        self.buffer = b""
        self.start = 0
        """Where the current element begins in the buffer."""
        self.position = 0
        self.line = 1
        """Line of `start`."""
        self.count = 0

    def elements(self) -> Iterator[tuple[bytes, int]]:
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
                raise _Damage(Reason.EMPTY_FILE, "the file is empty; it needs at least one row")
        rest = self.buffer[self.position :]
        self.position = len(self.buffer) - len(rest.lstrip(_SPACE))
        first = self.buffer[self.position : self.position + 1]
        if first != b"[":
            what = "an object" if first == b"{" else f"{first!r}"
            raise _Damage(
                Reason.DAMAGED_FILE,
                f"the file begins with {what}; allowed: a list of objects [{{...}}, ...], or JSON Lines",
                line=1,
            )
        self.position += 1
        self.line += self.buffer.count(b"\n", 0, self.position)
        self.start = self.position

    def _close_list(self, bracket: bytes) -> None:
        self.start = self.position
        while True:
            if bracket != b"]" or self.buffer[self.position :].strip(_SPACE):
                raise _Damage(
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

    def _take(self) -> tuple[bytes, int]:
        text = self.buffer[self.start : self.position - 1]
        body = text.lstrip(_SPACE)
        line = self.line + text.count(b"\n", 0, len(text) - len(body))
        self.line += text.count(b"\n")
        self.start = self.position
        self.count += 1
        return body.rstrip(_SPACE), line

    def _need_more(self) -> None:
        if self._fill():
            return
        body = self.buffer[self.start :]
        inside = body.strip(_SPACE)
        line = self.line + body.count(b"\n", 0, len(body) - len(body.lstrip(_SPACE)))
        what = f"in the middle of row {self.count + 1}" if inside else f"after row {self.count}, without ]"
        hint = ", or a quote or bracket is missing in this row" if inside else ""
        raise _Damage(
            Reason.TRUNCATED_FILE,
            f"the file ends {what}; it was cut off{hint}. Copy or correct it",
            line=line,
        )

    def _fill(self) -> bool:
        held = len(self.buffer) - self.start
        if held > MAX_ROW_BYTES:
            raise _Damage(
                Reason.ROW_TOO_LARGE,
                f"row {self.count + 1} goes on for more than {MAX_ROW_BYTES >> 20} MiB: it is too long, or a "
                "quote or bracket is missing; the rows from here on are lost",
                line=self.line,
            )
        data = self.stream.read1(READ_BYTES)
        self.buffer = self.buffer[self.start :] + data
        self.position -= self.start
        self.start = 0
        return bool(data)


def _json_list_rows(stream: io.BufferedReader) -> Iterator[tuple[bytes | BadRow, int | None]]:
    for text, line in _ListScanner(stream).elements():
        if text:
            yield text, line
        else:
            yield BadRow(Reason.INVALID_JSON, "nothing between two commas; an object is needed"), line


# Compression


class _CutOff(Exception):
    """A compressed stream that ends inside a frame."""


class _Unpacker(io.RawIOBase):
    """Unpacks gzip members or zstd frames, one after the other.

    Unlike the libraries' own streams it hands out all that could be unpacked before it complains of an early
    end (`gzip` loses the rest of its buffer, zstandard's stream does not notice).
    """

    FEED_BYTES = 1 << 14  # small, because a kilobyte can unpack to a megabyte

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], Any]) -> None:
        self._raw = raw
        self._new_frame = new_frame
        self._frame: Any = None
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._unpacked:
            if not self._advance():
                return 0
        size = min(len(target), len(self._unpacked))
        target[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _advance(self) -> bool:
        """Unpack a little more; False at the end of the file."""
        if not self._packed:
            self._packed = self._raw.read(self.FEED_BYTES)
        if self._frame is None:
            self._packed = self._packed.lstrip(b"\0")  # some tools pad to full blocks
            if not self._packed:
                return bool(self._raw.peek(1))  # type: ignore[attr-defined]
            self._frame = self._new_frame()
        if not self._packed:
            raise _CutOff("end of file inside a frame")
        self._unpacked = memoryview(self._frame.decompress(self._packed))
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None
        return True


def _decompress(raw: BinaryIO, compression: str) -> io.BufferedReader:
    stream: Any = raw
    if compression == ".gz":
        stream = _Unpacker(raw, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
    elif compression == ".zst":
        import zstandard

        stream = _Unpacker(raw, zstandard.ZstdDecompressor().decompressobj)
    return io.BufferedReader(stream, READ_BYTES)


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


# Parquet and the hub


def _parquet_blocks(file: InputFile, select: Callable[[list[str]], list[str] | None]) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first, size = 1, 0
    try:
        size = os.path.getsize(file.path)
        with _open(file) as raw:
            if size == 0:
                raise _Damage(Reason.EMPTY_FILE, "the file is empty (0 bytes); Parquet was expected")
            # Without pre_buffer a column is read page by page, not a whole row group at once.
            parquet = pq.ParquetFile(raw, pre_buffer=False)
            names = parquet.schema_arrow.names
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise _Damage(Reason.DAMAGED_FILE, f"the column {repeated[0]!r} stands twice; keep one")
            metadata = parquet.metadata
            if metadata.num_rows == 0:
                raise _Damage(Reason.EMPTY_FILE, "the file holds no row; it needs at least one")
            unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
            per_row = max(1, unpacked // metadata.num_rows)
            batch_rows = max(1, min(BLOCK_ROWS, BLOCK_BYTES // per_row))
            for batch in parquet.iter_batches(batch_rows, columns=select(names), use_threads=False):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch)
                rows = batch.num_rows
                done = size * min(first + rows - 1, metadata.num_rows) // metadata.num_rows
                yield Block(first, arrow=sink.getvalue().to_pybytes(), num_rows=rows, consumed=done)
                first += rows
    except _Damage as error:
        yield Block(first, damage=error.problem, consumed=size)
    except DataError:
        raise
    except (pa.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = f"cannot be read as Parquet ({lines[0]}); rows from here on are lost. Write the file again"
        yield Block(first, damage=BadRow(Reason.DAMAGED_FILE, text), consumed=size)


def _hub_blocks(file: InputFile) -> Iterator[Block]:
    load_dataset = _datasets().load_dataset
    name = file.path.removeprefix(HUB_PREFIX)
    try:
        rows = load_dataset(name, split=file.split, streaming=True, revision=file.revision or None)
        first, items = 1, []
        for row in rows:
            items.append(row)
            if len(items) >= BLOCK_ROWS // 2:
                yield Block(first, tuple(items), num_rows=len(items))
                first, items = first + len(items), []
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"cannot be read from the hub: {error}; check name, split {file.split!r} and the network",
            path=file.path,
        ) from error
    if items:
        yield Block(first, tuple(items), num_rows=len(items))
    elif first == 1:
        yield Block(1, damage=BadRow(Reason.EMPTY_FILE, f"the split {file.split!r} holds no row"))


def hub_revision(path: str) -> str:
    """Commit hash of a hub data set, asked from the hub.

    Raises:
        ConfigError: `datasets` is not installed.
        DataError: the hub does not know the data set or cannot be reached.
    """
    _datasets()
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path.removeprefix(HUB_PREFIX)).sha)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot be found on the hub: {error}", path=path) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "hub data sets need the package `datasets`: install the extra, `pip install versatune-ds[hub]`, "
            "or name local files"
        ) from None
    return datasets


# Rows


def decode_block(file: InputFile, block: Block) -> Iterator[tuple[Place, dict[str, Any] | BadRow]]:
    """The block's rows as dicts, each with its place; blank lines are left out.

    A `BadRow` stands where a row cannot be decoded, and at the end where the file is damaged.
    """
    if block.arrow:
        yield from _arrow_rows(block)
    for i, item in enumerate(block.items):
        if item == b"":
            continue
        place = _place(file, block, i)
        if isinstance(item, bytes):
            try:
                item = parse_json(item)
            except BadRow as error:
                item = error
        yield place, item
    if block.damage is not None:
        number = block.first + block.num_rows
        is_whole = block.damage.reason == Reason.EMPTY_FILE or number == 1
        if block.damage.reason in WHOLE_FILE and is_whole:
            place = Place(number)
        elif file.kind == "jsonl":
            place = Place(number, line=number)
        else:
            place = Place(number, line=block.damage_line, row=number)
        yield place, block.damage


def _place(file: InputFile, block: Block, i: int) -> Place:
    number = block.first + i
    if file.kind == "jsonl" or (file.kind == "json" and not block.lines):
        return Place(number, line=number)
    return Place(number, line=block.lines[i] if block.lines else None, row=number)


def _arrow_rows(block: Block) -> Iterator[tuple[Place, dict[str, Any] | BadRow]]:
    import pyarrow as pa

    with pa.ipc.open_stream(block.arrow) as reader:
        batch = reader.read_next_batch()
    try:
        rows: list[Any] = batch.to_pylist()
    except (ValueError, pa.ArrowException):  # one bad cell fails the whole batch: find it
        rows = [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    for i, row in enumerate(rows):
        yield Place(block.first + i, row=block.first + i), row


def _arrow_row(batch: Any) -> dict[str, Any] | BadRow:
    import pyarrow as pa

    try:
        row: dict[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except (ValueError, pa.ArrowException) as error:
        return BadRow(Reason.WRONG_TYPE, f"a cell has no Python value: {error}")


def _not_utf8(error: UnicodeDecodeError) -> BadRow:
    found = error.object[error.start : error.start + 4].hex(" ")
    return BadRow(
        Reason.INVALID_UTF8,
        f"bytes {found} at byte {error.start} of the row are not UTF-8; only UTF-8 is allowed",
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise BadRow(Reason.DUPLICATE_KEY, f"the key {short(repeated)} stands twice; keep one")
    return result


def parse_json(data: bytes) -> dict[str, Any]:
    """One row from its JSON text.

    Raises:
        BadRow: not UTF-8, not JSON, a key twice in one object, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None
    except json.JSONDecodeError as error:
        at_end = " (the row is cut off)" if error.pos >= len(error.doc) - 1 else ""
        if error.msg.startswith("Unterminated string"):
            at_end = " (the row is cut off or a quote is missing)"
        raise BadRow(
            Reason.INVALID_JSON, f"not valid JSON: {error.msg} at character {error.pos + 1}{at_end}"
        ) from None
    except RecursionError:
        raise BadRow(Reason.INVALID_JSON, "nested too deeply to be read as JSON") from None
    except ValueError as error:  # an integer with thousands of digits
        raise BadRow(Reason.INVALID_JSON, f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRow(
            Reason.NOT_AN_OBJECT, f"found {kind_of(value)}: {short(value)}; a row must be an object {{...}}"
        )
    return value


def kind_of(value: Any) -> str:
    """A JSON word for the type of `value`, for error texts."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean", int: "a number", float: "a number", str: "a string",
        list: "a list", dict: "an object", bytes: "bytes",
    }  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def short(value: Any, limit: int = 60) -> str:
    """`value` on one line in printable ASCII, cut to about `limit` characters: safe on any terminal."""
    if isinstance(value, bytes):
        text = ascii(value[: limit + 1])[1:]
    elif isinstance(value, str):
        text = ascii(value[: limit + 1])
    else:
        try:
            text = ascii(value)
        except (RecursionError, ValueError):
            text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[:limit] + "..."


def display_path(path: str | Path) -> str:
    """A path that is safe to print."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")
