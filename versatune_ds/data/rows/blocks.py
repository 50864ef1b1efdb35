"""Blocks of raw rows, what one process hands to another, and the place of a row.

What is not covered: how files become blocks (`json_rows.py`, `csv_rows.py`, `tables.py`, `hub.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from versatune_ds.data.rows.reasons import FileDamage

BLOCK_BYTES = 1 << 19
"""Raw bytes in a block: about 0.2 s of tokenisation, so that the last block of a run delays little."""
BLOCK_ROWS = 512
MAX_ROW_BYTES = 1 << 24
"""A longer row (16 MiB, about 4 million tokens) is refused unread: it would not fit a worker's memory."""
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Some rows of a file in order; item i has the place `first + i`."""

    first: int
    """Line or row number, from 1, of the first item."""
    items: tuple[Any, ...] = ()
    """Per row: bytes of JSON (b"" is a blank line), a dict, or a BadRow. Empty for an Arrow block."""
    lines: tuple[int, ...] = ()
    """Where rows are not lines: the line on which each begins; 0: not known."""
    arrow: bytes = b""
    """Parquet, Arrow: the rows as an Arrow IPC stream."""
    num_rows: int = 0
    consumed: int = 0
    """Bytes of the file read so far, for the progress bar."""
    damage: FileDamage | None = None
    """Why the file ends here although it should not."""


@dataclass(frozen=True)
class RowPlace:
    """Where a row stands: line and/or row number, from 1."""

    number: int
    line: int | None = None
    row: int | None = None
