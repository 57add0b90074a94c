"""Embeddings of a frozen image tower, read from a folder of ``clip-jax embed`` in place of the images (LiT).

Where neither the tower nor the images change, an embedding is computed once (Zhai et al. 2022, LiT, section 5).
"""

from pathlib import Path

import jax
import numpy as np

from clip_jax.data import images
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.stream import read
from clip_jax.data.views import Arrays, View
from clip_jax.errors import UserError
from clip_jax.evaluation import index
from clip_jax.models.clip import unit
from clip_jax.training.learner import Learner
from clip_jax.training.state import TrainState

SETTING = "config.data.image_embeddings"
LEAST_COSINE = 0.99
"""The least cosine of a stored embedding and today's: other types and devices stay above it, other weights below."""


def view(folder: str, width: int) -> View:
    """The view in place of the image's: float16[width]. Raises UserError for a folder of another width."""
    path = Path(folder).expanduser()
    index.manifest(path)
    shards, rows = index.embeddings(path, "image"), index.rows_of_examples(path)
    starts = np.cumsum([0, *map(len, shards)])
    if shards[0].shape[1] != width:
        raise UserError(f"{SETTING}={folder}: {shards[0].shape[1]} features, and the model has {width}")

    def fill(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        row = rows[sample.index] if sample.index < len(rows) else -1
        if row < 0:
            raise BadSampleError("no stored embedding", sample.key)
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        arrays["image_embedding"][:] = shards[shard][row - starts[shard]]

    return View({"image_embedding": ((width,), np.dtype(np.float16))}, fill)


def check_source(folder: str, train: Source) -> None:
    """Raises UserError for embeddings of other data."""
    if folder and index.manifest(Path(folder).expanduser())["source"] != train.fingerprint:
        raise UserError(f"{SETTING}={folder}: of other data than {train.name}; repeat clip-jax embed")


def check_weights(learner: Learner, state: TrainState, train: Source) -> None:
    """Raises UserError if the first example's embedding is not that of the frozen tower."""
    stored = learner.views["image"]
    if "image_embedding" not in stored.arrays:
        return
    tower, how = learner.model.architecture.image, learner.preprocess
    for number in range(len(train)):
        try:
            sample = read(train, number)._replace(index=number)
            found = {"image_embedding": np.zeros(stored.arrays["image_embedding"][0], np.float32)}
            stored.fill(sample, np.random.default_rng(0), found)
            pixels = images.resize_and_crop(
                sample.image, tower.image_size, resize=how.resize, interpolation=how.interpolation, exif=how.exif
            )
            break
        except (BadSampleError, images.BadImageError):
            continue
    else:
        return
    # One image for each part of the batch: the model is on the mesh.
    batch = np.repeat(pixels[None], learner.mesh.size, axis=0)
    encode = jax.jit(lambda params, stats, x: unit(learner.model.encode_image(params, how.normalize(x), stats))[0])
    cosine = float(np.dot(np.asarray(encode(state.params, state.batch_stats, batch)), found["image_embedding"]))
    if cosine < LEAST_COSINE:
        raise UserError(
            f"{SETTING}: embeddings of another model than config.model.init_from (the cosine of the first is "
            f"{cosine:.3f}); repeat clip-jax embed with its weights"
        )
