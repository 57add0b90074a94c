"""webdataset / img2dataset tar shards by random access, over an index that is built once and memory-mapped.

A sample is the members with one key: ``000.jpg``, ``000.txt``, ``000.json``, ``000.cls`` (``members.py``). Members of
other kinds are counted and not read, and nothing is ever extracted or unpickled. The index has the offset and size of
each member; it is stored in the user's cache folder under a hash of the shards' names, sizes and times.

Faults: a missing or truncated shard stops the run before it starts (``truncated="keep"`` uses the samples before
the cut, and none of a file that is no shard); an empty caption or a broken image is a fault of its sample alone and
is raised as BadSampleError.
"""

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from clip_jax.data.sources import captions, labels, members
from clip_jax.data.sources.labels import Labels
from clip_jax.data.sources.left_out import MAX_SHARE, LeftOut
from clip_jax.data.sources.members import KINDS, Member
from clip_jax.data.sources.paths import expand
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.data.valid_text import shown
from clip_jax.errors import UserError

RULES = 2
"""Raised when other members make a sample: older indexes are then not read."""

# Offset and size of each member of one sample; size -1: the sample has no such member.
ENTRY = np.dtype([("shard", "<i4"), *((f"{kind}_{what}", "<i8") for kind in KINDS for what in ("offset", "size"))])
TRIED = 32
"""Samples, spread over all of them, in whose JSON a field must have text once."""


@dataclass(frozen=True)
class TarSource:
    """Samples of a list of tar shards, in the order of the shards and of the members inside them."""

    name: str
    fingerprint: str
    shards: tuple[Path, ...]
    caption: str
    """``txt``, ``txt_lines``, or a dotted path into the sample's JSON such as ``caption`` or ``captions.de``."""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    index: np.ndarray = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        key, label = self.key(i), labels.parse(self.member(i, "cls")) if self.class_names else -1
        return Sample(self.member(i, "image"), self._captions(i, key, label), key, label)

    def key(self, i: int) -> str:
        """Shard and name of the image."""
        shard = self.shards[self.index[i]["shard"]]
        name = members.name_of(partial(_read, shard), int(self.index[i]["image_offset"]))
        return f"{shown(shard.name)}/{name}"

    def member(self, i: int, kind: str) -> bytes:
        """The content of one member, empty where the sample has none of this kind. Raises OSError."""
        entry = self.index[i]
        size, offset = int(entry[f"{kind}_size"]), int(entry[f"{kind}_offset"])
        data = _read(self.shards[entry["shard"]], offset, size) if size > 0 else b""
        if len(data) != max(size, 0):  # the shard was changed after it was opened
            raise OSError(f"{self.shards[entry['shard']]}: {len(data)} of {size} bytes at {offset}")
        return data

    def _captions(self, i: int, key: str, label: int) -> tuple[str, ...]:
        try:
            if captions.is_json(self.caption):
                found = captions.from_json(self.member(i, "json") or b"{}", self.caption)
            else:
                found = captions.from_text(self.member(i, "txt"), self.caption)
        except ValueError as error:
            raise BadSampleError(f"unreadable caption ({type(error).__name__})", key) from error
        if not found and label < 0:
            raise BadSampleError("empty caption", key)
        return found or (self.class_names[label],)


