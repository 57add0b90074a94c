"""Small TFDS datasets on disk, written by TFDS itself without TensorFlow.

``download_and_prepare`` needs TensorFlow only where a dataset's own code does: Coco's features are written with
``tf.int64``. A builder of NumPy types runs without it, and what it leaves on disk (features.json, dataset_info.json,
labels, ArrayRecord shards) is what a user's own ``download_and_prepare`` leaves.
"""

import contextlib
import io
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds

from tests.data.shards import jpeg

COCO_SPLITS = {"train": 8, "val": 4, "test": 4, "restval": 4}


def write_tfds(
    root: Path,
    dataset: str,
    features: dict[str, Any],
    splits: dict[str, list[dict]],
    *,
    config: str = "",
    version: str = "1.0.0",
    shards: int = 1,
) -> Path:
    """Writes the examples of each split, in their order; returns the folder ``root/dataset[/config]/version``."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config, version=version),) if config else ()

        def _info(self):
            # TFDS shuffles by a hash of the key; without that a test can say what sample 3 is.
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split, examples in splits.items()}

        def _generate_examples(self):
            raise AssertionError("the splits are iterators already")

    quiet = io.StringIO()
    no_network = mock.patch.object(tfds.core.DatasetInfo, "initialize_from_bucket", lambda self: None)
    with no_network, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        builder = Builder(data_dir=root, file_format="array_record")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
    return Path(builder.data_dir)


def write_coco_captions(root: Path, *, splits: dict[str, int] | None = None, shards: int = 1) -> dict[str, list[dict]]:
    """coco_captions as the catalog has it (version 1.1.0, config 2014), of small pictures with five captions each.

    Returns the examples that were written, by split: ``image`` is the JPEG file, ``captions`` a list of {id, text}.
    """
    objects = {
        "area": np.int64,
        "bbox": tfds.features.BBoxFeature(),
        "id": np.int64,
        "is_crowd": np.bool_,
        "label": tfds.features.ClassLabel(num_classes=80),
    }
    features = {
        "captions": tfds.features.Sequence({"id": np.int64, "text": np.str_}),
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(objects),
    }
    written, first = {}, 0
    for split, count in (splits or COCO_SPLITS).items():
        written[split] = [_coco_example(first + i) for i in range(count)]
        first += count
    examples = {split: [e | {"image": io.BytesIO(e["image"])} for e in rows] for split, rows in written.items()}
    write_tfds(root, "coco_captions", features, examples, config="2014", version="1.1.0", shards=shards)
    return written


def _coco_example(number: int) -> dict:
    box = tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=0.5, xmax=0.5)
    thing = {"area": 9, "bbox": box, "id": number, "is_crowd": False, "label": number % 80}
    texts = [f"Picture {number}, described by {who}." for who in ("Ada", "Bea", "Zoë", "Dan", "Eve")]
    return {
        "captions": [{"id": 10 * number + i, "text": text} for i, text in enumerate(texts)],
        "image": jpeg(number),
        "image/filename": f"COCO_val2014_{number:012d}.jpg",
        "image/id": number,
        "objects": [thing] * (number % 2),  # COCO has pictures without objects too.
    }
