"""Records of ArrayRecord files behind a URL, by range reads; the array_record library opens local files only.

An ArrayRecord file is a Riegeli file (google/riegeli, ``riegeli_records_file_format.md``): chunks of records, with a
header of 24 bytes at every multiple of 64 KiB. Its footer, a chunk too, has the offset and the number of records of
every chunk; the last 64 KiB say where the footer is (google/array_record, ``layout.proto``). So a record takes one
request, for its chunk. The footers are read once and kept as a memory-mapped table in the cache folder: 16 bytes per
chunk.

Checksums (HighwayHash) are not compared: a chunk that cannot be decoded is reported as corrupted. Files that were
written with ``transpose`` are refused.
"""

import bisect
import hashlib
import itertools
import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources import identity
from clip_jax.errors import UserError
from clip_jax.storage import atomic, ranges
from clip_jax.storage.ranges import Read, Stat
from clip_jax.storage.remote import Chunks

BLOCK, BLOCK_HEADER = 1 << 16, 24
HEADER = struct.Struct("<8xQ8xQQ")
"""A chunk header: the size of its data, its type (8 bits) with its number of records (56), and their size."""
SIMPLE, TRANSPOSED = ord("r"), ord("t")
CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
MAGIC = 0x71930E704FDAE05E
MAX_BYTES = 1 << 30
"""The largest chunk that is read into memory."""
RULES = 1


class CorruptedError(RuntimeError):
    """As the library's error for a bad checksum: a RuntimeError whose text begins with "Corrupted"."""


class _File(NamedTuple):
    name: str
    size: int
    version: str
    chunks: int
    records: int
    end: int
    """The offset after the last chunk with records."""


@dataclass(frozen=True, eq=False)
class RangeRecords:
    """index -> bytes; safe to call from several threads."""

    files: tuple[_File, ...]
    first_chunks: tuple[int, ...] = field(repr=False)
    """The first chunk of each file, and the number of all."""
    rows: np.ndarray = field(repr=False)
    """int64[chunks, 2], memory-mapped: the offset of a chunk in its file, and its first record."""
    chunks: Chunks | None = field(repr=False, default=None)
    """The cache for long reads; None: each record is read on its own."""

    def __len__(self) -> int:
        return sum(file.records for file in self.files)

    def __getitem__(self, index: int) -> bytes:
        """Raises CorruptedError, OSError, and UserError for a server that does not answer."""
        number = int(np.searchsorted(self.rows[:, 1], index, side="right")) - 1
        offset, first = self.rows[number].tolist()
        position = bisect.bisect_right(self.first_chunks, number) - 1
        file = self.files[position]
        is_last = number + 1 == self.first_chunks[position + 1]
        end = file.end if is_last else int(self.rows[number + 1, 0])
        read = ranges.reader(file.name, Stat(file.size, file.version), self.chunks)
        found = decode(read(offset, end - offset), offset)
        if index - first >= len(found):
            raise CorruptedError(f"Corrupted chunk at byte {offset}: {len(found)} records")
        return found[index - first]

    @property
    def notes(self) -> tuple[str, ...]:
        """A note about records that are stored in groups, which are fetched together."""
        groups = self.first_chunks[-1]
        if len(self) <= groups:
            return ()
        mean = sum(file.end for file in self.files) / groups
        return (
            f"records are stored in groups of {len(self) / groups:.0f}, and one that is used costs the "
            f"{mean / 1024:.0f} KiB of its group: shuffle in blocks (config.data.shuffle_block), or write the files "
            "with group_size:1",
        )


def open_ranges(files: Sequence[str], *, long_reads: bool = False) -> RangeRecords:
    """The records of all files, in their order. Raises UserError."""
    with ThreadPoolExecutor(identity.THREADS) as pool:
        stats = list(pool.map(ranges.stat, files))
    known = [(file, *stat) for file, stat in zip(files, stats, strict=True)]
    content = json.dumps([known, RULES])
    folder = identity.cache_folder() / "array_record_index" / hashlib.sha256(content.encode()).hexdigest()[:24]
    if not folder.is_dir():
        _build(known, folder)
    table = tuple(_File(*entry) for entry in json.loads((folder / "files.json").read_text()))
    has_rows = any(file.chunks for file in table)
    return RangeRecords(
        files=table,
        first_chunks=tuple(itertools.accumulate((file.chunks for file in table), initial=0)),
        rows=np.memmap(folder / "rows", "<i8", "r").reshape(-1, 2) if has_rows else np.zeros((0, 2), np.int64),
        chunks=Chunks() if long_reads else None,
    )


