"""Where the samples of tar shards are: 24 bytes per sample on disk, memory-mapped, made once.

A row is six block numbers (of 512 bytes): the sample's first header, the data of its members (0: it has none of the
kind) and its end. Nothing is in memory in proportion to samples; which rows are a shard's follows from the shards'
counts. The index lies in ``.clip_jax_index`` beside the shards, or in the user's cache folder where that cannot be
written (or ``CLIP_JAX_CACHE`` names one), under a hash of the shards' names, sizes and times: it cannot be found for a
shard that was changed. Then the headers of that shard alone are read again.

Reading a shard also makes the digest of what is in it: keys, folders, sizes, captions and sampled bytes of the images.
"""

import functools
import hashlib
import itertools
import json
import mmap
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from clip_jax.data.sources import identity, members, tar_headers
from clip_jax.data.sources.labels import Labels
from clip_jax.data.sources.left_out import LeftOut
from clip_jax.data.sources.members import KINDS
from clip_jax.data.sources.tar_headers import BLOCK, TarError
from clip_jax.data.valid_text import shown
from clip_jax.errors import UserError
from clip_jax.storage import atomic, ranges, remote
from clip_jax.storage.ranges import Read, Stat

COLUMNS = 2 + len(KINDS)
ROW = struct.Struct(f"<{COLUMNS}I")
RULES = 3
"""To be increased when the rules for pairs or the digest change: indexes with another number are not read."""

FOLDER = ".clip_jax_index"
THREADS = 16
WINDOW = 16 * 1024
"""Bytes read at a time where headers are: several small members, and little of a large image."""
REMOTE_WINDOW = 8 * 1024 * 1024
"""A remote shard is streamed once, in pieces."""


class Shard(NamedTuple):
    """The index's entry for a shard."""

    name: str
    """Relative to the folder of the first shard."""
    size: int
    version: str
    samples: int
    digest: str
    counts: tuple[int, ...]
    """Samples that have a member of each of KINDS, empty ones included."""
    left_out: dict[str, Any]
    """``LeftOut`` as JSON."""
    labels: Labels


class _Scanned(NamedTuple):
    """A member as ``members.pairs`` takes it, with what was read of it."""

    name: str
    regular: bool
    size: int
    header: tar_headers.Member
    sampled: str
    label: bytes


@dataclass(frozen=True)
class Index:
    shards: tuple[Shard, ...] = field(repr=False)
    starts: tuple[int, ...] = field(repr=False)
    """The first sample of each shard, and the number of all."""
    rows: np.ndarray = field(repr=False)
    """uint32[samples, COLUMNS], memory-mapped."""
    file: BinaryIO = field(repr=False)
    """The same rows."""

    def __len__(self) -> int:
        return self.starts[-1]

    def row(self, i: int) -> tuple[int, ...]:
        """The row of a sample, by a read: the first touch of a page through the map is a page fault, which takes longer
        (on a busy machine ten times as long) and adds the page to this process's memory."""
        return ROW.unpack(os.pread(self.file.fileno(), ROW.size, range(len(self))[i] * ROW.size))

    def having(self, kind: str) -> int:
        """Samples with a member of this kind."""
        return sum(shard.counts[KINDS.index(kind)] for shard in self.shards)

    def left_out(self) -> LeftOut:
        """The members of all shards that are not part of a pair."""
        found = LeftOut()
        for shard in self.shards:
            found.update(LeftOut.from_json(shard.left_out))
        return found

    def labels(self) -> Labels:
        """The statistics of all labels."""
        return functools.reduce(Labels.with_labels, (shard.labels for shard in self.shards), Labels())


