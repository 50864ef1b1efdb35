"""Rows of Parquet and Arrow files: blocks of Arrow data, and the dicts in them.

Bytes are read as UTF-8 text, and class labels by their names, which `datasets` keeps in the file's metadata.

What is not covered: which columns are read (the caller selects), and Feather files of version 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from versatune_ds.data.rows import blocks
from versatune_ds.data.rows.blocks import Block
from versatune_ds.data.rows.reasons import BadRow, FileDamage, Reason, not_utf8
from versatune_ds.data.rows.repositories import label_names

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""Ends an Arrow stream; one that was cut off between two batches looks whole without it."""


def table_blocks(
    raw: BinaryIO, kind: str, select: Callable[[list[str]], list[str] | None]
) -> Iterator[Block]:
    """Blocks of an opened file of the kind `parquet` or `arrow` (see `readers.read_blocks`)."""
    import pyarrow as pa

    first, size, name = 1, raw.seek(0, os.SEEK_END), kind.capitalize()
    raw.seek(0)
    try:
        if size == 0:
            raise FileDamage(Reason.EMPTY_FILE, f"the file is empty (0 bytes); {name} was expected")
        for batch, consumed in (_parquet if kind == "parquet" else _arrow)(raw, size, select):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            rows = batch.num_rows
            yield Block(first, arrow=sink.getvalue().to_pybytes(), num_rows=rows, consumed=consumed)
            first += rows
        if first == 1:
            raise FileDamage(Reason.EMPTY_FILE, "the file holds no row; it needs at least one")
    except FileDamage as error:
        yield Block(first, damage=error, consumed=size)
    except (pa.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = f"cannot be read as {name} ({lines[0]}); rows from here on are lost. Write the file again"
        yield Block(first, damage=FileDamage(Reason.DAMAGED_FILE, text), consumed=size)


def _parquet(
    raw: BinaryIO, size: int, select: Callable[[list[str]], list[str] | None]
) -> Iterator[tuple[Any, int]]:
    """(batch of some rows, bytes of the file that they end at)."""
    import pyarrow.parquet as pq

    # Without pre_buffer a column is read page by page, not a whole row group at once.
    parquet = pq.ParquetFile(raw, pre_buffer=False)
    names = _distinct(parquet.schema_arrow.names)
    metadata = parquet.metadata
    unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    done = 0
    for batch in parquet.iter_batches(
        _rows_per_block(unpacked, metadata.num_rows), columns=select(names), use_threads=False
    ):
        done += batch.num_rows
        yield batch, size * done // metadata.num_rows


def _arrow(
    raw: BinaryIO, size: int, select: Callable[[list[str]], list[str] | None]
) -> Iterator[tuple[Any, int]]:
    """As `_parquet`, of an Arrow stream (what `datasets` writes) or an Arrow file (Feather)."""
    import pyarrow as pa

    head = raw.read(6)
    if head == b"ARROW1":
        file = pa.ipc.open_file(raw)
        schema = file.schema
        batches: Iterator[Any] = (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        raw.seek(0)
        batches = stream = pa.ipc.open_stream(raw)
        schema = stream.schema
    names = _distinct(schema.names)
    names = select(names) or names
    for batch in batches:
        batch, consumed = batch.select(names), raw.tell()
        step = _rows_per_block(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            yield batch.slice(start, step), consumed
    raw.seek(-len(END_OF_STREAM), os.SEEK_END)
    if head.startswith(END_OF_STREAM[:4]) and raw.read() != END_OF_STREAM:
        raise FileDamage(
            Reason.TRUNCATED_FILE, "the Arrow stream has no end mark: it was cut off. Copy it again"
        )


def _rows_per_block(size: int, rows: int) -> int:
    return max(1, min(blocks.BLOCK_ROWS, blocks.BLOCK_BYTES // max(1, size // max(1, rows))))


def _distinct(names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise FileDamage(Reason.DAMAGED_FILE, f"the column {repeated[0]!r} stands twice; keep one")
    return names


def arrow_rows(data: bytes) -> list[dict[str, Any] | BadRow]:
    """The rows of `Block.arrow`; a `BadRow` where a cell has no Python value."""
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        batch = reader.read_next_batch()
    about = json.loads((batch.schema.metadata or {}).get(b"huggingface", b"{}"))
    labels = label_names(about.get("info", {}).get("features"))
    has_bytes = "binary" in str(batch.schema.types)
    try:
        rows = list(batch.to_pylist())
        rows = [_as_text(row) for row in rows] if has_bytes else rows
    except (ValueError, pa.ArrowException):  # one bad cell fails the whole batch: find it
        rows = [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]
    return [row if isinstance(row, BadRow) else by_name(row, labels) for row in rows] if labels else rows


def _arrow_row(batch: Any) -> dict[str, Any] | BadRow:
    import pyarrow as pa

    try:
        row: dict[str, Any] = _as_text(batch.to_pylist()[0])
        return row
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except (ValueError, pa.ArrowException) as error:
        return BadRow(Reason.WRONG_TYPE, f"a cell has no Python value: {error}")


def _as_text(value: Any) -> Any:
    """`value` with the bytes in it as text; those that are none stay, e.g. an image beside the text."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return {name: _as_text(item) for name, item in value.items()} if isinstance(value, dict) else value


def by_name(row: dict[str, Any], labels: Mapping[str, Sequence[str]]) -> dict[str, Any] | BadRow:
    """A row with the names of its class labels in the place of their numbers; -1 is `datasets`' null."""
    for column, names in labels.items():
        value = row.get(column)
        if type(value) is not int:
            continue
        if not -1 <= value < len(names):
            return BadRow(
                Reason.WRONG_TYPE, f"{column} is {value}; allowed: 0 .. {len(names) - 1}, the class labels"
            )
        row = row | {column: None if value == -1 else names[value]}
    return row
