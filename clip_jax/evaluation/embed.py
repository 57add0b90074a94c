"""A source through both towers: every sample exactly once, whatever the batch size, devices and processes.

The last batch is filled up with blank rows that are dropped again; a sample that cannot be used is left out and
counted. Every process reads and judges all samples, sends the rows its devices hold, and gets all embeddings.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax.data import images
from clip_jax.data.sources import BadSampleError, Sample, Source
from clip_jax.data.stream import read
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.models.clip import CLIP, unit
from clip_jax.presets import Preprocess
from clip_jax.sharding import batch_sharding, batch_shards, process_rows, replicated, to_devices

Weights = tuple[Any, Any]
"""Parameters and batch statistics."""


class Embedded(NamedTuple):
    """The embeddings of a source, all of unit length."""

    images: Float[np.ndarray, "images dim"]
    texts: Float[np.ndarray, "texts dim"]
    owner: Int[np.ndarray, " texts"]
    """The image that each text describes; an image's texts follow each other."""
    labels: Int[np.ndarray, " images"]
    captions: tuple[str, ...]
    indices: Int[np.ndarray, " images"]
    """Where in the source each image is."""
    skipped: collections.Counter
    """Samples left out, by reason."""


class Encoders(NamedTuple):
    """Jitted towers on a mesh: ((params, batch_stats), global batch) -> unit embeddings, the same on every process."""

    image: Callable[[Any, jax.Array], jax.Array]
    text: Callable[[Any, jax.Array], jax.Array]


def make_encoders(model: CLIP, preprocess: Preprocess, mesh: Mesh) -> Encoders:
    """Towers over uint8[B, H, W, 3] and int32[B, L]; the batch is split over the mesh, the result is everywhere."""
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def image(weights, pixels):
        params, batch_stats = weights
        return unit(model.encode_image(params, preprocess.normalize(pixels), batch_stats))

    def text(weights, tokens):
        params, _ = weights
        return unit(model.encode_text(params, tokens))

    return Encoders(
        jax.jit(image, in_shardings=(None, rows), out_shardings=whole),
        jax.jit(text, in_shardings=(None, rows), out_shardings=whole),
    )


def embed_texts(
    texts: Sequence[str], encoders: Encoders, weights: Weights, tokenizer: Tokenizer, mesh: Mesh, batch_size: int
) -> Float[np.ndarray, "texts dim"]:
    """Unit embeddings of texts, in their order."""
    batch_size = _round_up(batch_size, batch_shards(mesh))
    rows = process_rows(mesh, batch_size)
    out = []
    for start in range(0, len(texts), batch_size):
        tokens = tokenizer(list(texts[start : start + batch_size]))
        padded = np.resize(tokens, (batch_size, tokens.shape[1]))
        batch = to_devices({"text": padded[rows]}, mesh, batch_size)
        out.append(np.asarray(encoders.text(weights, batch["text"]))[: len(tokens)])
    return np.concatenate(out)


def embed_images(
    samples: Sequence[Sample],
    encoders: Encoders,
    weights: Weights,
    image_size: int,
    preprocess: Preprocess,
    mesh: Mesh,
    batch_size: int,
    *,
    workers: int,
) -> tuple[Float[np.ndarray, "samples dim"], list[str]]:
    """(unit embeddings in order, the reason why each could not be decoded or ""); rows with a reason mean nothing."""
    batch_size = _round_up(batch_size, batch_shards(mesh))
    rows = process_rows(mesh, batch_size)
    out, faults = [], []

    def decode(sample: Sample) -> tuple[np.ndarray, str]:
        try:
            resize, interpolation = preprocess.resize, preprocess.interpolation
            return images.resize_and_crop(sample.image, image_size, resize=resize, interpolation=interpolation), ""
        except images.BadImageError as error:
            return np.zeros((image_size, image_size, 3), np.uint8), str(error)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            # All rows, not only ours: the verdict on a broken image must be the same on every process.
            decoded = list(pool.map(decode, chunk))
            pixels = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
            pixels[: len(chunk)] = [image for image, _ in decoded]
            batch = to_devices({"image": pixels[rows]}, mesh, batch_size)
            out.append(np.asarray(encoders.image(weights, batch["image"]))[: len(chunk)])
            faults += [fault for _, fault in decoded]
    return np.concatenate(out), faults


def embed_source(
    source: Source,
    encoders: Encoders,
    weights: Weights,
    tokenizer: Tokenizer,
    image_size: int,
    preprocess: Preprocess,
    mesh: Mesh,
    batch_size: int,
    *,
    workers: int = 2,
) -> Embedded:
    """Every usable sample of a source with all its captions."""
    skipped: collections.Counter = collections.Counter()
    embeddings, kept, indices = [], [], []
    for start in range(0, len(source), batch_size):
        samples, places = [], []
        for index in range(start, min(start + batch_size, len(source))):
            try:
                samples.append(read(source, index))
                places.append(index)
            except BadSampleError as error:
                skipped[error.reason] += 1
        if not samples:
            continue
        arrays, faults = embed_images(
            samples, encoders, weights, image_size, preprocess, mesh, batch_size, workers=workers
        )
        good = np.array([not fault for fault in faults])
        skipped.update(fault for fault in faults if fault)
        embeddings.append(arrays[good])
        # The encoded images are let go here: a large set must not be held in memory.
        kept += [(s.captions, s.label) for s, ok in zip(samples, good, strict=True) if ok]
        indices += [place for place, ok in zip(places, good, strict=True) if ok]
    captions = tuple(caption for texts, _ in kept for caption in texts)
    owner = np.array([i for i, (texts, _) in enumerate(kept) for _ in texts], np.int64)
    return Embedded(
        images=np.concatenate(embeddings),
        texts=embed_texts(captions, encoders, weights, tokenizer, mesh, batch_size),
        owner=owner,
        labels=np.array([label for _, label in kept], np.int64),
        captions=captions,
        indices=np.array(indices, np.int64),
        skipped=skipped,
    )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
