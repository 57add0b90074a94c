"""Any source as tar shards or ArrayRecord files: the same bytes each time, resumable, several shards at a time.

In a tar shard, a sample is its image, a ``.txt`` (its first caption), a ``.json`` (``captions``: all of them; ``key``:
its name in the source; ``boxes``: where the source has them) and, where it has a label, a ``.cls``.
``packing_records.py`` has ArrayRecord files. Files of JPEG, PNG and WebP are kept as they are.
"""

import collections
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from clip_jax.data import images, packing_records
from clip_jax.data.sources import boxes
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


def pack(
    source: Source,
    to: Path,
    *,
    per_shard: int,
    max_size: int,
    workers: int,
    form: str = "tar",
    advance: Callable[[int], None] = lambda count: None,
) -> Packed:
    """Writes ``to/00000.tar`` and so on, or a TFDS dataset (``form="array_record"``) named by the folder.

    An interrupted call is continued by the same call. ``max_size``: images whose shorter side has more pixels are
    resized to it; 0 keeps all. ``advance`` is called with the number of examples that are done. Raises UserError.
    """
    settings = {"source": source.name, "fingerprint": source.fingerprint, "per_shard": per_shard, "max_size": max_size}
    settings |= {} if form == "tar" else {"format": form}
    # Shards of the bundled scenes from before boxes were packed are not continued: some would have none.
    settings |= {"boxes": boxes.FIELD} if boxes.are_in(source) else {}
    shards = -(-len(source) // per_shard)
    if form == "tar":
        if shards > 100_000:
            raise UserError(f"{to}: {shards:,} shards; raise --per-shard to at least {-(-len(source) // 100_000):,}")
    else:
        to = packing_records.folder(to)

    def shard(number: int) -> Path:
        return _shard(to, number) if form == "tar" else packing_records.file(to, number, shards)

    def write(number: int) -> tuple[int, collections.Counter]:
        faults: collections.Counter = collections.Counter()
        indices = range(number * per_shard, min((number + 1) * per_shard, len(source)))
        examples = _examples(source, indices, max_size, faults, advance)
        with atomic.replacing(shard(number)) as temporary:
            (_write_tar if form == "tar" else packing_records.write)(temporary, examples)
        return len(indices) - faults.total(), faults

    try:
        to.mkdir(parents=True, exist_ok=True)
        _check_same(to, settings)
        atomic.write_text(to / SETTINGS, json.dumps(settings, indent=1))
        if source.class_names and form == "tar":
            atomic.write_text(to / "classnames.txt", "\n".join(source.class_names) + "\n")
        missing = [number for number in range(shards) if not shard(number).exists()]
        advance(len(source) - sum(min(per_shard, len(source) - number * per_shard) for number in missing))
        with ThreadPoolExecutor(workers) as pool:
            done = list(pool.map(write, missing))
        if form != "tar":
            packing_records.write_metadata(to, source, shards)
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error.strerror or error})") from error
    faults = sum((found for _, found in done), collections.Counter())
    return Packed(shards, shards - len(missing), sum(count for count, _ in done), faults)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def _check_same(to: Path, settings: dict[str, Any]) -> None:
    file = to / SETTINGS
    if not file.exists():
        if any(to.glob("*.tar")) or any(to.glob("*.array_record*")):
            raise UserError(f"{to}: has shards that were not packed by this command; name another folder")
        return
    other = json.loads(file.read_text())
    if changed := [name for name in {**other, **settings} if settings.get(name) != other.get(name)]:
        raise UserError(f"{to}: was packed with another {' and '.join(changed)}; name another folder")


def _examples(
    source: Source, indices: range, max_size: int, faults: collections.Counter, advance: Callable[[int], None]
) -> Iterator[tuple[int, Sample, str, bytes]]:
    """Number, example, format and bytes of the image; those that cannot be used are counted."""
    for index in indices:
        try:
            sample = read(source, index)
            image = images.decode(sample.image)  # what cannot be decoded is found now
            yield index, sample, *_encoded(sample.image, image, max_size)
        except BadSampleError as error:
            faults[error.reason] += 1
        except images.BadImageError as error:
            faults[str(error)] += 1
        advance(1)


def _write_tar(to: Path, examples: Iterable[tuple[int, Sample, str, bytes]]) -> None:
    with tarfile.open(to, "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, sample, extension, image in examples:
            for ending, data in _members(sample, extension, image).items():
                member = tarfile.TarInfo(f"{index:09d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def _members(sample: Sample, extension: str, image: bytes) -> dict[str, bytes]:
    about = {"captions": list(sample.captions), "key": sample.key}
    if sample.shares:
        about["shares"] = list(sample.shares)
    if boxes.FIELD in sample.extras:
        about[boxes.FIELD] = json.loads(boxes.written(sample.extras[boxes.FIELD]))
    label = {"cls": str(sample.label).encode()} if sample.label >= 0 else {}
    return {
        extension: image,
        "json": json.dumps(about, ensure_ascii=False).encode(),
        "txt": sample.captions[0].encode(),
    } | label


def _encoded(given: bytes | np.ndarray, image: Image.Image, max_size: int) -> tuple[str, bytes]:
    short, extension = min(image.size), "" if isinstance(given, np.ndarray) else _extension(given)
    resized = 0 < max_size < short
    if extension and not resized:
        return extension, given
    options = {}
    if not isinstance(given, np.ndarray) and (orientation := images.orientation(given)) != 1:
        # A new file is turned as the old one was, with config.data.exif_orientation and the boxes that go with it.
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    if not resized:
        return "png", _saved(image, "PNG", **options)
    size = [max(1, round(side * max_size / short)) for side in image.size]
    return "jpg", _saved(image.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=QUALITY, **options)


def _extension(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for head, extension in KEPT.items() if data.startswith(head)), "")


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
