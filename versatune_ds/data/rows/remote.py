"""Files behind URLs (s3://, gs://, hf://, https://, ...), through fsspec and its package for the protocol.

What is not covered: credentials and options of a protocol, which its package takes from the environment or
from fsspec's own configuration files; writing.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from versatune_ds.data.rows.blocks import READ_BYTES
from versatune_ds.foundations.errors import ConfigError, DataError, VersaTuneError


def is_url(path: str) -> bool:
    """Does fsspec read this path?"""
    return "://" in path


@contextlib.contextmanager
def _asking(path: str) -> Iterator[None]:
    """What any package of a protocol may raise about `path`, as a `DataError` with the cure."""
    try:
        yield
    except VersaTuneError:
        raise
    except FileNotFoundError:
        raise DataError("no such file or folder; check `path` of the source", path=path) from None
    except Exception as error:  # each package has errors of its own
        text = f"cannot be read ({type(error).__name__}: {error})"
        raise DataError(f"{text}; check the name, the network and your credentials", path=path) from error


def open_file(path: str) -> BinaryIO:
    """A file, local or behind a URL, at its beginning.

    Raises:
        DataError: it cannot be opened.
        ConfigError: the package of its protocol is not installed.
    """
    if is_url(path):
        files, name = _file_system(path)
        with _asking(path):
            return io.BufferedReader(_RemoteFile(files.open(name, "rb"), path), READ_BYTES)
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror or error}", path=path) from None


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose errors name it."""

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        with _asking(self._path):
            data = self._file.read(len(target))
        target[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def close(self) -> None:
        self._file.close()
        super().close()


def file_stamp(path: str) -> list[Any]:
    """Size in bytes and what changes with any write: times (ns), or a URL's own mark (ETag, generation, ...).

    Raises:
        DataError: there is no such file.
        ConfigError: as `open_file`.
    """
    if is_url(path):
        files, name = _file_system(path)
        with _asking(path):
            files.invalidate_cache()
            info = files.info(name)
            # fsspec's own mark of a web page is its address
            return [info.get("size") or 0, files.ukey(name), info.get("ETag") or info.get("Last-Modified")]
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def find_remote(pattern: str) -> tuple[str, list[str]]:
    """(URL of the folder that is named, or ""; sorted URLs of the files that are meant); it may be a glob.

    Raises:
        DataError: nothing is there.
        ConfigError: as `open_file`.
    """
    files, name = _file_system(pattern)
    with _asking(pattern):
        if glob.has_magic(name) and not files.exists(name):
            folder, found = "", [path for path in files.glob(name) if not files.isdir(path)]
            if not found:
                raise DataError("no file matches; check the pattern", path=pattern)
        elif not pattern.endswith("/") and files.isfile(name):  # asked first: a web server would send it all
            return "", [pattern]
        elif files.isdir(name):
            folder, found = files.unstrip_protocol(name).rstrip("/"), files.find(name)
        else:
            raise FileNotFoundError
        return folder, sorted(map(files.unstrip_protocol, found))


def _file_system(path: str) -> tuple[Any, str]:
    """(the fsspec file system of a URL, its name for the file)."""
    import fsspec

    protocol = path.partition("://")[0]
    try:
        files, name = fsspec.core.url_to_fs(path)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or f"the one that fsspec names ({error})"
        raise ConfigError(
            f"{path}: {protocol}:// is read with a package that is not installed: `pip install {package}`"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path}: no file system is known for {protocol}:// ({error})") from None
    return files, str(name)
