"""Raw rows from files, with the place of each, whatever the container.

`read_blocks` streams one file as blocks of raw rows: it only finds where rows begin and end, so one process
can feed many. `decode_block` turns a block into Python dicts, in the process that uses them. Memory is
bounded by a few blocks, whatever the file's size.

A row or file that cannot be used becomes a `BadRow` in its place; whether that stops the work is decided by
the caller. Accepted without a word: a UTF-8 byte-order mark at the start, CRLF line ends, blank lines.

What is not covered: finding files, and which kinds there are (`files.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from versatune_ds.data.rows.blocks import Block, RowPlace
from versatune_ds.data.rows.files import TABLES, InputFile
from versatune_ds.data.rows.hub import hub_blocks
from versatune_ds.data.rows.json_rows import parse_json, text_blocks
from versatune_ds.data.rows.reasons import WHOLE_FILE, BadRow, Reason
from versatune_ds.data.rows.remote import open_file
from versatune_ds.data.rows.tables import arrow_rows, by_name, table_blocks


def read_blocks(
    file: InputFile, select: Callable[[list[str]], list[str] | None] = lambda names: None
) -> Iterator[Block]:
    """The file's rows, in order, as blocks. The cuts depend on the content only, never on time or memory.

    Args:
        select: Parquet and Arrow: given all column names, those to read (None: all).

    Raises:
        DataError: the file cannot be opened.
        ConfigError: a hub data set without `datasets` installed, a URL without the package of its protocol.
    """
    if file.kind == "hub":
        yield from hub_blocks(file)
        return
    with open_file(file.path) as raw:
        yield from table_blocks(raw, file.kind, select) if file.kind in TABLES else text_blocks(raw, file)


def decode_block(file: InputFile, block: Block) -> Iterator[tuple[RowPlace, dict[str, Any] | BadRow]]:
    """The block's rows as dicts, each with its place; blank lines are left out.

    A `BadRow` stands where a row cannot be decoded, and at the end where the file is damaged.
    """
    for i, item in enumerate(arrow_rows(block.arrow) if block.arrow else block.items):
        number = block.first + i
        if isinstance(item, bytes):
            if item == b"":
                continue
            try:
                item = parse_json(item)
            except BadRow as error:
                item = error
        if isinstance(item, dict) and file.labels:
            item = by_name(item, dict(file.labels))
        if file.kind == "jsonl" or (file.kind == "json" and not block.lines):
            yield RowPlace(number, line=number), item
        else:
            yield RowPlace(number, line=(block.lines[i] or None) if block.lines else None, row=number), item
    if block.damage is not None:
        number = block.first + block.num_rows
        is_whole = block.damage.reason == Reason.EMPTY_FILE or number == 1
        if block.damage.reason in WHOLE_FILE and is_whole:
            yield RowPlace(number), block.damage
        elif file.kind == "jsonl":
            yield RowPlace(number, line=number), block.damage
        else:
            yield RowPlace(number, line=block.damage.line, row=number), block.damage
