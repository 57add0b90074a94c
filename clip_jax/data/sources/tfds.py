"""TFDS datasets as a source: random access to ArrayRecord files, without TensorFlow.

Only what ``download_and_prepare`` left on disk is read: nothing is downloaded, and no dataset's code runs. That is
also why the folder is found here and not by ``tfds.data_source(name)``: for a catalog name without a version that
call runs the dataset's own code, and the code of coco_captions needs TensorFlow.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from typing import Any, NamedTuple

import numpy as np

from clip_jax.data.sources import identity
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.errors import UserError, nearest

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.\-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
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

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = f"{self.title}[{index}]"
        try:
            record = self.records[index]
        except RuntimeError as error:  # ArrayRecord raises nothing else, for bad checksums and failed reads alike.
            if "Corrupted" in str(error):
                raise BadSampleError(f"corrupted record ({error})", key) from error
            raise OSError(f"{key}: {error}") from error
        example = self.features.deserialize_example_np(record, decoders=self.decoders)
        label = int(example[self.layout.label]) if self.layout.label else -1
        if self.layout.captions:
            captions = _captions(example, self.layout.captions, key)
        elif label >= 0:
            captions = (self.class_names[label],)
        else:  # TFDS marks a withheld label with -1.
            raise BadSampleError("no label", key)
        return Sample(image=example[self.layout.image], captions=captions, key=key, label=label)


def open_tfds(where: str, *, tfds_dir: str = "") -> Source:
    """A prepared TFDS dataset by ``name/split``; the split is ``train`` where there is no slash."""
    name, slash, split = where.rpartition("/")
    return open_split(name if slash else where, split if slash else "train", data_dir=tfds_dir)


def open_split(where: str, split: str, *, data_dir: str = "") -> Source:
    """One split of a prepared TFDS dataset: ``where`` is ``name``, ``name/config`` or ``name/config:version``.

    ``split`` is TFDS's: ``train``, ``test``, ``train[:90%]``, ``train+restval``. ``data_dir`` defaults to TFDS's own
    (``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``). Images stay encoded. Where there is a label and no text, the
    class name is the caption. Raises UserError for anything missing or malformed.
    """
    logging.getLogger("absl").addFilter(_is_not_from_tfds)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"tfds:{where}: {error}; pip install tensorflow-datasets array_record") from error

    folder = _find(where, data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS has no error of its own for broken metadata.
        raise UserError(f"tfds:{where}: cannot read {folder}: {_first_line(error)}; prepare it again") from error
    info, features = builder.info, dict(builder.info.features)
    formats = sorted(f.value for f in info.available_file_formats())
    if "array_record" not in formats:
        raise UserError(
            f"tfds:{where}: {folder} has {' and '.join(formats)} files, which have no random access; move that "
            f"folder away (TFDS keeps and reuses its downloads) and {_how_to_prepare(where, data_dir)}"
        )
    # A converted dataset still has TFRecord as its first format.
    info.set_file_format("array_record", override=True, override_if_initialized=True)
    instructions = _file_instructions(where, split, info, folder)
    layout = _find_layout(where, features)
    former = _former_fingerprint(info, split, instructions)
    used = dict.fromkeys(filter(None, (layout.image, *layout.captions[:1], layout.label)))
    is_encoded = isinstance(features[layout.image], tfds.features.Image)
    return _TfdsSource(
        name=f"tfds:{where}/{split}",
        fingerprint=_fingerprint(former, instructions),
        former_fingerprint=former,
        class_names=tuple(features[layout.label].names) if layout.label else (),
        title=f"{info.full_name} {split}",
        layout=layout,
        records=builder.as_data_source(
            split, file_format="array_record", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        ),
        features=tfds.features.FeaturesDict({name: features[name] for name in used}),
        decoders={layout.image: tfds.decode.SkipDecoding()} if is_encoded else {},
    )


def _find(where: str, data_dir: str):
    """The folder ``data_dir/name[/config]/version`` for ``where``, the newest version by default."""
    import tensorflow_datasets as tfds
    from etils import epath

    named = _NAME.fullmatch(where)
    if named is None:
        raise UserError(f"tfds:{where}: write name, name/config or name/config:1.2.3, such as tfds:coco_captions")
    name, config, version = named["name"], named["config"], named["version"]
    root = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    try:
        prepared = _subfolders(root)
        if name not in prepared:
            catalog = tfds.list_builders(with_community_datasets=False)
            if name not in catalog:
                hint = nearest(name, [*prepared, *catalog])
                raise UserError(f"tfds:{where}: {name} is neither in {root} nor in the TFDS catalog{hint}")
            raise UserError(f"tfds:{where}: {name} is not in {root}; {_how_to_prepare(where, data_dir)}")
        folder = root / name
        inside = _subfolders(folder)
        configs = [i for i in inside if not _VERSION.fullmatch(i)]
        if config is None and len(configs) == len(inside):
            config = _default_config(folder) or (configs[0] if len(configs) == 1 else None)
            if config is None and configs:
                choices = ", ".join(f"tfds:{name}/{c}" for c in configs)
                raise UserError(f"tfds:{where}: {folder} has several configs; name one: {choices}")
        if config is not None:
            if config not in configs:
                raise UserError(
                    f"tfds:{where}: config {config} is not in {folder}; there is {', '.join(configs) or 'none'}: name "
                    f"that, or {_how_to_prepare(where, data_dir)}"
                )
            folder /= config
        versions = [v for v in _subfolders(folder) if _VERSION.fullmatch(v)]
    except (OSError, ImportError, ValueError) as error:  # ImportError: etils needs gcsfs for a bucket.
        raise UserError(f"tfds:{where}: cannot read {root}: {_first_line(error)}") from error
    if not versions:
        raise UserError(f"tfds:{where}: {folder} has no finished version; {_how_to_prepare(where, data_dir)}")
    if version and version not in versions:
        raise UserError(
            f"tfds:{where}: version {version} is not in {folder}; there is {', '.join(versions)}: name that, or "
            f"{_how_to_prepare(where, data_dir)}"
        )
    return folder / (version or max(versions, key=lambda v: tuple(map(int, v.split(".")))))


def _subfolders(folder) -> list[str]:
    """Names, sorted; without TFDS's own ``.config`` and ``downloads``, and without interrupted builds."""
    if not folder.exists():
        return []
    names = (p.name for p in folder.iterdir() if p.is_dir())
    return sorted(n for n in names if not n.startswith((".", "incomplete.")) and n != "downloads")