def open_index(shards: Sequence[str], truncated: str) -> Index:
    """The index of these shards, in their order; made where there is none yet. Raises UserError."""
    with ThreadPoolExecutor(THREADS) as pool:
        stats = list(pool.map(ranges.stat, shards))
    if remote.is_remote(shards[0]):
        folder, names = shards[0].rpartition("/")[0], shards
    else:
        folder = os.path.dirname(os.path.abspath(shards[0]))
        names = [shard if remote.is_remote(shard) else os.path.relpath(shard, folder) for shard in shards]
    known = [(name, *stat) for name, stat in zip(names, stats, strict=True)]
    name = hashlib.sha256(json.dumps([known, truncated, RULES]).encode()).hexdigest()[:24]
    folders = _folders(folder)
    for parent in folders:
        if (parent / name).is_dir():
            return load(parent / name)
    return _build(shards, known, truncated, folders, name)


def load(folder: Path) -> Index:
    """An index from its folder."""
    entries = [Shard(*entry) for entry in json.loads((folder / "shards.json").read_text())]
    table = [entry._replace(counts=tuple(entry.counts), labels=Labels(*entry.labels)) for entry in entries]
    starts = tuple(itertools.accumulate((shard.samples for shard in table), initial=0))
    # Single rows are read from this file, so it stays open for the lifetime of the index.
    file = open(folder / "rows", "rb", buffering=0)  # noqa: SIM115
    # An empty file cannot be mapped; an index without samples is never written.
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # A shuffled run reads single rows: read ahead, each would cost a millisecond instead of five microseconds.
    mapped.madvise(mmap.MADV_RANDOM)
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return Index(tuple(table), starts, np.frombuffer(mapped, "<u4").reshape(-1, COLUMNS), file)


def _folders(folder: str) -> list[Path]:
    """Folders for the indexes of shards in ``folder``, the best first."""
    cache = identity.cache_folder() / "tar_index" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]
    return [cache] if os.environ.get("CLIP_JAX_CACHE") or remote.is_remote(folder) else [Path(folder) / FOLDER, cache]


def _build(shards: Sequence[str], known: list[tuple], truncated: str, folders: list[Path], name: str) -> Index:
    """Writes the index; rows of shards that did not change are taken from earlier indexes.

    Other processes may do so at the same time; the first index stays.
    """
    parent = _writable(folders)
    earlier = _earlier(folders)
    unknown = [shard for shard, entry in zip(shards, known, strict=True) if (*entry, truncated) not in earlier]
    if len(unknown) > THREADS:
        print(f"reading the headers of {len(unknown)} shards, once; the index goes to {parent}", flush=True)

    def scan(shard: str, entry: tuple) -> tuple[Shard, np.ndarray]:
        return earlier.get((*entry, truncated)) or _scan(shard, *entry, truncated)

    with atomic.first_folder(parent / name) as temporary:
        with ThreadPoolExecutor(THREADS) as pool, open(temporary / "rows", "wb") as file:
            table = []
            for shard, rows in pool.map(scan, shards, known):
                table.append(shard)
                rows.tofile(file)
        if not any(shard.samples for shard in table):
            reasons = "".join(f"; {note}" for shard in table[:4] for note in LeftOut.from_json(shard.left_out).notes())
            raise UserError(
                f"{shards[0]}: no samples (an image with a .txt, .json or .cls of the same name) in the shards{reasons}"
            )
        (temporary / "shards.json").write_text(json.dumps(table))
        (temporary / "rules.json").write_text(json.dumps([truncated, RULES]))
    return load(parent / name)


def _writable(folders: list[Path]) -> Path:
    for folder in folders[:-1]:
        existing = folder if folder.is_dir() else folder.parent
        # Without the bits a folder is meant to stay as it is, even where root could write to it.
        if existing.stat().st_mode & 0o222 and os.access(existing, os.W_OK):
            try:
                folder.mkdir(exist_ok=True)
                return folder
            except OSError:  # a file system that is mounted read-only
                continue
    try:
        folders[-1].mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folders[-1]}: the index of the shards cannot be written there ({error.strerror}); "
            "set CLIP_JAX_CACHE to a folder that can be written"
        ) from error
    return folders[-1]


