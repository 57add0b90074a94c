"""Any source as tar shards: the same bytes each time, resumable, several shards at a time.

A sample is its image, a ``.txt`` (its first caption), a ``.json`` (``captions``: all of them; ``key``: its name in the
source) and, where it has a label, a ``.cls``. Files of JPEG, PNG and WebP are kept as they are.
"""

import collections
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from clip_jax.data import images
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.stream import read
from clip_jax.errors import UserError
from clip_jax.storage import atomic

SETTINGS = "pack.json"
QUALITY = 95
KEPT = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}


class Packed(NamedTuple):
    shards: int
    earlier: int
    """Shards that existed already."""
    written: int
    """Examples in the new ones."""
    faults: collections.Counter
    """Examples left out of the new ones, by reason."""


def pack(source: Source, to: Path, *, per_shard: int, max_size: int, workers: int) -> Packed:
    """Writes ``to/00000.tar`` and so on. An interrupted call is continued by the same call.

    ``max_size``: images whose shorter side has more pixels are resized to it; 0 keeps all. Raises UserError.
    """
    settings = {"source": source.name, "fingerprint": source.fingerprint, "per_shard": per_shard, "max_size": max_size}
    try:
        to.mkdir(parents=True, exist_ok=True)
        _check_same(to, settings)
        atomic.write_text(to / SETTINGS, json.dumps(settings, indent=1))
        if source.class_names:
            atomic.write_text(to / "classnames.txt", "\n".join(source.class_names) + "\n")
        starts = range(0, len(source), per_shard)
        missing = [start for start in starts if not _shard(to, start // per_shard).exists()]

        def write(start: int) -> tuple[int, collections.Counter]:
            return _write(
                source, range(start, min(start + per_shard, len(source))), _shard(to, start // per_shard), max_size
            )

        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(write, missing))
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror or error})") from error
    faults = sum((found for _, found in done), collections.Counter())
    return Packed(len(starts), len(starts) - len(missing), sum(count for count, _ in done), faults)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def _check_same(to: Path, settings: dict[str, Any]) -> None:
    file = to / SETTINGS
    if not file.exists():
        if any(to.glob("*.tar")):
            raise UserError(f"{to}: has .tar files that were not packed by this command; name another folder")
        return
    other = json.loads(file.read_text())
    if changed := [name for name in settings if settings[name] != other.get(name)]:
        raise UserError(f"{to}: was packed with another {' and '.join(changed)}; name another folder")


def _write(source: Source, indices: range, to: Path, max_size: int) -> tuple[int, collections.Counter]:
    count, faults = 0, collections.Counter()
    with atomic.replacing(to) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index in indices:
            try:
                sample = read(source, index)
                members = _members(sample, max_size)
            except BadSampleError as error:
                faults[error.reason] += 1
                continue
            except images.BadImageError as error:
                faults[str(error)] += 1
                continue
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{index:09d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            count += 1
    return count, faults


def _members(sample: Sample, max_size: int) -> dict[str, bytes]:
    image = images.decode(sample.image)  # what cannot be decoded is found now
    extension, data = _encoded(sample.image, image, max_size)
    about = {"captions": list(sample.captions), "key": sample.key}
    if sample.shares:
        about["shares"] = list(sample.shares)
    label = {"cls": str(sample.label).encode()} if sample.label >= 0 else {}
    return {
        extension: data,
        "json": json.dumps(about, ensure_ascii=False).encode(),
        "txt": sample.captions[0].encode(),
    } | label


def _encoded(given: bytes | np.ndarray, image: Image.Image, max_size: int) -> tuple[str, bytes]:
    short = min(image.size)
    if not max_size or short <= max_size:
        kept = "" if isinstance(given, np.ndarray) else _extension(given)
        if kept:
            return kept, given
        return "png", _saved(image, "PNG")
    size = [max(1, round(side * max_size / short)) for side in image.size]
    return "jpg", _saved(image.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=QUALITY)


def _extension(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for head, extension in KEPT.items() if data.startswith(head)), "")


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