def _default_config(folder) -> str | None:
    metadata = folder / ".config" / "metadata.json"
    return json.loads(metadata.read_text()).get("default_config_name") if metadata.exists() else None


def _how_to_prepare(where: str, data_dir: str) -> str:
    argument = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        "prepare it once, in an environment of its own: pip install 'clip-jax-tpu[tfds-build]' && python -c "
        f'"import tensorflow_datasets as tfds; '
        f"tfds.builder('{where}'{argument}, file_format='array_record').download_and_prepare()\""
    )


def _file_instructions(where: str, split: str, info, folder) -> list:
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
    present = {path.name for path in folder.iterdir()}
    missing = [i.filename for i in instructions if os.path.basename(i.filename) not in present]
    if missing:
        raise UserError(
            f"tfds:{where}: {len(missing)} of {len(instructions)} shards of split {split!r} are not in {folder}, the "
            f"first is {os.path.basename(missing[0])}; copy them there, or prepare the dataset again"
        )
    return instructions


def _find_layout(where: str, features: dict[str, Any]) -> _Layout:
    """Which features are the image, its captions and its class."""
    import tensorflow_datasets as tfds

    layout = _Layout(
        image=_image_feature(features),
        captions=next(filter(None, (_text_path(features, name) for name in _CAPTION_FEATURES)), ()),
        label="label" if isinstance(features.get("label"), tfds.features.ClassLabel) else "",
    )
    available = ", ".join(f"{name}: {type(feature).__name__}" for name, feature in sorted(features.items()))
    if not layout.image:
        raise UserError(f"tfds:{where}: no image among its features ({available}); take a dataset of images and text")
    if not layout.captions and not layout.label:
        raise UserError(
            f"tfds:{where}: no text ({', '.join(_CAPTION_FEATURES)}) and no class label among its features "
            f"({available}); take a dataset that has one"
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


def _fingerprint(former: str, instructions: list) -> str:
    """A hash of names and sizes, and of the bytes of local files."""
    files = [i.filename for i in instructions]
    digests = [] if any("://" in file for file in files) else identity.of_files(files)
    return hashlib.sha256(json.dumps([former, digests]).encode()).hexdigest()[:24]


def _former_fingerprint(info, split: str, instructions: list) -> str:
    files = [(os.path.basename(i.filename), i.skip, i.take, i.examples_in_shard) for i in instructions]
    # The size in bytes differs where a dataset was prepared again, with other content, under the same version.
    identity = [info.full_name, split, sum(i.take for i in instructions), files, int(info.dataset_size)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _is_not_from_tfds(record: logging.LogRecord) -> bool:
    """Keeps TFDS's errors; the rest of its log ("Load dataset info from ...") is for its developers, not for users."""
    return record.levelno >= logging.ERROR or "tensorflow_datasets" not in record.pathname


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
