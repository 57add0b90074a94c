"""webdataset / img2dataset tar shards by random access, over an index that is made once and memory-mapped.

A sample is the members with one key: ``000.jpg``, ``000.txt``, ``000.json``, ``000.cls`` (``members.py``). Members of
other kinds are counted and not read, and nothing is ever extracted or unpickled. ``tar_index.py`` has the offsets of
the members, ``tar_headers.py`` reads them.

Faults: a missing or truncated shard stops the run before it starts (``truncated="keep"`` uses the samples before
the cut, and none of a file that is no shard); an empty caption or a broken image is a fault of its sample alone and
is raised as BadSampleError.
"""

import bisect
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from clip_jax.data.sources import boxes as box_files
from clip_jax.data.sources import captions, labels, patterns, tar_headers, tar_index
from clip_jax.data.sources.captions import Captions
from clip_jax.data.sources.left_out import MAX_SHARE
from clip_jax.data.sources.members import KINDS
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.data.sources.tar_headers import BLOCK
from clip_jax.data.sources.tar_index import Index
from clip_jax.data.valid_text import shown
from clip_jax.errors import UserError, nearest
from clip_jax.storage import ranges
from clip_jax.storage.ranges import Read, Stat
from clip_jax.storage.remote import Chunks

AT_ONCE_BYTES = 16 * 1024 * 1024
"""A sample is read in one piece, unless its members are farther apart than this."""
TRIED = 32
"""Samples, spread over all of them, in whose JSON a field must have text once."""


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
    notes: tuple[str, ...] = ()
    boxes: str = ""
    """A dotted path in the JSON; empty: boxes are not read."""
    index: Index = field(repr=False, default=None)
    chunks: Chunks | None = field(repr=False, default=None)
    """The cache for long reads of remote shards; None: each sample is read on its own."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        key, data = self.read(i)
        label = labels.parse(data["cls"]) if self.class_names else -1
        found = self._captions(data, key, label)
        extras = {"boxes": self._boxes(data, key)} if self.boxes else {}
        return Sample(data["image"], found.texts, key, label, extras, found.shares)

    def read(self, i: int) -> tuple[str, dict[str, bytes]]:
        """Shard and name of the image; and the sample's members by kind. Raises OSError."""
        start, *members, end = self.index.row(i)
        number = bisect.bisect_right(self.index.starts, i) - 1
        shard, known = self.shards[number], self.index.shards[number]
        read = ranges.reader(shard, Stat(known.size, known.version), self.chunks)
        wanted = {kind: block * BLOCK for kind, block in zip(KINDS, members, strict=True) if block}
        name, data = _read_members(read, start * BLOCK, end * BLOCK, wanted)
        return f"{shown(os.path.basename(shard))}/{shown(name.removeprefix('./'))}", data

    def _captions(self, data: dict[str, bytes], key: str, label: int) -> Captions:
        try:
            found = captions.of_files(self.captions, data.get("txt", b""), data.get("json", b""))
        except ValueError as error:
            raise BadSampleError(f"unreadable caption ({type(error).__name__})", key) from error
        if not found.texts and label < 0:
            raise BadSampleError("empty caption", key)
        return found if found.texts else Captions((self.class_names[label],), ())

    def _boxes(self, data: dict[str, bytes], key: str) -> tuple[box_files.Box, ...]:
        try:
            about = json.loads(data.get("json", b"{}"))
        except ValueError as error:
            raise BadSampleError("unreadable JSON", key) from error
        return box_files.parse(captions.at(about, self.boxes), key)


