"""Where the samples of tar shards are: 24 bytes per sample on disk, memory-mapped, made once.

A row is six block numbers (of 512 bytes): the sample's first header, the data of its members (0: it has none of the
kind) and its end. Nothing is in memory in proportion to samples; which rows are a shard's follows from the shards'
counts. The index lies in ``.clip_jax_index`` beside the shards, or in the user's cache folder where that cannot be
written (or ``CLIP_JAX_CACHE`` names one), under a hash of the shards' names, sizes and times: it cannot be found for a
shard that was changed. Then the headers of that shard alone are read again.

Reading a shard also makes the digest of what is in it: keys, places, sizes, captions and sampled bytes of the images.
"""

import hashlib
import itertools
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources import identity, tar_headers
from clip_jax.data.sources.tar_headers import BLOCK, TarError
from clip_jax.errors import UserError
from clip_jax.storage import ranges, remote
from clip_jax.storage.ranges import Stat

IMAGES = ("jpg", "jpeg", "png", "webp")
KINDS = ("image", "txt", "json", "cls")
"""What a member can be to a sample."""
COLUMNS = 2 + len(KINDS)
MAX_MEMBER_BYTES = 256 * 1024 * 1024
RULES = 1
"""Raised when other members make a sample, or the digest is made in another way: older indexes are then not read."""

FOLDER = ".clip_jax_index"
THREADS = 16
WINDOW = 16 * 1024
"""Bytes read at a time where headers are: several small members, and little of a large image."""
REMOTE_WINDOW = 8 * 1024 * 1024
"""A remote shard is streamed once, in pieces."""


class Shard(NamedTuple):
    """What the index knows of a shard."""

    name: str
    """Relative to the folder of the first shard."""
    size: int
    version: str
    samples: int
    digest: str
    counts: tuple[int, ...]
    """Samples that have a member of each of KINDS, empty ones included; then those whose .cls is not empty."""


@dataclass(frozen=True)
class Index:
    shards: tuple[Shard, ...] = field(repr=False)
    starts: tuple[int, ...] = field(repr=False)
    """The first sample of each shard, and the number of all."""
    rows: np.ndarray = field(repr=False)
    """uint32[samples, COLUMNS], memory-mapped."""

    def __len__(self) -> int:
        return self.starts[-1]

    def having(self, kind: str) -> int:
        """Samples with a member of this kind; ``labels``: with a .cls that is not empty."""
        return sum(shard.counts[(*KINDS, "labels").index(kind)] for shard in self.shards)


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
    places = _places(folder)
    for place in places:
        if (place / name).is_dir():
            return load(place / name)
    return _build(shards, known, truncated, places, name)


def load(folder: Path) -> Index:
    """An index from its folder."""
    table = [Shard(*entry[:-1], tuple(entry[-1])) for entry in json.loads((folder / "shards.json").read_text())]
    starts = tuple(itertools.accumulate((shard.samples for shard in table), initial=0))
    with open(folder / "rows", "rb") as file:
        # An empty file cannot be mapped; an index without samples is never written.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # A shuffled run reads single rows: read ahead, each would cost a millisecond instead of five microseconds.
    mapped.madvise(mmap.MADV_RANDOM)
    return Index(tuple(table), starts, np.frombuffer(mapped, "<u4").reshape(-1, COLUMNS))


def _places(folder: str) -> list[Path]:
    """Folders for the indexes of shards in ``folder``, the best first."""
    cache = identity.cache_folder() / "tar_index" / hashlib.sha256(folder.encode()).hexdigest()[:24]
    return [cache] if os.environ.get("CLIP_JAX_CACHE") or remote.is_remote(folder) else [Path(folder) / FOLDER, cache]


def _build(shards: Sequence[str], known: list[tuple], truncated: str, places: list[Path], name: str) -> Index:
    """Writes the index; rows of shards that did not change are taken from earlier indexes.

    Other processes may do so at the same time. The first index stays: a file that a process on another machine has
    mapped must not be replaced on a network file system.
    """
    place = _writable(places)
    earlier = _earlier(places)
    unknown = [shard for shard, entry in zip(shards, known, strict=True) if (*entry, truncated) not in earlier]
    if len(unknown) > THREADS:
        print(f"reading the headers of {len(unknown)} shards, once; the index goes to {place}", flush=True)

    def scan(shard: str, entry: tuple) -> tuple[Shard, np.ndarray]:
        return earlier.get((*entry, truncated)) or _scan(shard, *entry, truncated)

    temporary = Path(tempfile.mkdtemp(dir=place))
    try:
        with ThreadPoolExecutor(THREADS) as pool, open(temporary / "rows", "wb") as file:
            table = []
            for shard, rows in pool.map(scan, shards, known):
                table.append(shard)
                rows.tofile(file)
        if not any(shard.samples for shard in table):
            raise UserError(
                f"{shards[0]}: no samples (an image with a .txt, .json or .cls of the same name) in the shards"
            )
        (temporary / "shards.json").write_text(json.dumps(table))
        (temporary / "rules.json").write_text(json.dumps([truncated, RULES]))
        temporary.chmod(0o755)  # readable by other users of the shards
        temporary.rename(place / name)
    except OSError:
        if not (place / name).is_dir():  # else another process was first, and its index is the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load(place / name)


