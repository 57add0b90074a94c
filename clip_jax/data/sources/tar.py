"""webdataset / img2dataset tar shards by random access, over an index that is built once and memory-mapped.

A sample is the members with the same name before the first dot: ``000.jpg``, ``000.txt``, ``000.json``, ``000.cls``.
Members of other kinds are not read, and nothing is ever extracted or unpickled. The index has the offset and size of
each member; it is stored in the user's cache folder under a hash of the shards' names, sizes and times.

Faults: a missing or truncated shard stops the run before it starts (``truncated="keep"`` uses the samples before
the cut); an empty caption or a broken image is a fault of its sample alone and is raised as BadSampleError.
"""

import glob
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
MEMBERS = ("image", "txt", "json", "cls")
MAX_MEMBER_BYTES = 256 * 1024 * 1024

# Offset and size of each member of one sample; size -1: the sample has no such member.
ENTRY = np.dtype([("shard", "<i4"), *((f"{m}_{what}", "<i8") for m in MEMBERS for what in ("offset", "size"))])


@dataclass(frozen=True)
class TarSource:
    """Samples of a list of tar shards, in the order of the shards and of the members inside them."""

    name: str
    fingerprint: str
    shards: tuple[Path, ...]
    caption: str
    """``txt``, or a dotted path into the sample's JSON such as ``caption`` or ``captions.de``."""
    class_names: tuple[str, ...] = ()
    index: np.ndarray = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Sample:
        entry = self.index[i]
        file = _open(self.shards[entry["shard"]])

        def member(kind: str) -> bytes:
            size = int(entry[f"{kind}_size"])
            data = os.pread(file.fileno(), size, int(entry[f"{kind}_offset"])) if size > 0 else b""
            if len(data) != max(size, 0):  # the shard was changed after it was opened
                raise OSError(f"{file.name}: {len(data)} of {size} bytes at {entry[f'{kind}_offset']}")
            return data

        key = f"{Path(file.name).name}/{_member_stem(file.fileno(), int(entry['image_offset']))}"
        captions = self._captions(member, key)
        label = int(member("cls")) if self.class_names else -1
        return Sample(member("image"), captions, key, label)

    def _captions(self, member, key: str) -> tuple[str, ...]:
        try:
            if self.class_names and self.caption == "txt":
                found = member("txt").decode() or self.class_names[int(member("cls"))]
            elif self.caption == "txt":
                found = member("txt").decode()
            else:
                found = json.loads(member("json") or b"{}")
                for part in self.caption.split("."):
                    found = found.get(part, "") if isinstance(found, dict) else ""
        except (UnicodeDecodeError, json.JSONDecodeError, ValueError, IndexError) as error:
            raise BadSampleError(f"unreadable caption ({type(error).__name__})", key) from error
        captions = tuple(c.strip() for c in (found if isinstance(found, list) else [found]) if isinstance(c, str))
        if not any(captions):
            raise BadSampleError("empty caption", key)
        return tuple(c for c in captions if c)


def open_tar(where: str, *, caption: str = "txt", truncated: str = "stop") -> TarSource:
    """Shards by a glob pattern, a folder of .tar files, or several of these separated by commas."""
    shards = [shard for pattern in where.split(",") for shard in _expand(pattern)]
    files = [(str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns) for s in shards]
    cached = hashlib.sha256(json.dumps([files, truncated, ENTRY.descr]).encode()).hexdigest()[:24]
    folder = _cache_folder() / cached
    if not (folder / "index.npy").exists():
        _build(shards, truncated, folder)
    index = np.load(folder / "index.npy", mmap_mode="r")
    class_names = ()
    labels_file = shards[0].parent / "classnames.txt"
    if labels_file.exists() and len(index) and (index["cls_size"] > 0).all():
        class_names = tuple(labels_file.read_text(encoding="utf-8").splitlines())
    if caption == "txt" and not class_names and len(index) and not (index["txt_size"] >= 0).any():
        raise UserError(f"{where}: no sample has a .txt caption; set config.data.caption to a path in the .json")
    # Names and sizes, but no times or folders: a copy of the shards is the same data.
    content = hashlib.sha256(json.dumps([[Path(f).name, size] for f, size, _ in files]).encode())
    content.update(np.int64(len(index)).tobytes() + caption.encode())
    return TarSource(f"tar:{where}", content.hexdigest()[:16], tuple(shards), caption, class_names, index)


def _expand(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    path = Path(pattern)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise UserError(f"{pattern}: no .tar shards in this folder")
        return found
    found = sorted(Path(p) for p in glob.glob(pattern))
    if not found:
        raise UserError(f"{pattern}: no such shard; give a .tar file, a folder of them or a pattern like train-*.tar")
    return found


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
    entries = np.concatenate([_scan(shard, number, truncated) for number, shard in enumerate(shards)])
    if not len(entries):
        raise UserError(f"{shards[0]}: no samples (an image with a .txt, .json or .cls of the same name) in the shards")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        np.save(temporary / "index.npy", entries)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, and its index is the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _scan(shard: Path, number: int, truncated: str) -> np.ndarray:
    """ENTRY[samples] of one shard: members grouped by the name before the first dot of its last part."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                kind = "image" if extension.lower() in IMAGES else extension.lower()
                if not member.isreg() or kind not in MEMBERS or member.size > MAX_MEMBER_BYTES:
                    continue
                samples.setdefault(f"{folder}/{stem}", {}).setdefault(kind, (member.offset_data, member.size))
        size = shard.stat().st_size
        # tarfile accepts a file that ends between two members; a complete one ends with blocks of zeros.
        cut = end > size or not _ends_with_zeros(shard, size)
    except tarfile.TarError as error:
        cut = True
        if not samples:
            raise UserError(f"{shard}: not a tar file ({error}); remove it or download it again") from error
    if cut and truncated == "stop":
        raise UserError(
            f"{shard}: truncated at byte {shard.stat().st_size}; download it again, "
            "or set config.data.truncated=keep to use the samples before the cut"
        )
    if cut:
        size = shard.stat().st_size
        samples = {k: s for k, s in samples.items() if all(offset + n <= size for offset, n in s.values())}
    rows = [
        (number, *(value for kind in MEMBERS for value in sample.get(kind, (0, -1))))
        for sample in samples.values()
        if "image" in sample and len(sample) > 1
    ]
    return np.array(rows, ENTRY)


def _ends_with_zeros(shard: Path, size: int) -> bool:
    with open(shard, "rb") as file:
        file.seek(max(0, size - 1024))
        return not any(file.read())


@lru_cache(maxsize=256)  # an evicted file stays open for the thread that reads it, until its last reference is gone
def _open(shard: Path):
    return open(shard, "rb", buffering=0)


def _member_stem(descriptor: int, data_offset: int) -> str:
    """The name in the header before a member's data, without its extension: for messages, hence not in the index."""
    name = os.pread(descriptor, 100, data_offset - 512).split(b"\0", 1)[0]
    return name.decode(errors="replace").partition(".")[0]
