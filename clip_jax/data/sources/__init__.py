"""Where image-text pairs come from: random access over files, one small interface.

A source is named in a config by ``kind:where``, for example ``tar:/data/train-*.tar``, ``tfds:coco_captions``,
``folder:photos`` or ``shapes:train``; ``open_source`` turns the name into a ``Source``.
"""

from typing import NamedTuple, Protocol

import numpy as np

from clip_jax.errors import UserError, nearest


class Sample(NamedTuple):
    """One image with what is said about it, not yet decoded."""

    image: bytes | np.ndarray
    """The encoded file (JPEG, PNG, WebP), or uint8[height, width, 3] where there is no file."""
    captions: tuple[str, ...]
    """Never empty; where there are several, training takes one at random and evaluation all of them."""
    key: str
    """How messages name the sample: shard and member, file name, dataset key."""
    label: int = -1
    """The class, for zero-shot classification; -1 where there is none."""


class BadSampleError(Exception):
    """A sample that cannot be used (empty caption, undecodable image): counted, replaced, never fatal alone."""

    def __init__(self, reason: str, key: str):
        super().__init__(f"{key}: {reason}")
        self.reason, self.key = reason, key


class Source(Protocol):
    """Random access to N samples; safe to call from several threads at once."""

    name: str
    """As in the config: ``kind:where``."""
    fingerprint: str
    """Changes whenever a sample or their order does, so that a resumed run can refuse other data."""
    class_names: tuple[str, ...]
    """What ``Sample.label`` indexes; empty where samples have no labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSampleError for a fault of this sample alone, OSError for one that may pass."""
        ...


KINDS = {
    "shapes": "the bundled dataset: shapes:train, shapes:heldout, shapes:zero_shot",
    "tar": "webdataset shards: tar:FOLDER, tar:FOLDER/train-*.tar",
    "tfds": "a prepared TFDS dataset: tfds:coco_captions (its train split) or tfds:coco_captions/val",
    "folder": "images with a .txt each: folder:DIR",
}


def open_source(where: str, *, image_size: int, caption: str = "txt", truncated: str = "stop", tfds_dir: str = ""):
    """``kind:where`` -> Source. Raises UserError for an unknown kind and for anything missing or malformed.

    ``image_size`` is for sources that render rather than read.
    """
    kind, _, rest = where.partition(":")
    if kind == "shapes":
        from clip_jax.data.shapes import open_shapes

        return open_shapes(rest, image_size=image_size)
    if kind == "tar":
        from clip_jax.data.sources.tar import open_tar

        return open_tar(rest, caption=caption, truncated=truncated)
    if kind == "tfds":
        from clip_jax.data.sources.tfds import open_tfds

        name, slash, split = rest.rpartition("/")
        return open_tfds(name if slash else rest, split if slash else "train", data_dir=tfds_dir)
    if kind == "folder":
        from clip_jax.data.sources.folder import open_folder

        return open_folder(rest)
    raise UserError(f"{where}: not a source{nearest(kind, KINDS)}; sources are " + "; ".join(KINDS.values()))
