"""The headers of a tar file, read by range: what is in it and where, without extracting anything.

A header is a block of 512 bytes before the data of its member (POSIX.1-2001, ustar). Names that do not fit are in a
member of their own before it, in POSIX's format (``x``) or GNU's (``L``). Python's ``tarfile`` reads the same, more
slowly, and needs a file.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from clip_jax.storage.ranges import Read

BLOCK = 512
ZEROS = bytes(BLOCK)
REGULAR = (b"0", b"\0", b"7")
MAX_NAME_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 50
"""A header may name any size, and offsets have 64 bits."""


class Member(NamedTuple):
    name: str
    regular: bool
    """Whether it is a file, and not a folder, link or device."""
    start: int
    """Offset of its first header, in bytes."""
    offset: int
    """Offset of its data."""
    size: int

    @property
    def end(self) -> int:
        """The offset of the next header."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class TarError(Exception):
    """Bytes that are not a header, or a file that ends in the middle of one."""


def members(read: Read, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """The members from ``start`` up to the end of the archive (a block of zeros, or the file's end) or ``stop``.

    Raises TarError.
    """
    first, offset, longer = start, start, {}
    while stop is None or offset < stop:
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            if header:
                raise TarError(f"the file ends in a header at byte {offset}")
            return
        if header == ZEROS:
            return
        kind, size = header[156:157], _number(header[124:136], offset)
        checksum, found = _number(header[148:156], offset), _checksum(header)
        if checksum != found and checksum != found - 256 * _negative_bytes(header):
            raise TarError(f"no tar header at byte {offset}")
        offset += BLOCK
        if kind in (b"x", b"L", b"g", b"K"):
            if kind in (b"x", b"L") and size <= MAX_NAME_BYTES:
                data = read(offset, size)
                longer |= _records(data) if kind == b"x" else {"path": data.partition(b"\0")[0]}
            offset += -(-min(size, MAX_FILE_BYTES) // BLOCK) * BLOCK
            continue
        if "size" in longer:
            size = int(longer["size"])
        if size > MAX_FILE_BYTES:
            raise TarError(f"a member of {size} bytes at byte {first}")
        name = longer["path"] if "path" in longer else _name(header)
        yield (found := Member(name.decode("utf-8", "surrogateescape"), kind in REGULAR, first, offset, size))
        # Links and devices may give the size of what they stand for; they have no data.
        first = offset = found.end if kind in REGULAR else offset + (-(-size // BLOCK) * BLOCK if kind > b"7" else 0)
        longer = {}


def _checksum(header: bytes) -> int:
    """The sum of all bytes, its own field counted as spaces."""
    # The lower half of Adler-32 is one more than the sum, as long as that is below 65,521: of up to 256 bytes.
    halves = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    return 8 * 32 + halves - sum(header[148:156])


def _negative_bytes(header: bytes) -> int:
    """The number of bytes that old programs with signed bytes counted as 256 less."""
    return sum(b > 127 for b in header[:148] + header[156:])


def _number(field: bytes, offset: int) -> int:
    """Octal digits; or binary, where the first bit is set (GNU, for sizes from 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise TarError(f"no tar header at byte {offset}") from error


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _records(data: bytes) -> dict[str, bytes]:
    """POSIX's ``length key=value`` lines: those that say where a member is."""
    found, position = {}, 0
    while position < len(data):
        digits, _, _ = data[position : position + 20].partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        key, _, value = data[position + len(digits) + 1 : position + int(digits) - 1].partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit()):
            found[key.decode()] = value
        position += int(digits)
    return found