def _writable(places: list[Path]) -> Path:
    for place in places[:-1]:
        parent = place if place.is_dir() else place.parent
        # Without the bits a folder is meant to stay as it is, even where root could write to it.
        if parent.stat().st_mode & 0o222 and os.access(parent, os.W_OK):
            try:
                place.mkdir(exist_ok=True)
                return place
            except OSError:  # a file system that is mounted read-only
                continue
    try:
        places[-1].mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{places[-1]}: the index of the shards cannot be written there ({error.strerror}); "
            "set CLIP_JAX_CACHE to a folder that can be written"
        ) from error
    return places[-1]


def _earlier(places: list[Path]) -> dict[tuple, tuple[Shard, np.ndarray]]:
    """(name, size, version, truncated) -> what an earlier index of the same folder has of that shard."""
    found = {}
    for rules in (path for place in places if place.is_dir() for path in place.glob("*/rules.json")):
        truncated, number = json.loads(rules.read_text())
        if number != RULES:
            continue
        index = load(rules.parent)
        for shard, start in zip(index.shards, index.starts, strict=False):
            found[shard.name, shard.size, shard.version, truncated] = shard, index.rows[start : start + shard.samples]
    return found


def _scan(shard: str, name: str, size: int, version: str, truncated: str) -> tuple[Shard, np.ndarray]:
    """What is in one shard: members grouped by the name before the first dot of its last part."""
    if size > BLOCK * 2**32:
        raise UserError(f"{shard}: larger than 2 TiB; split it")
    window = REMOTE_WINDOW if remote.is_remote(shard) else WINDOW
    read = ranges.buffered(ranges.reader(shard, Stat(size, version)), window)
    samples: dict[str, dict[str, tuple]] = {}
    end, cut = 0, False
    try:
        for member in tar_headers.members(read):
            end = member.offset + member.size
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            kind = "image" if extension.lower() in IMAGES else extension.lower()
            if member.regular and kind in KINDS and member.size <= MAX_MEMBER_BYTES and end <= size:
                sample = samples.setdefault(f"{folder}/{stem}", {})
                if kind not in sample:
                    sample[kind] = member, identity.sampled(read, member.size, 3, member.offset)
    except TarError as error:
        cut = True
        if not samples:
            raise UserError(f"{shard}: not a tar file ({error}); remove it or download it again") from error
    if not end:
        raise UserError(f"{shard}: not a tar file (it is empty); remove it or download it again")
    # A file that ends between two members is no complete one, which ends with blocks of zeros.
    cut = cut or end > size or any(read(max(0, size - 2 * BLOCK), 2 * BLOCK))
    if cut and truncated == "stop":
        raise UserError(
            f"{shard}: truncated at byte {size}; download it again, "
            "or set config.data.truncated=keep to use the samples before the cut"
        )
    if ranges.stat(shard) != Stat(size, version):
        raise UserError(f"{shard}: was changed while it was read; wait until it is written, and start again")
    complete = {key: sample for key, sample in samples.items() if "image" in sample and len(sample) > 1}
    rows, digest = np.zeros((len(complete), COLUMNS), "<u4"), hashlib.sha256()
    for row, (key, sample) in zip(rows, complete.items(), strict=True):
        found = [member for member, _ in sample.values()]
        row[0], row[-1] = min(m.start for m in found) // BLOCK, max(m.end for m in found) // BLOCK
        for kind, (member, sampled) in sample.items():
            row[1 + KINDS.index(kind)] = member.offset // BLOCK
            digest.update(f"{kind} {member.offset} {member.size} {sampled}\n".encode())
        digest.update(key.encode("utf-8", "surrogateescape") + b"\n")
    counts = [sum(kind in sample for sample in complete.values()) for kind in KINDS]
    labels = sum("cls" in sample and sample["cls"][0].size > 0 for sample in complete.values())
    return Shard(name, size, version, len(rows), digest.hexdigest()[:24], (*counts, labels)), rows