def _earlier(folders: list[Path]) -> dict[tuple, tuple[Shard, np.ndarray]]:
    """(name, size, version, truncated) -> what an earlier index of the same folder has of that shard."""
    found = {}
    for rules in (path for parent in folders if parent.is_dir() for path in parent.glob("*/rules.json")):
        truncated, number = json.loads(rules.read_text())
        if number != RULES:
            continue
        index = load(rules.parent)
        for shard, start in zip(index.shards, index.starts, strict=False):
            found[shard.name, shard.size, shard.version, truncated] = shard, index.rows[start : start + shard.samples]
    return found


def _scan(shard: str, name: str, size: int, version: str, truncated: str) -> tuple[Shard, np.ndarray]:
    """The entry and the rows of one shard."""
    if size > BLOCK * 2**32:
        raise UserError(f"{shard}: larger than 2 TiB; split it")
    window = REMOTE_WINDOW if remote.is_remote(shard) else WINDOW
    read = ranges.buffered(ranges.reader(shard, Stat(size, version)), window)
    problem = ""
    try:
        scanned = _members(read)
    except _CutError as error:
        scanned, problem = error.before, str(error)
    end = scanned[-1].header.offset + scanned[-1].size if scanned else 0
    if not scanned:
        problem = f"not a tar file ({_reason(read, size, problem)})"
    elif problem or end > size or any(read(max(0, size - 2 * BLOCK), 2 * BLOCK)):
        # A file that ends between two members is no complete one, which ends with blocks of zeros.
        problem = f"truncated at byte {size}"
    if problem and truncated == "stop":
        raise UserError(
            f"{shard}: {problem}; download it again or remove it, or set config.data.truncated=keep to use "
            f"{'the samples before the cut' if scanned else 'the other shards'}"
        )
    if ranges.stat(shard) != Stat(size, version):
        raise UserError(f"{shard}: was changed while it was read; wait until it is written, and start again")
    groups, left_out = members.pairs((m for m in scanned if m.header.offset + m.size <= size), os.path.basename(name))
    if problem:
        left_out.other("shards that are truncated or no tar files, with what is after the cut", shown(name))
    rows, digest = np.zeros((len(groups), COLUMNS), "<u4"), hashlib.sha256()
    for row, group in zip(rows, groups, strict=True):
        headers = [member.header for member in group.members.values()]
        row[0], row[-1] = min(m.start for m in headers) // BLOCK, max(m.end for m in headers) // BLOCK
        for kind, member in group.members.items():
            row[1 + KINDS.index(kind)] = member.header.offset // BLOCK
            digest.update(f"{kind} {member.header.offset} {member.size} {member.sampled}\n".encode())
        digest.update(group.key.encode("utf-8", "surrogateescape") + b"\n")
    counts = tuple(sum(kind in group.members for group in groups) for kind in KINDS)
    labels = members.labels(groups, os.path.basename(name), lambda member: member.label)
    known = Shard(name, size, version, len(rows), digest.hexdigest()[:24], counts, left_out.to_json(), labels)
    return known, rows


class _CutError(Exception):
    """The members of a shard before the byte where it is damaged."""

    def __init__(self, reason: str, before: list[_Scanned]):
        super().__init__(reason)
        self.before = before


def _members(read: Read) -> list[_Scanned]:
    """All members but folders; what may be of a pair is read. Raises _CutError."""
    found: list[_Scanned] = []
    try:
        for member in tar_headers.members(read):
            if not member.name.endswith("/"):
                _, kind = members.split(member.name)
                wanted = kind and member.regular and member.size <= members.MAX_BYTES
                sampled = identity.sampled(read, member.size, 3, member.offset) if wanted else ""
                label = read(member.offset, min(member.size, 32)) if wanted and kind == "cls" else b""
                found.append(_Scanned(member.name, member.regular, member.size, member, sampled, label))
    except TarError as error:
        raise _CutError(str(error), found) from error
    return found


def _reason(read: Read, size: int, problem: str) -> str:
    if not size:
        return "it is empty"
    if read(0, 4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
        return "it is compressed: decompress it"
    return problem or "it has no files"