def open_tar(
    where: str, *, caption: str = captions.TXT, truncated: str = "stop", max_bad_share: float = MAX_SHARE
) -> TarSource:
    """Shards by a glob pattern, a folder of .tar files, or several of these separated by commas.

    Raises UserError for missing or broken shards, labels or captions, and for too many incomplete pairs.
    """
    shards = expand(where)
    files = [(str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    cached = hashlib.sha256(json.dumps([files, truncated, RULES]).encode()).hexdigest()[:24]
    folder = _cache_folder() / cached
    if not (folder / "index.npy").exists():
        _build(shards, truncated, folder)
    index = np.load(folder / "index.npy", mmap_mode="r")
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    left_out = LeftOut.from_json(facts["left_out"])
    left_out.check(f"tar:{where}", len(index), max_bad_share)
    # Names and sizes, but no times or folders: a copy of the shards is the same data.
    content = hashlib.sha256(json.dumps([[Path(f).name, size] for f, size, _ in files]).encode())
    content.update(np.int64(len(index)).tobytes() + caption.encode())
    source = TarSource(f"tar:{where}", content.hexdigest()[:16], tuple(shards), caption, (), left_out.notes(), index)
    folders = sorted({shard.parent for shard in shards})
    class_names, more = labels.class_names(where, folders, Labels(*facts["labels"]), len(index))
    source = replace(source, class_names=class_names, notes=(*source.notes, *more))
    _check_captions(where, source)
    return source


def _check_captions(where: str, source: TarSource) -> None:
    """Raises UserError where no sample can have a caption by the setting; with labels there is the class name."""
    index, json_samples = source.index, np.flatnonzero(source.index["json_size"] > 0)
    tried = json_samples[np.linspace(0, len(json_samples) - 1, min(TRIED, len(json_samples)), dtype=int)]
    if captions.is_json(source.caption):
        if len(tried):
            captions.check_path(where, source.caption, (source.member(i, "json") for i in tried))
        elif not source.class_names:
            raise UserError(f"{where}: config.data.caption={source.caption}, and no sample has a .json")
    elif not source.class_names and not (index["txt_size"] >= 0).any():
        found = sorted({name for i in tried[:4] for name in captions.fields(source.member(i, "json"))})
        way_out = "set config.data.caption to a path in the .json" + (f" ({', '.join(found)})" if found else "")
        if not len(tried):
            way_out = (
                f"samples have labels: write {source.shards[0].parent / labels.FILE}, the name of a class per line"
            )
        raise UserError(f"{where}: no sample has a .txt caption; {way_out}")


def _cache_folder() -> Path:
    base = (
        os.environ.get("CLIP_JAX_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip_jax"
    )
    return Path(base) / "tar_index"


def _build(shards: list[Path], truncated: str, folder: Path) -> None:
    """Reads the headers of all shards and writes the index.

    Other processes may do so at the same time. The first index stays: a file that a process on another machine has
    mapped must not be replaced on a network file system.
    """
    scanned, left_out, found_labels = [], LeftOut(), Labels()
    for number, shard in enumerate(shards):
        entries, more, more_labels = _scan(shard, number, truncated)
        scanned.append(entries)
        left_out.update(more)
        found_labels = found_labels.with_labels(more_labels)
    entries = np.concatenate(scanned)
    if not len(entries):
        reasons = "".join(f"; {note}" for note in left_out.notes())
        raise UserError(
            f"{shards[0]}: no samples (an image with a .txt, .json or .cls of the same name) in the shards{reasons}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        np.save(temporary / "index.npy", entries)
        facts = {"left_out": left_out.to_json(), "labels": found_labels}
        (temporary / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, and its index is the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scan(shard: Path, number: int, truncated: str) -> tuple[np.ndarray, LeftOut, Labels]:
    """ENTRY[samples] of one shard, what is left out of it, and its labels."""
    found: list[Member] = []
    problem, size = "", shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                if not entry.isdir():
                    # A sparse file lies in the shard in pieces, so it is no more a file than a link.
                    regular = entry.isreg() and not entry.issparse()
                    found.append(Member(entry.name, regular, entry.offset_data, entry.size if regular else 0))
        # tarfile accepts a file that ends between two members; a complete one ends with blocks of zeros.
        if (found and found[-1].offset + found[-1].size > size) or not _ends_with_zeros(shard, size):
            problem = f"truncated at byte {size}"
    except tarfile.TarError as error:
        problem = f"truncated at byte {size}" if found else f"not a tar file ({_reason(shard, size, error)})"
    if problem and truncated == "stop":
        raise UserError(
            f"{shard}: {problem}; download it again or remove it, or set config.data.truncated=keep to use "
            f"{'the samples before the cut' if found else 'the other shards'}"
        )
    groups, left_out = members.pairs((member for member in found if member.offset + member.size <= size), shard.name)
    if problem:
        left_out.other("shards that are truncated or no tar files, with what is after the cut", shown(shard.name))
    absent = Member("", False, 0, -1)
    places = [[group.members.get(kind, absent)[2:] for kind in KINDS] for group in groups]
    rows = [(number, *(value for place in sample for value in place)) for sample in places]
    found_labels = members.labels(groups, shard.name, lambda member: _read(shard, member.offset, member.size))
    return np.array(rows, ENTRY), left_out, found_labels


def _reason(shard: Path, size: int, error: tarfile.TarError) -> str:
    if not size:
        return "it is empty"
    with open(shard, "rb") as file:
        compressed = file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
    return "it is compressed: decompress it" if compressed else str(error)


def _ends_with_zeros(shard: Path, size: int) -> bool:
    with open(shard, "rb") as file:
        file.seek(max(0, size - 1024))
        return not any(file.read())


@lru_cache(maxsize=256)  # an evicted file stays open for the thread that reads it, until its last reference is gone
def _open(shard: Path):
    return open(shard, "rb", buffering=0)


def _read(shard: Path, offset: int, size: int) -> bytes:
    return os.pread(_open(shard).fileno(), size, offset)
