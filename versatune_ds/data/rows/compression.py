"""Unpacking gzip, zstd, bzip2 and xz files, with all rows before a cut, and a cut that is noticed.

What is not covered: Parquet and Arrow, which have their own compression.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from versatune_ds.data.rows.reasons import FileDamage, Reason

LOST = "the rows from here on are lost. Copy or pack the file again"


def unpack(raw: BinaryIO, compression: str, buffer_bytes: int) -> io.BufferedReader:
    """The content of an opened file.

    Args:
        raw: the file, at its beginning.
        compression: one of `files.COMPRESSIONS` or nothing.

    Raises (from the stream's methods):
        FileDamage: the content cannot be unpacked, or is cut off.
    """
    stream: Any = raw
    if compression == ".gz":
        stream = _Unpacker(raw, ".gz", lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), zlib.error)
    elif compression == ".bz2":
        stream = _Unpacker(raw, ".bz2", bz2.BZ2Decompressor, OSError)
    elif compression == ".xz":
        stream = _Unpacker(raw, ".xz", lzma.LZMADecompressor, lzma.LZMAError)
    elif compression == ".zst":
        import zstandard

        decompressor = zstandard.ZstdDecompressor()
        stream = _Unpacker(raw, ".zst", decompressor.decompressobj, zstandard.ZstdError)
    return io.BufferedReader(stream, buffer_bytes)


class _Unpacker(io.RawIOBase):
    """Unpacks gzip members, or frames or streams of the others, one after the other.

    Unlike the libraries' own streams it hands out all that could be unpacked before it complains of an early
    end (`gzip` loses the rest of its buffer, zstandard's stream does not notice).
    """

    FEED_BYTES = 1 << 14  # small, because a kilobyte can unpack to a megabyte

    def __init__(
        self, raw: BinaryIO, suffix: str, new_frame: Callable[[], Any], error: type[Exception]
    ) -> None:
        self._raw = raw
        self._suffix = suffix
        self._new_frame = new_frame
        self._error = error
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
            text = f"the {self._suffix} stream ends too early (end of file inside a frame)"
            raise FileDamage(Reason.TRUNCATED_FILE, f"{text}; {LOST}")
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            text = f"cannot be unpacked as {self._suffix} ({error})"
            raise FileDamage(Reason.DAMAGED_FILE, f"{text}; {LOST}") from None
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None
        return True