def _build(known: list[tuple[str, int, str]], folder: Path) -> None:
    """Writes the table of all files; the first one stays, if several processes do so."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.first_folder(folder) as temporary:
        table, records = [], 0
        with ThreadPoolExecutor(identity.THREADS) as pool, open(temporary / "rows", "wb") as sink:
            for entry, (offsets, counts, end) in zip(known, pool.map(_footer, known), strict=True):
                firsts = records + np.cumsum(counts) - counts
                np.stack([offsets, firsts], axis=1).astype("<i8").tofile(sink)
                table.append(_File(*entry, len(counts), int(counts.sum()), end))
                records += table[-1].records
        (temporary / "files.json").write_text(json.dumps(table))


def _footer(entry: tuple[str, int, str]) -> tuple[np.ndarray, np.ndarray, int]:
    """The offset of each chunk of a file, its number of records, and the offset of the footer. Raises UserError."""
    name, size, version = entry
    read = ranges.reader(name, Stat(size, version))
    try:
        return read_footer(read, size)
    except (CorruptedError, ValueError, IndexError) as error:
        raise UserError(f"{name}: not an ArrayRecord file that can be read by range ({error})") from error


def read_footer(read: Read, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """int64[chunks] offsets, int64[chunks] numbers of records, and where the footer begins.

    Raises CorruptedError for what is no ArrayRecord file.
    """
    start = size - BLOCK
    if start <= 0 or size % BLOCK:
        raise CorruptedError(f"{size} bytes are not a number of blocks of 64 KiB")
    postscript = decode(read(start, BLOCK), start)  # the same message three times
    fields = varints(postscript[0]) if postscript else np.zeros(0, np.uint64)
    if len(fields) != 4 or int(fields[3]) != MAGIC or not 0 < int(fields[1]) < start:
        raise CorruptedError("no postscript at its end")
    footer = int(fields[1])
    _, *messages = decode(read(footer, start - footer), footer)
    # Every message has the same three fields, so that all of them together are rows of six numbers.
    rows = varints(b"".join(messages)).astype(np.int64).reshape(-1, 6)
    if (rows[:, [0, 2, 4]] != [1 << 3, 2 << 3, 3 << 3]).any():
        raise CorruptedError("unknown fields in its footer")
    offsets, counts = rows[:, 1], rows[:, 5]
    if (np.diff(offsets, append=footer) <= 0).any() or (counts <= 0).any():
        raise CorruptedError("chunks out of order in its footer")
    if len(offsets):
        first = int(offsets[0])
        if _header(read(first, BLOCK_HEADER + HEADER.size), first)[0] == TRANSPOSED:
            raise CorruptedError("it was written with transpose:true; write it with transpose:false")
    return offsets, counts, footer


def decode(raw: bytes, offset: int) -> list[bytes]:
    """The records of the chunk that begins with ``raw``, which is at ``offset`` in its file. Raises CorruptedError."""
    kind, count, size, decoded = _header(raw, offset)
    if kind != SIMPLE:
        raise CorruptedError(f"Corrupted chunk at byte {offset}: of type {kind}")
    data = _without_block_headers(raw, offset)[HEADER.size :][:size]
    try:
        if len(data) != size or decoded > MAX_BYTES or count > MAX_BYTES:
            raise ValueError(f"{len(data)} of {size} bytes, {count} records of {decoded} bytes")
        length = _varint_at(data, 1)
        start = 1 + length.bytes
        sizes = varints(_decompressed(data[0], data[start : start + length.value]))
        values = _decompressed(data[0], data[start + length.value :])
        ends = np.cumsum(sizes.astype(np.int64))
        if len(sizes) != count or len(values) != decoded or (ends[-1] if count else 0) != decoded or (ends < 0).any():
            raise ValueError(f"{len(sizes)} records of {len(values)} bytes, not {count} of {decoded}")
    except (ValueError, IndexError, OSError) as error:  # Arrow's errors are OSErrors and ValueErrors
        raise CorruptedError(f"Corrupted chunk at byte {offset}: {error}") from error
    bounds = [0, *ends.tolist()]
    return [values[first:last] for first, last in itertools.pairwise(bounds)]


def _header(raw: bytes, offset: int) -> tuple[int, int, int, int]:
    """Type, number of records, size of the data and size of the records of a chunk."""
    header = _without_block_headers(raw[: BLOCK_HEADER + HEADER.size], offset)[: HEADER.size]
    if len(header) < HEADER.size:
        raise CorruptedError(f"Corrupted chunk at byte {offset}: it ends in its header")
    size, kind_and_count, decoded = HEADER.unpack(header)
    return kind_and_count & 0xFF, kind_and_count >> 8, size, decoded


def _without_block_headers(raw: bytes, offset: int) -> bytes:
    """The bytes of a chunk alone."""
    pieces, position = [], 0
    while position < len(raw):
        if (offset + position) % BLOCK == 0:
            position += BLOCK_HEADER
        size = BLOCK - (offset + position) % BLOCK
        pieces.append(raw[position : position + size])
        position += size
    return b"".join(pieces)


def _decompressed(codec: int, data: bytes) -> bytes:
    """A buffer, which begins with its size where it is compressed. Raises ValueError or OSError."""
    if codec == 0:
        return data
    if codec not in CODECS:
        raise ValueError(f"unknown compression {codec}")
    import pyarrow as pa

    size = _varint_at(data, 0)
    if size.value > MAX_BYTES:
        raise ValueError(f"{size.value} bytes")
    return pa.decompress(data[size.bytes :], size.value, CODECS[codec], asbytes=True) if size.value else b""


class _Varint(NamedTuple):
    value: int
    bytes: int


def _varint_at(data: bytes, position: int) -> _Varint:
    value = shift = 0
    for count, byte in enumerate(data[position : position + 10], 1):
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return _Varint(value, count)
    raise ValueError("the chunk ends in a number")


def varints(data: bytes) -> np.ndarray:
    """uint64[n]: all numbers in a sequence of little-endian base-128 numbers. Raises ValueError."""
    digits = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(digits < 128)
    if len(digits) and (not len(ends) or ends[-1] != len(digits) - 1):
        raise ValueError("the data ends in a number")
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    if len(ends) and (ends - starts).max() >= 10:
        raise ValueError("a number of more than 64 bits")
    values = np.zeros(len(ends), np.uint64)
    for digit in range(10):
        at = starts + digit
        inside = at <= ends
        if not inside.any():
            break
        values[inside] |= (digits[at[inside]] & 127).astype(np.uint64) << np.uint64(7 * digit)
    return values
