"""TFDS datasets as a source: random access to ArrayRecord files, without TensorFlow.

Only what ``download_and_prepare`` left on disk or in a bucket is read: nothing is downloaded, and no dataset's code
runs. ``tfds_folders.py`` finds the folder. Local files are read by the array_record library, those in a bucket by
``array_record_ranges.py``.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from typing import Any, NamedTuple

import numpy as np

from clip_jax.data.sources import array_record, array_record_ranges, identity, tfds_folders
from clip_jax.data.sources import boxes as box_files
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.errors import UserError, nearest
from clip_jax.storage import remote

# Datasets of the catalog use these names for captions: coco_captions a sequence of {text, id}, laion400m one caption.
_CAPTION_FEATURES = ("captions", "caption", "texts", "text")
_CAPTION_SUBFEATURES = ("text", "caption")


class _Layout(NamedTuple):
    """Which features of a TFDS example to read."""

    image: str
    captions: tuple[str, ...]
    """Path to the text, such as ("captions", "text"); empty if the class name is the caption."""
    label: str
    """Empty where there are no classes."""
    boxes: str = ""
    """The text that has the boxes, as JSON; empty: boxes are not read."""


class _Part(NamedTuple):
    """An interval of the records of a file."""

    file: str
    """Path or URL."""
    skip: int
    take: int
    examples: int
    """The number of records in the file, by the dataset's metadata."""


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Some intervals of records, one after another."""

    records: Any
    firsts: tuple[int, ...]
    """The first record of each interval."""
    starts: tuple[int, ...]
    """Where it begins among the records of all intervals, and the number of all."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> bytes:
        part = bisect.bisect_right(self.starts, index) - 1
        return self.records[self.firsts[part] + index - self.starts[part]]


