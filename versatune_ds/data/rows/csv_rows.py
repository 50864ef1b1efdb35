"""Rows of CSV and TSV files: a header with the names of the columns, then one row per record; cells are text.

Texts in double quotes may hold separators and line ends; a quote in them is doubled. A .csv whose header is
separated by semicolons, tabs or bars instead of commas is read so, and said.

What is not covered: files without a header, and other ways to quote.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from versatune_ds.data.rows import blocks
from versatune_ds.data.rows.files import InputFile
from versatune_ds.data.rows.reasons import BadRow, FileDamage, Reason, not_utf8, short
from versatune_ds.foundations.log import get_logger

logger = get_logger(__name__)

SEPARATORS = (",", ";", "\t", "|")


def csv_rows(stream: io.BufferedReader, file: InputFile) -> Iterator[tuple[dict[str, Any] | BadRow, int]]:
    """(row, line on which it begins) of every record.

    Args:
        stream: at the header; it may look ahead.
        file: of kind `csv` or `tsv`.

    Raises:
        FileDamage: the header cannot be used, a quote is not closed, or a row is too large.
    """
    size = line = 0

    def lines() -> Iterator[str]:
        nonlocal size
        while data := stream.readline(blocks.MAX_ROW_BYTES + 1):
            size += len(data)
            if size > blocks.MAX_ROW_BYTES:
                text = f"a row goes on for more than {blocks.MAX_ROW_BYTES >> 20} MiB: it is too long, or a "
                text += "quote is not closed; the rows from here on are lost"
                raise FileDamage(Reason.ROW_TOO_LARGE, text, line)
            yield data.decode("utf-8", "surrogateescape")

    separator, skipped = _separator(stream, file)
    csv.field_size_limit(max(csv.field_size_limit(), blocks.MAX_ROW_BYTES))
    reader = csv.reader(lines(), delimiter=separator, strict=True)
    names: list[str] | None = None
    while True:
        line, size = reader.line_num + 1 + skipped, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if names is None or "unexpected end of data" in str(error):
                text = f"cannot be read as {file.kind.upper()} ({error}): a quote in front of a text is not "
                text += "closed, or the file was cut off"
                raise FileDamage(Reason.TRUNCATED_FILE, text, line) from None
            yield BadRow(Reason.INVALID_CSV, f"not valid {file.kind.upper()}: {error}"), line
            continue
        if not cells:  # a blank line
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            if repeated := sorted({name for name in names if name and names.count(name) > 1}):
                cure = f"the column {short(repeated[0])} stands twice; keep one"
                raise FileDamage(Reason.DAMAGED_FILE, cure, 1)
            continue
        yield _row(names, cells, reader.dialect.delimiter), line


def _separator(stream: io.BufferedReader, file: InputFile) -> tuple[str, int]:
    """(what stands between cells, lines in front of the header: Excel's `sep=;`)."""
    head = stream.peek(blocks.READ_BYTES).lstrip().partition(b"\n")[0].decode("utf-8", "replace")
    if head.startswith("sep=") and len(head.strip("\r")) == 5:
        stream.readline()
        return head[4], 1
    if file.kind == "tsv":
        return "\t", 0
    found = max(SEPARATORS, key=head.count)
    if found != ",":
        logger.warning("%s: the header is separated by %a, not by commas; it is read so", file.path, found)
    return found, 0


def _row(names: list[str], cells: list[str], separator: str) -> dict[str, Any] | BadRow:
    if len(cells) != len(names):
        return BadRow(
            Reason.INVALID_CSV,
            f"found {len(cells)} cells, the header names {len(names)} columns; a text that holds "
            f'{separator!a}, a line end or " needs double quotes around it',
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        try:
            "".join(cells).encode("utf-8", "surrogateescape").decode("utf-8")
        except UnicodeDecodeError as error:
            return not_utf8(error)
    return dict(zip(names, cells, strict=True))
