"""The batch contract: which arrays an example gives, and how each is filled.

A batch is a dictionary of arrays whose first axis is the batch. Every array belongs to a view; the image and the
text of a pair are two of them, and a training objective may declare more (a second crop, a masked caption). The stream,
the plan, tests and benchmarks read shapes and types here and nowhere else.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from clip_jax.data import fast_crops, images
from clip_jax.data.augment import NONE, Augment
from clip_jax.data.augment import augment as augmented
from clip_jax.data.sources import boxes
from clip_jax.data.sources.sample import Sample
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices.sharding import batch_sharding

Shape = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]
Spec = dict[str, jax.ShapeDtypeStruct]


class View(NamedTuple):
    """Some arrays of a batch."""

    arrays: Mapping[str, tuple[Shape, np.dtype]]
    """Name in the batch -> shape and type for one example."""
    fill: Callable[[Sample, np.random.Generator, Arrays], Sample | None]
    """Writes one example into its row of each array. Raises BadImageError or BadSampleError for an unusable one.

    A view of the pair may return the example as the views after it shall see it: its boxes as they lie in the crop.
    """


PAIR = ("text", "image")
"""The views of the pair, in the order in which they draw from one generator; each other view has its own."""


def pair_views(
    *,
    image_size: int,
    context_length: int,
    tokenizer: Tokenizer | None,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    interpolation: str,
    exif: bool = False,
    resize: str = "pillow",
    augment: Augment = NONE,
) -> dict[str, View]:
    """The caption (one of the example's, at random) and the image (a random crop, augmented).

    Without a tokenizer the views have shapes only; that is all that a plan needs. Raises UserError where ``resize``
    names a library that is not installed.
    """
    if resize == "simd" and tokenizer is not None:
        fast_crops.library()  # before a worker finds it missing
    crop = fast_crops.random_resized_crop if resize == "simd" else images.random_resized_crop

    def fill_text(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        if sample.shares:
            number = int(np.searchsorted(np.cumsum(sample.shares[:-1]), rng.random(), side="right"))
        else:
            number = int(rng.integers(len(sample.captions)))
        arrays["text"][:] = tokenizer([sample.captions[number]])[0]

    def fill_image(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> Sample:
        found = crop(
            sample.image,
            image_size,
            rng,
            scale=crop_scale,
            ratio=crop_ratio,
            interpolation=interpolation,
            exif=exif,
        )
        found = augmented(found, rng, augment)
        arrays["image"][:] = found.pixels
        if not sample.extras.get("boxes"):
            return sample
        return sample._replace(extras={**sample.extras, "boxes": boxes.carry(sample.extras["boxes"], found)})

    return {
        "text": View({"text": ((context_length,), np.dtype(np.int32))}, fill_text),
        "image": View({"image": ((image_size, image_size, 3), np.dtype(np.uint8))}, fill_image),
    }


def boxes_view(number: int, context_length: int, tokenizer: Tokenizer | None) -> View:
    """Up to ``number`` boxes of an example as they lie in the image of the pair, in their order; of more, some.

    ``boxes`` float32[number, 4] are left, top, right and bottom in 0..1, ``box_text`` int32[number, context_length] the
    tokens of their texts; both are zero where ``has_box`` bool[number] is false.
    """

    def fill(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        found = sample.extras.get("boxes", ())
        if len(found) > number:
            found = [found[i] for i in np.sort(rng.choice(len(found), number, replace=False))]
        arrays["has_box"][:] = np.arange(number) < len(found)
        arrays["boxes"][:] = arrays["box_text"][:] = 0
        if found:
            arrays["boxes"][: len(found)] = [box.sides for box in found]
            arrays["box_text"][: len(found)] = tokenizer([box.text for box in found])

    arrays = {
        "boxes": ((number, 4), np.dtype(np.float32)),
        "box_text": ((number, context_length), np.dtype(np.int32)),
        "has_box": ((number,), np.dtype(bool)),
    }
    return View(arrays, fill)


def empty_batch(views: Mapping[str, View], rows: int) -> dict[str, np.ndarray]:
    """Uninitialized arrays for ``rows`` examples."""
    return {
        name: np.empty((rows, *shape), dtype) for view in views.values() for name, (shape, dtype) in view.arrays.items()
    }


def batch_spec(views: Mapping[str, View], batch_size: int, mesh: Mesh | AbstractMesh) -> Spec:
    """The global batch on a mesh: name -> shape, type and sharding."""
    rows = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
        for view in views.values()
        for name, (shape, dtype) in view.arrays.items()
    }
