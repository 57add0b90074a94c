"""Where image-text pairs come from: random access over files, by the small interface in ``sample.py``.

A source is named in a config by ``kind:where``, for example ``tar:/data/train-*.tar``, ``tfds:coco_captions``,
``folder:photos`` or ``shapes:train``; ``open_source`` turns the name into a ``Source``. A new kind is a file here and
a line in ``KINDS``; a library that takes long to import is imported by its opener, not by the file.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from clip_jax.data.sources.array_record import open_array_record
from clip_jax.data.sources.folder import open_folder
from clip_jax.data.sources.memory import open_memory
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.sources.shapes import open_shapes
from clip_jax.data.sources.table import open_csv, open_parquet
from clip_jax.data.sources.tar import open_tar
from clip_jax.data.sources.tfds import open_tfds
from clip_jax.errors import UserError, nearest

__all__ = ["KINDS", "BadSampleError", "Sample", "Source", "has_boxes", "open_source"]


class Kind(NamedTuple):
    """How the sources of one kind are opened: ``open(where, **options)``."""

    open: Callable[..., Source]
    options: tuple[str, ...]
    """Which of the options of ``open_source`` it takes."""
    usage: str


KINDS = {
    "shapes": Kind(open_shapes, ("image_size",), "the bundled dataset: shapes:train, shapes:heldout, shapes:zero_shot"),
    "tar": Kind(
        open_tar,
        ("caption", "truncated", "max_bad_share", "long_reads", "boxes"),
        "webdataset shards: tar:FOLDER, tar:FOLDER/train-*.tar, tar:FOLDER/{0000..0099}.tar",
    ),
    "tfds": Kind(
        open_tfds,
        ("tfds_dir", "long_reads", "boxes"),
        "a prepared TFDS dataset: tfds:coco_captions (its train split) or tfds:coco_captions/val",
    ),
    "parquet": Kind(
        open_parquet, ("image", "caption", "boxes"), "a table of images or paths with captions: parquet:FILES"
    ),
    "csv": Kind(open_csv, ("image", "caption", "boxes"), "a table of paths with captions, .csv or .tsv: csv:FILES"),
    "array_record": Kind(
        open_array_record, ("image", "caption", "long_reads", "boxes"), "ArrayRecord files of tf.train.Example records"
    ),
    "folder": Kind(
        open_folder, ("caption", "links_to", "max_bad_share", "boxes"), "images with a .txt each: folder:DIR"
    ),
    "memory": Kind(open_memory, (), "pairs that this process has put there (memory.py): memory:NAME"),
}


def has_boxes(where: str) -> bool:
    """Whether boxes of a source of this kind can be read; those of ``shapes`` need no setting."""
    kind = KINDS.get(where.partition(":")[0])
    return kind is not None and "boxes" in kind.options


def open_source(where: str, **options: Any) -> Source:
    """``kind:where`` -> Source. Raises UserError for an unknown kind and for anything missing or malformed.

    ``options`` are those of all kinds (``KINDS``); each kind takes its own and has a default for every one of them.
    """
    name, _, rest = where.partition(":")
    if name not in KINDS:
        usages = "; ".join(kind.usage for kind in KINDS.values())
        raise UserError(f"{where}: not a source{nearest(name, KINDS)}; sources are {usages}")
    if unknown := options.keys() - {option for kind in KINDS.values() for option in kind.options}:
        raise TypeError(f"open_source: no kind of source takes {', '.join(sorted(unknown))}")
    kind = KINDS[name]
    if options.get("boxes") and not has_boxes(where):
        having = ", ".join(other for other, its in KINDS.items() if "boxes" in its.options)
        raise UserError(f"{where}: config.data.boxes={options['boxes']}: {having} sources can have boxes; leave it out")
    return kind.open(rest, **{option: value for option, value in options.items() if option in kind.options})
