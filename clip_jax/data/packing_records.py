"""Packed examples as ArrayRecord files in the layout of a prepared TFDS dataset, written without TensorFlow.

``DIR/pairs/1.0.0`` holds ``pairs-train.array_record-00000-of-00012`` and so on, with TFDS's own metadata, so that
``tfds:pairs`` reads them in ``DIR``, and ``tfds.data_source`` does elsewhere. Records are stored one by one, as TFDS
does: an example is then read without its neighbors. Boxes are one JSON text (``boxes.written``).
"""

import re
from collections.abc import Iterable
from pathlib import Path

from clip_jax.data.sources import boxes
from clip_jax.data.sources.sample import Sample, Source
from clip_jax.errors import UserError

VERSION = "1.0.0"
SPLIT = "train"
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def folder(to: Path) -> Path:
    """Where the files are. Raises UserError for a name that TFDS would not take."""
    if not _NAME.fullmatch(to.name):
        raise UserError(
            f"--to={to}: its last part becomes the name of a TFDS dataset: lower-case letters, digits and underscores, "
            "as in data/my_pairs"
        )
    return to / VERSION


def file(to: Path, number: int, shards: int) -> Path:
    return to / f"{to.parent.name}-{SPLIT}.array_record-{number:05d}-of-{shards:05d}"


def write(to: Path, examples: Iterable[tuple[int, Sample, str, bytes]]) -> None:
    """Writes the examples: number in the source, example, format and bytes of its image."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(to), "group_size:1")
    try:
        for _, sample, _, image in examples:
            writer.write(_record(sample, image))
    finally:
        writer.close()


def write_metadata(to: Path, source: Source, shards: int) -> None:
    """TFDS's description of the files, from which it and ``tfds:`` read them."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "key": tfds.features.Text(),
    }
    if source.class_names:
        features["label"] = tfds.features.ClassLabel(names=list(source.class_names))
    if boxes.are_in(source):
        features[boxes.FIELD] = tfds.features.Text()
    template = tfds.core.ShardedFileTemplate(
        data_dir=to, dataset_name=to.parent.name, split=SPLIT, filetype_suffix="array_record"
    )
    files = [file(to, number, shards) for number in range(shards)]
    lengths = []
    for path in files:
        reader = ArrayRecordReader(str(path))
        lengths.append(reader.num_records())
        reader.close()
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=lengths,
        num_bytes=sum(path.stat().st_size for path in files),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=to,
        features=tfds.features.FeaturesDict(features),
        split_infos=[split],
        filename_template=template,
        check_data=False,  # it would read them with TensorFlow
    )


def _record(sample: Sample, image: bytes) -> bytes:
    """A serialized ``tf.train.Example``, as ``array_record.example`` reads it; TFDS offers no encoder without its own
    features, whose images would be encoded again."""
    features = {
        "captions": _bytes_list(caption.encode() for caption in sample.captions),
        "image": _bytes_list([image]),
        "key": _bytes_list([sample.key.encode()]),
    }
    if boxes.FIELD in sample.extras:
        features[boxes.FIELD] = _bytes_list([boxes.written(sample.extras[boxes.FIELD]).encode()])
    if sample.label >= 0:
        features["label"] = _field(3, _field(1, _varint(sample.label)))
    return _field(1, b"".join(_field(1, _field(1, name.encode()) + _field(2, f)) for name, f in features.items()))


def _bytes_list(values: Iterable[bytes]) -> bytes:
    return _field(1, b"".join(_field(1, value) for value in values))


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