def open_tar(
    where: str,
    *,
    caption: str = captions.TXT,
    truncated: str = "stop",
    max_bad_share: float = MAX_SHARE,
    long_reads: bool = False,
    boxes: str = "",
    class_names: Sequence[str] | None = None,
) -> TarSource:
    """Shards by the names that ``patterns.py`` takes; ``caption`` as in ``captions.py``, ``boxes`` a path in the JSON.

    ``long_reads``: neighbors are read together, so that a remote shard is read in long pieces. ``class_names``: what
    the labels count, in place of a ``classnames.txt`` beside the shards; then every sample needs a label.

    Raises UserError for missing or broken shards, labels or captions, and for too many incomplete pairs.
    """
    wanted = captions.fields(caption)
    shards = patterns.files(where, (".tar",))
    index = tar_index.open_index(shards, truncated)
    left_out = index.left_out()
    left_out.check(f"tar:{where}", len(index), max_bad_share)
    folders = sorted({os.path.dirname(shard) for shard in shards})
    names, more = labels.class_names(where, folders, index.labels(), len(index), class_names)
    # What is in the shards, not where they are or how they are called: a copy is the same data.
    content = json.dumps([[shard.digest for shard in index.shards], caption, names, *([boxes] if boxes else [])])
    source = TarSource(
        name=f"tar:{where}",
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:24],
        former_fingerprint=_former_fingerprint(shards, index, caption),
        shards=tuple(shards),
        captions=wanted,
        class_names=names,
        notes=(*left_out.notes(), *more),
        boxes=boxes,
        index=index,
        chunks=Chunks() if long_reads else None,
    )
    if boxes:
        _check_boxes(where, source)
    return dataclasses.replace(source, notes=(*source.notes, *_check_captions(where, source)))


def _tried(source: TarSource, count: int) -> Iterator[bytes]:
    """The JSON of some samples, spread over all of them."""
    for i in np.unique(np.linspace(0, len(source) - 1, count, dtype=np.int64)):
        _, data = source.read(int(i))
        if "json" in data:
            yield data["json"]


def _check_boxes(where: str, source: TarSource) -> None:
    """Raises UserError if none of the samples that are tried has the field."""
    files = list(_tried(source, TRIED))
    if not any(captions.has(data, source.boxes) for data in files):
        there = sorted({name for data in files for name in captions.lists(data)})
        way_out = f"; lists there are {', '.join(there)}" if there else ""
        raise UserError(
            f"{where}: config.data.boxes={source.boxes}: none of the {len(files)} .json that were tried has this field"
            f"{nearest(source.boxes, there)}{way_out}"
        )


def _check_captions(where: str, source: TarSource) -> tuple[str, ...]:
    """Notes; UserError where no sample can have a caption by the setting. With labels there is the class name."""
    index = source.index
    files = {field: "txt" if field.name in captions.TEXT_FILE else "json" for field in source.captions}
    wanted = [field for field in source.captions if index.having(files[field])]
    if any(files[field] == "json" for field in wanted):
        return captions.check_paths(where, wanted, _tried(source, TRIED))
    if wanted:
        return ()
    if source.class_names:
        return (f"captions are the names of the {len(source.class_names)} classes",)
    if "txt" not in files.values():
        names = ", ".join(field.name for field in source.captions)
        raise UserError(f"{where}: config.data.caption={names}, and no sample has a .json")
    found = sorted({name for data in _tried(source, 4) for name in captions.paths(data)})
    way_out = "set config.data.caption to a path in the .json" + (f" ({', '.join(found)})" if found else "")
    if not index.having("json"):
        file = os.path.join(os.path.dirname(source.shards[0]), labels.FILE)
        way_out = f"samples have labels: write {file}, the name of a class per line"
    raise UserError(f"{where}: no sample has a .txt caption; {way_out}")


def _former_fingerprint(shards: list[str], index: Index, caption: str) -> str:
    """The fingerprint in the ``run.json`` of older code: names and sizes of the shards, and the number of samples."""
    files = [[os.path.basename(os.path.realpath(s)), known.size] for s, known in zip(shards, index.shards, strict=True)]
    content = hashlib.sha256(json.dumps(files).encode())
    content.update(np.int64(len(index)).tobytes() + caption.encode())
    return content.hexdigest()[:16]


def _read_members(read: Read, start: int, end: int, wanted: dict[str, int]) -> tuple[str, dict[str, bytes]]:
    """The name of the sample's image and the data of its members, whose offsets are given.

    Raises OSError if they are not there: the shard was changed after it was opened.
    """
    if end - start <= AT_ONCE_BYTES:
        content = read(start, end - start)
        pieces = [(start, len(content))]

        def at(offset: int, size: int) -> bytes:
            return content[offset - start : offset - start + size]

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