@dataclasses.dataclass(frozen=True, eq=False)
class _TfdsSource:
    name: str
    fingerprint: str
    former_fingerprint: str
    class_names: tuple[str, ...]
    title: str
    """Dataset and split, for messages: ``coco_captions/2014/1.1.0 test``."""
    layout: _Layout
    records: Any = dataclasses.field(repr=False)
    """index -> serialized example; threads share ArrayRecord's one reader per shard, which is safe."""
    features: Any = dataclasses.field(repr=False)
    """A FeaturesDict of the features in ``layout``, so that nothing else is decoded (COCO has boxes, others masks)."""
    decoders: dict[str, Any] = dataclasses.field(repr=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = f"{self.title}[{index}]"
        record = array_record.record(self.records, index, key)
        example = self.features.deserialize_example_np(record, decoders=self.decoders)
        label = int(example[self.layout.label]) if self.layout.label else -1
        if self.layout.captions:
            captions = _captions(example, self.layout.captions, key)
        elif label >= 0:
            captions = (self.class_names[label],)
        else:  # TFDS marks a withheld label with -1.
            raise BadSampleError("no label", key)
        extras = {"boxes": box_files.parse(example[self.layout.boxes], key)} if self.layout.boxes else {}
        return Sample(example[self.layout.image], captions, key, label, extras)


def open_tfds(where: str, *, tfds_dir: str = "", long_reads: bool = False, boxes: str = "") -> Source:
    """A prepared TFDS dataset by ``name/split``; the split is ``train`` where there is no slash."""
    name, slash, split = where.rpartition("/")
    name, split = (name, split) if slash else (where, "train")
    return open_split(name, split, data_dir=tfds_dir, long_reads=long_reads, boxes=boxes)


def open_split(where: str, split: str, *, data_dir: str = "", long_reads: bool = False, boxes: str = "") -> Source:
    """One split of a prepared TFDS dataset: ``where`` is ``name``, ``name/config`` or ``name/config:version``.

    ``split`` is TFDS's: ``train``, ``test``, ``train[:90%]``, ``train+restval``. ``data_dir`` defaults to TFDS's own
    (``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``) and may be in a bucket, where ``long_reads`` reads neighbors
    together. Images stay encoded. Where there is a label and no text, the class name is the caption. ``boxes`` names a
    feature of text, as ``clip-jax pack`` writes it. Raises UserError for anything missing or malformed.
    """
    logging.getLogger("absl").addFilter(_is_not_from_tfds)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"tfds:{where}: {error}; pip install tensorflow-datasets array_record") from error

    folder = tfds_folders.find(where, data_dir)
    with tfds_folders.metadata(folder) as local:
        try:
            builder = tfds.builder_from_directory(local)
        except Exception as error:  # TFDS has no error of its own for broken metadata.
            raise UserError(
                f"tfds:{where}: cannot read {folder}: {tfds_folders.first_line(error)}; prepare it again"
            ) from error
        info, features = builder.info, dict(builder.info.features)
        formats = sorted(f.value for f in info.available_file_formats())
        if "array_record" not in formats:
            raise UserError(
                f"tfds:{where}: {folder} has {' and '.join(formats)} files, which have no random access; move that "
                f"folder away (TFDS keeps and reuses its downloads) and {tfds_folders.how_to_prepare(where, data_dir)}"
            )
        # A converted dataset still has TFRecord as its first format.
        info.set_file_format("array_record", override=True, override_if_initialized=True)
        instructions = _file_instructions(where, split, info, folder)
    layout = _find_layout(where, features, boxes)
    former = _former_fingerprint(info, split, instructions)
    used = dict.fromkeys(filter(None, (layout.image, *layout.captions[:1], layout.label, boxes)))
    is_encoded = isinstance(features[layout.image], tfds.features.Image)
    if remote.is_remote(folder):
        records = _ranges(where, instructions, long_reads)
    else:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = builder.as_data_source(split, file_format="array_record", deserialize_method=raw)
    return _TfdsSource(
        name=f"tfds:{where}/{split}",
        fingerprint=_fingerprint(former, instructions, boxes),
        former_fingerprint=former,
        class_names=tuple(features[layout.label].names) if layout.label else (),
        title=f"{info.full_name} {split}",
        layout=layout,
        records=records,
        features=tfds.features.FeaturesDict({name: features[name] for name in used}),
        decoders={layout.image: tfds.decode.SkipDecoding()} if is_encoded else {},
        notes=records.records.notes if isinstance(records, _Parts) else (),
    )


def _ranges(where: str, instructions: list[_Part], long_reads: bool) -> _Parts:
    """The records of a split in a bucket. Raises UserError."""
    files = list(dict.fromkeys(part.file for part in instructions))
    records = array_record_ranges.open_ranges(files, long_reads=long_reads)
    counts = [file.records for file in records.files]
    firsts = dict(zip(files, itertools.accumulate(counts, initial=0), strict=False))
    for part in instructions:
        if (count := counts[files.index(part.file)]) < part.skip + part.take:
            raise UserError(
                f"tfds:{where}: {part.file} has {count} records, and the dataset's metadata {part.examples}; copy the "
                "dataset again"
            )
    return _Parts(
        records,
        firsts=tuple(firsts[part.file] + part.skip for part in instructions),
        starts=tuple(itertools.accumulate((part.take for part in instructions), initial=0)),
    )


def _file_instructions(where: str, split: str, info, folder: str) -> list[_Part]:
    """The records of each file that make the split; UserError if a file is missing."""
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"tfds:{where}: {split!r} is not a split of {folder}{nearest(split, info.splits)}; "
            f"there are {', '.join(sorted(info.splits))}, and parts of them such as train[:90%]"
        ) from error
    if not instructions:
        raise UserError(f"tfds:{where}: split {split!r} of {folder} is empty; take a larger part of it")
    # ArrayRecord opens a missing file without an error, as one without records.
    present = set(tfds_folders.files(folder))
    missing = [i.filename for i in instructions if os.path.basename(i.filename) not in present]
    if missing:
        raise UserError(
            f"tfds:{where}: {len(missing)} of {len(instructions)} shards of split {split!r} are not in {folder}, the "
            f"first is {os.path.basename(missing[0])}; copy them there, or prepare the dataset again"
        )
    return [
        _Part(f"{folder}/{os.path.basename(i.filename)}", i.skip, i.take, i.examples_in_shard) for i in instructions
    ]


