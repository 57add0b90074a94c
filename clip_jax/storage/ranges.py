"""Reads ranges of files, local or behind a URL (``remote.py``), and their sizes and versions.

Descriptors are kept open, so that a file that is replaced by another one is still read as it was; a file that is
modified in place is recognized by its version.
"""

import functools
import io
import os
from collections.abc import Callable
from typing import NamedTuple

from clip_jax.storage import remote

Read = Callable[[int, int], bytes]
"""(offset, size) -> the bytes there; fewer only where the file ends."""

OPEN_FILES = 256
"""An evicted file stays open for the thread that reads it, until its last reference is gone."""


class Stat(NamedTuple):
    size: int
    """Size in bytes."""
    version: str
    """Changes whenever the content does: the time of the last change; of a remote file its generation or ETag."""


def stat(where: str) -> Stat:
    """The size and version of a file. Raises OSError, or UserError for a remote file."""
    if remote.is_remote(where):
        return Stat(*remote.stat(where))
    return _stat(os.stat(where))


def reader(where: str, expected: Stat | None = None, chunks: remote.Chunks | None = None) -> Read:
    """Reads any range of a file.

    With ``expected``, raises OSError, or UserError for a remote file, if it has changed since. ``chunks``: a cache for
    a remote file, which is then read in long pieces.
    """
    if remote.is_remote(where):
        end, version = expected or stat(where)

        def fetch(offset: int, size: int) -> bytes:
            size = min(size, end - offset)
            if size <= 0:
                return b""
            if chunks is None:
                return remote.read(where, offset, size, version)
            return chunks.read(where, offset, size, end, version)

        return fetch

    def read(offset: int, size: int) -> bytes:
        file = _open(where)
        if expected is not None and _stat(os.fstat(file.fileno())) != expected:
            _open.cache_clear()  # a file of the same name may be the expected one again
            raise OSError(f"{where} was changed while it was read; start again")
        return os.pread(file.fileno(), size, offset) if size > 0 else b""

    return read


def buffered(read: Read, window: int) -> Read:
    """A reader for small, ascending pieces, used by one thread: it reads at least ``window`` bytes at a time."""
    start, content = 0, b""

    def piece(offset: int, size: int) -> bytes:
        nonlocal start, content
        if not start <= offset <= offset + size <= start + len(content):
            start, content = offset, read(offset, max(size, window))
        return content[offset - start : offset - start + size]

    return piece


def binary_file(where: str) -> io.BufferedIOBase:
    """A file opened for reading, local or remote; a remote one is read in long pieces."""
    if not remote.is_remote(where):
        return open(where, "rb")
    found = stat(where)
    return io.BufferedReader(_File(reader(where, found), found.size), remote.CHUNK_BYTES)


class _File(io.RawIOBase):
    """Any ``Read`` as an unbuffered file of the standard library."""

    def __init__(self, read: Read, size: int):
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer) -> int:
        data = self._read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, str(found.st_mtime_ns))


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(where: str):
    return open(where, "rb", buffering=0)
