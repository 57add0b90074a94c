"""ArrayRecord files of ``tf.train.Example`` records, without TensorFlow.

What TFDS and many pipelines write: a record maps names to lists of bytes. For a dataset that TFDS prepared, ``tfds:``
knows more (splits, classes); this reads the files themselves. The array_record library reads local files, and
``array_record_ranges.py`` those behind a URL.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from clip_jax.data.sources import array_record_ranges, captions, identity, patterns
from clip_jax.data.sources import boxes as box_files
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.errors import UserError, nearest
from clip_jax.storage import remote

IMAGES = ("image", "image/encoded", "jpg", "png", "webp", "image_bytes")
CAPTIONS = ("caption", "captions", "captions/text", "text", "texts", "title", "image/caption")


@dataclass(frozen=True, eq=False)
class ArrayRecords:
    """Made by ``open_array_record``."""

    name: str
    fingerprint: str
    image: str
    captions: tuple[captions.Field, ...]
    records: Any = field(repr=False)
    """index -> bytes; safe to call from several threads."""
    boxes: str = ""
    """The name of their list, which has one JSON text; empty: boxes are not read."""
    former_fingerprint: str = ""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = f"{self.name}[{index}]"
        example = _read(self.records, index, key)

        def texts(name: str) -> list[str]:
            try:
                return [text.decode() for text in example.get(name, [])]
            except UnicodeDecodeError as error:
                raise BadSampleError("caption is not UTF-8", key) from error

        found = captions.gather(self.captions, texts)
        if not found.texts:
            raise BadSampleError("empty caption", key)
        if not example.get(self.image):
            raise BadSampleError("no image", key)
        regions = next(iter(example.get(self.boxes, ())), None)
        extras = {"boxes": box_files.parse(regions, key)} if self.boxes else {}
        return Sample(example[self.image][0], found.texts, key, extras=extras, shares=found.shares)


def open_array_record(
    where: str, *, image: str = "", caption: str = "txt", long_reads: bool = False, boxes: str = ""
) -> Source:
    """Files by the names that ``patterns.py`` takes; ``long_reads``: neighbors in a remote file are read together.

    Raises UserError.
    """
    files = patterns.files(where, (".array_record", ".arrayrecord", ".riegeli"))
    distant = [file for file in files if remote.is_remote(file)]
    if distant and len(distant) < len(files):
        raise UserError(f"array_record:{where}: some files are local and some are not; make two sources of a mixture")
    records = array_record_ranges.open_ranges(files, long_reads=long_reads) if distant else _local(where, files)
    if not len(records):
        raise UserError(f"array_record:{where}: no records")
    try:
        names = _read(records, 0, f"array_record:{where}[0]")
    except BadSampleError:
        names = {}
    if not names:
        raise UserError(f"array_record:{where}: its first record is not a tf.train.Example with bytes in it")
    wanted = captions.named(caption)
    image = _pick(where, names, [image] if image else IMAGES, "config.data.image")
    for name, _ in wanted:
        _pick(where, names, [name], "config.data.caption")
    wanted = wanted or captions.fields(_pick(where, names, CAPTIONS, "config.data.caption"))
    if boxes:
        _pick(where, names, [boxes], "config.data.boxes")
    content = json.dumps([identity.of_files(files), image, wanted, *([boxes] if boxes else [])])
    return ArrayRecords(
        name=f"array_record:{where}",
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:24],
        image=image,
        captions=wanted,
        records=records,
        boxes=boxes,
        notes=records.notes if distant else (),
    )


def _local(where: str, files: list[str]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        records = ArrayRecordDataSource(files)
        len(records)
        return records
    except (RuntimeError, ValueError) as error:
        raise UserError(f"array_record:{where}: not ArrayRecord files ({str(error).splitlines()[0]})") from error


def _pick(where: str, names: dict[str, Any], usual: list[str] | tuple[str, ...], setting: str) -> str:
    found = next((name for name in usual if name in names), None)
    if found is None:
        raise UserError(
            f"array_record:{where}: no {' or '.join(usual)} in its first record, which has {', '.join(sorted(names))}"
            f"{nearest(usual[0], names)}; name one with {setting}"
        )
    return found


def record(records: Any, index: int, key: str) -> bytes:
    """The record. Raises BadSampleError, and OSError where it may be readable later."""
    try:
        return records[index]
    except RuntimeError as error:  # the library raises nothing else, for bad checksums and failed reads alike
        if "Corrupted" in str(error):
            raise BadSampleError(f"corrupted record ({error})", key) from error
        raise OSError(f"{key}: {error}") from error


def _read(records: Any, index: int, key: str) -> dict[str, list[bytes]]:
    try:
        return example(record(records, index, key))
    except (IndexError, UnicodeDecodeError) as error:
        raise BadSampleError("not a tf.train.Example", key) from error


def example(record: bytes) -> dict[str, list[bytes]]:
    """The lists of bytes in a serialized ``tf.train.Example`` by name; numbers are left out.

    ``Example {1: Features {1: map of string to Feature {1: BytesList {1: bytes}}}}``.
    """
    found = {}
    for features in _values(record, 1):
        for entry in _values(features, 1):
            name = next(_values(entry, 1), b"").decode()
            for feature in _values(entry, 2):
                for values in _values(feature, 1):
                    found[name] = list(_values(values, 1))
    return found


def _values(message: bytes, wanted: int) -> Iterator[bytes]:
    """The length-delimited values of one field of a protocol buffer. IndexError where it is none."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _, position = _varint(message, position)
            continue
        if kind not in (1, 2, 5):
            raise IndexError("no protocol buffer")
        size, position = _varint(message, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
        if position + size > len(message):
            raise IndexError("the message ends early")
        if kind == 2 and number == wanted:
            yield message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
        if byte < 128:
            return value, position