def _find_layout(where: str, features: dict[str, Any], boxes: str) -> _Layout:
    """Which features are the image, its captions, its class and its boxes."""
    import tensorflow_datasets as tfds

    layout = _Layout(
        image=_image_feature(features),
        captions=next(filter(None, (_text_path(features, name) for name in _CAPTION_FEATURES)), ()),
        label="label" if isinstance(features.get("label"), tfds.features.ClassLabel) else "",
        boxes=boxes,
    )
    available = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in sorted(features.items()))
    if not layout.image:
        raise UserError(f"tfds:{where}: no image among its features ({available}); take a dataset of images and text")
    if not layout.captions and not layout.label:
        raise UserError(
            f"tfds:{where}: no text ({', '.join(_CAPTION_FEATURES)}) and no class label among its features "
            f"({available}); take a dataset that has one"
        )
    if boxes and not isinstance(features.get(boxes), tfds.features.Text):
        raise UserError(
            f"tfds:{where}: config.data.boxes={boxes}: not a text among its features ({available})"
            f"{nearest(boxes, features)}; clip-jax pack writes boxes as one"
        )
    return layout


def _image_feature(features: dict[str, Any]) -> str:
    """``image``, or whichever feature is the only image; empty if there is none."""
    import tensorflow_datasets as tfds

    def is_image(feature) -> bool:
        if isinstance(feature, tfds.features.LabeledImage):  # A segmentation mask.
            return False
        stored_as_pixels = type(feature) is tfds.features.Tensor and feature.shape[2:] == (3,)
        return (isinstance(feature, tfds.features.Image) or stored_as_pixels) and feature.np_dtype == np.uint8

    names = [name for name, feature in features.items() if is_image(feature)]
    return "image" if "image" in names else names[0] if len(names) == 1 else ""


def _text_path(features: dict[str, Any], name: str) -> tuple[str, ...]:
    """The path to the strings of feature ``name``: itself, or a field of a sequence of records; empty if neither."""
    import tensorflow_datasets as tfds

    def is_text(feature) -> bool:
        # Text is a Tensor too; TFDS stores strings as objects.
        return isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype == np.object_

    feature = features.get(name)
    if isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
        if isinstance(feature, tfds.features.FeaturesDict):
            fields = [f for f in _CAPTION_SUBFEATURES if f in feature and is_text(feature[f])]
            return (name, fields[0]) if fields else ()
    return (name,) if is_text(feature) else ()


def _captions(example: dict, path: tuple[str, ...], key: str) -> tuple[str, ...]:
    for part in path:
        example = example[part]
    texts = [example] if isinstance(example, bytes) else example
    try:
        captions = tuple(filter(None, (text.decode().strip() for text in texts)))
    except UnicodeDecodeError as error:
        raise BadSampleError("caption is not UTF-8", key) from error
    if not captions:
        raise BadSampleError("empty caption", key)
    return captions


def _fingerprint(former: str, instructions: list[_Part], boxes: str) -> str:
    """A hash of names and sizes, and of the bytes of the files."""
    content = [former, identity.of_files([part.file for part in instructions]), *([boxes] if boxes else [])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _former_fingerprint(info, split: str, instructions: list[_Part]) -> str:
    files = [(os.path.basename(part.file), *part[1:]) for part in instructions]
    # The size in bytes differs where a dataset was prepared again, with other content, under the same version.
    identity = [info.full_name, split, sum(part.take for part in instructions), files, int(info.dataset_size)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _is_not_from_tfds(record: logging.LogRecord) -> bool:
    """Keeps TFDS's errors; the rest of its log ("Load dataset info from ...") is for its developers, not for users."""
    return record.levelno >= logging.ERROR or "tensorflow_datasets" not in record.pathname
