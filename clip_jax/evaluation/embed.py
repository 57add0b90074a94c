"""A source through both towers: every example exactly once, whatever the batch size, devices and processes.

The last batch is padded with rows that are dropped again; an unusable example is left out and counted. Each process
reads all examples, decodes and tokenizes the rows that its devices hold, and receives all embeddings; one validity bit
per row is gathered with them, so that all processes agree on what to leave out.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Bool, Float, Int

from clip_jax.data import images
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.stream import read
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices.sharding import batch_sharding, batch_shards, process_rows, replicated, to_devices
from clip_jax.errors import UserError
from clip_jax.models.clip import CLIP, Params, unit
from clip_jax.models.generate import complete
from clip_jax.presets import Preprocess

ELSEWHERE = "undecodable image (on another process)"


class Variables(NamedTuple):
    """The parameters and statistics of both towers."""

    params: Params
    batch_stats: Params


class Embedded(NamedTuple):
    """The embeddings of a source, all of unit length."""

    images: Float[np.ndarray, "images dim"]
    texts: Float[np.ndarray, "texts dim"]
    owner: Int[np.ndarray, " texts"]
    """The image that each text describes; the texts of an image are consecutive."""
    labels: Int[np.ndarray, " images"]
    captions: tuple[str, ...]
    indices: Int[np.ndarray, " images"]
    """The index of each image in the source."""
    skipped: collections.Counter
    """Examples left out, by reason."""


class Encoders(NamedTuple):
    """Jitted towers on a mesh, from a global batch to unit embeddings that every process has."""

    image: Callable[[Variables, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """(weights, uint8[B, H, W, 3], valid bool[B]) -> (embeddings, valid)"""
    text: Callable[[Variables, jax.Array], jax.Array]
    """(weights, int32[B, L]) -> embeddings"""
    complete: Callable[[Variables, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    """(weights, uint8[B, H, W, 3], first ids int32[B, L], their number int32[B]) -> int32[B, L], the ids of a text
    about each image; None if the model has no decoder that reads a text."""
    pooled: Callable[[Variables, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    """Like ``image``, with the features before the projection, not of unit length (``CLIP.pool_image``)."""


class Embedder(NamedTuple):
    """The towers with everything that turns files and texts into embeddings."""

    encoders: Encoders
    tokenizer: Tokenizer
    preprocess: Preprocess
    image_size: int
    mesh: Mesh
    batch_size: int
    """Over all devices; a multiple of the devices that split a batch."""
    workers: int
    """Threads that decode."""
    model: CLIP
    """For what needs more than embeddings: the maps of patches."""
    width: int
    """Features of an embedding."""

    def pooled(self) -> "Embedder":
        """With the features before the projection in place of the embeddings of images."""
        return self._replace(encoders=self.encoders._replace(image=self.encoders.pooled))


def make_encoders(model: CLIP, preprocess: Preprocess, mesh: Mesh | AbstractMesh) -> Encoders:
    """The batch is split over the mesh, on which the model must compute (``model.compute.mesh``)."""
    rows, everywhere = batch_sharding(mesh), replicated(mesh)

    def image(weights: Variables, pixels: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded = model.encode_image(weights.params, preprocess.normalize(pixels), weights.batch_stats)
        return unit(encoded), valid

    def pooled(weights: Variables, pixels: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        return model.pool_image(weights.params, preprocess.normalize(pixels)), valid

    def text(weights: Variables, tokens: jax.Array) -> jax.Array:
        return unit(model.encode_text(weights.params, tokens))

    def completed(weights: Variables, pixels: jax.Array, given: jax.Array, count: jax.Array) -> jax.Array:
        _, patches = model.image_tower.apply({"params": weights.params["image"]}, preprocess.normalize(pixels))
        return complete(model, weights.params, patches, given, count, model.architecture.text.vocab_size)

    decoder = model.architecture.decoder
    reads = decoder is not None and decoder.form == "cappa"
    return Encoders(
        jax.jit(image, in_shardings=(None, rows, rows), out_shardings=everywhere),
        jax.jit(text, in_shardings=(None, rows), out_shardings=everywhere),
        jax.jit(completed, in_shardings=(None, rows, rows, rows), out_shardings=everywhere) if reads else None,
        jax.jit(pooled, in_shardings=(None, rows, rows), out_shardings=everywhere),
    )


def make_embedder(
    model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer, mesh: Mesh, batch_size: int, workers: int
) -> Embedder:
    """``batch_size`` is rounded up to a multiple of the devices that split a batch."""
    shards = batch_shards(mesh)
    return Embedder(
        encoders=make_encoders(model, preprocess, mesh),
        tokenizer=tokenizer,
        preprocess=preprocess,
        image_size=model.architecture.image.image_size,
        mesh=mesh,
        batch_size=-(-batch_size // shards) * shards,
        workers=workers,
        model=model,
        width=model.architecture.embed_dim,
    )


def embed_texts(embedder: Embedder, weights: Variables, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
    """Unit embeddings of texts, in their order."""
    rows = process_rows(embedder.mesh, embedder.batch_size)
    out, running = [], collections.deque()
    for start in range(0, len(texts), embedder.batch_size):
        chunk = texts[start : start + embedder.batch_size]
        tokens = embedder.tokenizer([chunk[row % len(chunk)] for row in rows])
        batch = to_devices({"text": tokens}, embedder.mesh, embedder.batch_size)
        running.append((embedder.encoders.text(weights, batch["text"]), len(chunk)))
        if len(running) > 1:  # the next texts are tokenized while the devices encode these
            out.append(_take(*running.popleft()))
    return np.concatenate(out + [_take(*batch) for batch in running])


def _take(embeddings: jax.Array, count: int) -> np.ndarray:
    return np.asarray(embeddings)[:count]


def decode_batch(
    embedder: Embedder, samples: Sequence[Sample], pool: ThreadPoolExecutor
) -> tuple[dict[str, jax.Array], collections.Counter]:
    """At most a batch of images on the devices, ``image`` uint8[B, H, W, 3] and ``valid`` bool[B]; and why some are not
    valid, of those that this process decoded."""
    size, preprocess = embedder.image_size, embedder.preprocess

    def decode(sample: Sample) -> tuple[np.ndarray | None, str]:
        try:
            return images.resize_and_crop(
                sample.image,
                size,
                resize=preprocess.resize,
                interpolation=preprocess.interpolation,
                exif=preprocess.exif,
            ), ""
        except images.BadImageError as error:
            return None, str(error)

    rows = process_rows(embedder.mesh, embedder.batch_size)
    mine = [int(row) for row in rows if row < len(samples)]
    pixels, valid = np.zeros((len(rows), size, size, 3), np.uint8), np.zeros(len(rows), bool)
    faults: collections.Counter = collections.Counter()
    for position, (image, fault) in enumerate(pool.map(decode, [samples[row] for row in mine])):
        if image is None:
            faults[fault] += 1
        else:
            pixels[position], valid[position] = image, True
    return to_devices({"image": pixels, "valid": valid}, embedder.mesh, embedder.batch_size), faults


def embed_images(
    embedder: Embedder, weights: Variables, samples: Sequence[Sample], pool: ThreadPoolExecutor
) -> tuple[Float[np.ndarray, "samples dim"], Bool[np.ndarray, " samples"], collections.Counter]:
    """(unit embeddings of at most a batch, which of them are valid, why the others are not)."""
    batch, faults = decode_batch(embedder, samples, pool)
    embeddings, valid = jax.tree.map(np.asarray, embedder.encoders.image(weights, batch["image"], batch["valid"]))
    valid = valid[: len(samples)]
    elsewhere = int(np.sum(~valid)) - faults.total()
    if elsewhere:
        faults[ELSEWHERE] += elsewhere
    return embeddings[: len(samples)], valid, faults


def readable(source: Source, start: int, stop: int) -> tuple[list[Sample], list[int], list[BadSampleError]]:
    """(the usable examples from ``start`` to ``stop``, their indices, the faults of the others)."""
    samples, found, faults = [], [], []
    for index in range(start, stop):
        try:
            samples.append(read(source, index))
            found.append(index)
        except BadSampleError as error:
            faults.append(error)
    return samples, found, faults


def embed_source(
    embedder: Embedder, weights: Variables, source: Source, limit: int | None = None, *, texts: bool = True
) -> Embedded:
    """Embeds every usable example of a source (of its first ``limit``), with or without all its captions.

    Raises UserError if none is usable.
    """
    skipped: collections.Counter = collections.Counter()
    embeddings, used, indices = [], [], []
    count, batch_size = min(len(source), limit or len(source)), embedder.batch_size
    with ThreadPoolExecutor(embedder.workers) as pool:
        for start in range(0, count, batch_size):
            samples, found, faults = readable(source, start, min(start + batch_size, count))
            skipped.update(error.reason for error in faults)
            if not samples:
                continue
            arrays, valid, faults = embed_images(embedder, weights, samples, pool)
            skipped.update(faults)
            embeddings.append(arrays[valid])
            # Only captions and labels are collected: the encoded images of a large set must not stay in memory.
            used += [(s.captions if texts else (), s.label) for s, ok in zip(samples, valid, strict=True) if ok]
            indices += [index for index, ok in zip(found, valid, strict=True) if ok]
    if not used:
        reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
        raise UserError(f"{source.name}: none of {count} examples can be used ({reasons})")
    captions = tuple(caption for found, _ in used for caption in found)
    return Embedded(
        images=np.concatenate(embeddings),
        texts=embed_texts(embedder, weights, captions) if texts else np.zeros((0, embeddings[0].shape[1]), np.float32),
        owner=np.array([i for i, (found, _) in enumerate(used) for _ in found], np.int64),
        labels=np.array([label for _, label in used], np.int64),
        captions=captions,
        indices=np.array(indices, np.int64),
        skipped=skipped,
    )
