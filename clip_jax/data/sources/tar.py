"""webdataset / img2dataset tar shards by random access, over an index that is made once and memory-mapped.

A sample is the members with the same name before the first dot: ``000.jpg``, ``000.txt``, ``000.json``, ``000.cls``.
Members of other kinds are not read, and nothing is ever extracted or unpickled. ``tar_index.py`` has the places of the
members, ``tar_headers.py`` reads them.

Faults: a missing or truncated shard stops the run before it starts (``truncated="keep"`` uses the samples before
the cut); an empty caption or a broken image is a fault of its sample alone and is raised as BadSampleError.
"""

import bisect
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip_jax.data.sources import captions, patterns, tar_headers, tar_index
from clip_jax.data.sources.captions import Captions
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.data.sources.tar_headers import BLOCK
from clip_jax.data.sources.tar_index import KINDS, Index
from clip_jax.errors import UserError
from clip_jax.storage import ranges
from clip_jax.storage.ranges import Read, Stat
from clip_jax.storage.remote import Chunks

TEXT = ("txt", "lines")
"""Caption fields that are the .txt; all others are in the .json."""

AT_ONCE_BYTES = 16 * 1024 * 1024
"""A sample is read in one piece, unless its members are farther apart than this."""


@dataclass(frozen=True)
class TarSource:
    """Samples of a list of tar shards, in the order of the shards and of the members inside them."""

    name: str
    fingerprint: str
    former_fingerprint: str
    shards: tuple[str, ...]
    """Paths or URLs."""
    captions: tuple[captions.Field, ...]
    class_names: tuple[str, ...] = ()
    index: Index = field(repr=False, default=None)
    chunks: Chunks | None = field(repr=False, default=None)
    """Where remote shards are read in long pieces."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        start, *members, end = self.index.rows[i].tolist()
        number = bisect.bisect_right(self.index.starts, i) - 1
        shard, known = self.shards[number], self.index.shards[number]
        read = ranges.reader(shard, Stat(known.size, known.version), self.chunks)
        wanted = {kind: block * BLOCK for kind, block in zip(KINDS, members, strict=True) if block}
        name, data = _read_members(read, start * BLOCK, end * BLOCK, wanted)
        key = f"{shard.rpartition('/')[2]}/{os.path.splitext(name.removeprefix('./'))[0]}"
        found = self._captions(data, key)
        label = int(data["cls"]) if self.class_names else -1
        return Sample(data["image"], found.texts, key, label, shares=found.shares)

    def _captions(self, data: dict[str, bytes], key: str) -> Captions:
        def field(name: str) -> Any:
            if name not in TEXT:
                return captions.path(about, name)
            text = data.get("txt", b"").decode()
            if not text and self.class_names:
                return self.class_names[int(data["cls"])]
            return text.splitlines() if name == "lines" else text

        try:
            needs_json = any(name not in TEXT for name, _ in self.captions)
            about = json.loads(data.get("json") or b"{}") if needs_json else {}
            found = captions.gather(self.captions, field)
        except (UnicodeDecodeError, json.JSONDecodeError, ValueError, IndexError) as error:
            raise BadSampleError(f"unreadable caption ({type(error).__name__})", key) from error
        if not found.texts:
            raise BadSampleError("empty caption", key)
        return found


def open_tar(where: str, *, caption: str = "txt", truncated: str = "stop", long_reads: bool = False) -> TarSource:
    """Shards by the names that ``patterns.py`` takes; ``caption`` as in ``captions.py``.

    ``long_reads``: neighbors are read together, so that a remote shard is read in long pieces.
    """
    wanted = captions.fields(caption)
    shards = patterns.files(where, (".tar",))
    index = tar_index.open_index(shards, truncated)
    class_names = ()
    if index.having("labels") == len(index):
        class_names = _class_names(f"{os.path.dirname(shards[0]) or '.'}/classnames.txt")
    beside = all(field.name in TEXT for field in wanted)
    if beside and not class_names and not index.having("txt"):
        raise UserError(f"{where}: no sample has a .txt caption; set config.data.caption to a path in the .json")
    # What is in the shards, not where they are or how they are called: a copy is the same data.
    content = json.dumps([[shard.digest for shard in index.shards], caption, class_names])
    return TarSource(
        name=f"tar:{where}",
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:24],
        former_fingerprint=_former_fingerprint(shards, index, caption),
        shards=tuple(shards),
        captions=wanted,
        class_names=class_names,
        index=index,
        chunks=Chunks() if long_reads else None,
    )


def _class_names(file: str) -> tuple[str, ...]:
    """The lines of ``classnames.txt``; empty where there is none."""
    try:
        found = ranges.stat(file)
    except (FileNotFoundError, UserError):
        return ()
    return tuple(ranges.reader(file, found)(0, found.size).decode().splitlines())


def _former_fingerprint(shards: list[str], index: Index, caption: str) -> str:
    """As in the ``run.json`` of older code: names and sizes of the shards, and the number of samples."""
    files = [[os.path.basename(os.path.realpath(s)), known.size] for s, known in zip(shards, index.shards, strict=True)]
    content = hashlib.sha256(json.dumps(files).encode())
    content.update(np.int64(len(index)).tobytes() + caption.encode())
    return content.hexdigest()[:16]


def _read_members(read: Read, start: int, end: int, wanted: dict[str, int]) -> tuple[str, dict[str, bytes]]:
    """The name of the sample's image and the data of its members, whose offsets are given.

    Raises OSError where they are not there: the shard was changed after it was opened.
    """
    if end - start <= AT_ONCE_BYTES:
        held = read(start, end - start)
        pieces = [(start, len(held))]

        def at(offset: int, size: int) -> bytes:
            return held[offset - start : offset - start + size]

    else:  # in two groups, all images and then all captions
        at, pieces = read, [(offset - BLOCK, BLOCK) for offset in wanted.values()]
    name, found, kinds = "", {}, {offset: kind for kind, offset in wanted.items()}
    try:
        for first, size in pieces:
            for member in tar_headers.members(at, first, first + size):
                kind = kinds.get(member.offset)
                if kind is None:
                    continue
                found[kind] = at(member.offset, member.size)
                if len(found[kind]) != member.size:
                    raise OSError(f"{len(found[kind])} of {member.size} bytes at {member.offset}")
                name = member.name if kind == "image" else name
    except tar_headers.TarError as error:
        raise OSError(str(error)) from error
    if len(found) != len(wanted):
        raise OSError(f"no {' and no '.join(sorted(wanted.keys() - found.keys()))} at byte {start}")
    return name, found
