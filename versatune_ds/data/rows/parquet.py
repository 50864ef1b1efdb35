"""Rows of Parquet files: blocks of Arrow data, and the dicts in them.

What is not covered: which columns are read (the caller selects).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from versatune_ds.data.rows import blocks
from versatune_ds.data.rows.blocks import Block
from versatune_ds.data.rows.reasons import BadRow, FileDamage, Reason, not_utf8


def parquet_blocks(raw: BinaryIO, select: Callable[[list[str]], list[str] | None]) -> Iterator[Block]:
    """Blocks of an opened Parquet file (see `readers.read_blocks`)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first, size = 1, os.fstat(raw.fileno()).st_size
    try:
        if size == 0:
            raise FileDamage(Reason.EMPTY_FILE, "the file is empty (0 bytes); Parquet was expected")
        # Without pre_buffer a column is read page by page, not a whole row group at once.
        parquet = pq.ParquetFile(raw, pre_buffer=False)
        names = parquet.schema_arrow.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise FileDamage(Reason.DAMAGED_FILE, f"the column {repeated[0]!r} stands twice; keep one")
        metadata = parquet.metadata
        if metadata.num_rows == 0:
            raise FileDamage(Reason.EMPTY_FILE, "the file holds no row; it needs at least one")
        unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
        per_row = max(1, unpacked // metadata.num_rows)
        batch_rows = max(1, min(blocks.BLOCK_ROWS, blocks.BLOCK_BYTES // per_row))
        for batch in parquet.iter_batches(batch_rows, columns=select(names), use_threads=False):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            rows = batch.num_rows
            done = size * min(first + rows - 1, metadata.num_rows) // metadata.num_rows
            yield Block(first, arrow=sink.getvalue().to_pybytes(), num_rows=rows, consumed=done)
            first += rows
    except FileDamage as error:
        yield Block(first, damage=error, consumed=size)
    except (pa.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = f"cannot be read as Parquet ({lines[0]}); rows from here on are lost. Write the file again"
        yield Block(first, damage=FileDamage(Reason.DAMAGED_FILE, text), consumed=size)


def arrow_rows(data: bytes) -> list[dict[str, Any] | BadRow]:
    """The rows of `Block.arrow`; a `BadRow` where a cell has no Python value."""
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        batch = reader.read_next_batch()
    try:
        return list(batch.to_pylist())
    except (ValueError, pa.ArrowException):  # one bad cell fails the whole batch: find it
        return [_arrow_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _arrow_row(batch: Any) -> dict[str, Any] | BadRow:
    import pyarrow as pa

    try:
        row: dict[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except (ValueError, pa.ArrowException) as error:
        return BadRow(Reason.WRONG_TYPE, f"a cell has no Python value: {error}")
