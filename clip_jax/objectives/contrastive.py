"""The contrastive loss over the global batch: softmax (CLIP) or sigmoid (SigLIP), on the mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32

from clip_jax.data.negatives import hard_negatives
from clip_jax.data.sources.sample import Sample
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.views import Arrays, View
from clip_jax.devices.sharding import batch_shards, process_rows, to_devices
from clip_jax.losses.mesh_grid import ExtraTexts, grid_rows
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from clip_jax.models.clip import CLIP, Architecture, Batch, Params, unit
from clip_jax.objectives.cost import Cost, Transfer, crossing, saved_bytes, traceable
from clip_jax.objectives.objective import Embeddings, MeshLike, Metrics, Objective, ObjectiveSpec, Rows, Settings
from clip_jax.presets import Preprocess

LOSS_PASSES = {"softmax": 4, "sigmoid": 3}
"""Matrix products per tile: softmax computes the logits twice and two gradients, sigmoid the logits only once."""
RING_TRIPS = {"softmax": 3, "sigmoid": 2}
"""Embeddings or gradients that travel around the ring of a grid row."""
LOGITS_BYTES = 4 * 8 * 2**20
"""A few copies of the block of logits that exists at one time."""
FLOAT32 = 4
BLOCK_ROWS = 128
"""Rows per device that a held-out set is padded to a multiple of."""


def make(settings: Settings, model: CLIP, preprocess: Preprocess, tokenizer: Tokenizer | None) -> Objective:
    """The loss of the global batch from both towers' embeddings."""
    dtype, largest, negatives = model.compute.dtype, settings["max_logit_scale"], settings["negatives"]

    def embed(rows: Rows) -> Embeddings:
        embeddings = {"image": rows.outputs.image, "text": rows.outputs.text}
        if negatives:
            embeddings["negatives"] = embed_negatives(model, rows.params, rows.batch["negatives"])
        return embeddings

    def across(params: Params, embeddings: Embeddings, batch: Batch, mesh: Mesh) -> tuple[Float[Array, ""], Metrics]:
        # Embeddings travel in the compute type; logits and sums are float32 in any case.
        embeddings = {name: vectors.astype(dtype) for name, vectors in embeddings.items()}
        extra = None
        if negatives:
            groups = groups_of(batch["negatives"]) if settings["positives"] == "captions" else None
            extra = ExtraTexts(embeddings["negatives"], groups, batch["has_negative"])
        return loss(
            settings["loss"],
            params,
            embeddings["image"],
            embeddings["text"],
            mesh,
            groups=positive_groups(settings["positives"], batch),
            extra=extra,
            smoothing=settings["label_smoothing"],
        )

    def constrain(params: Params) -> Params:
        # Radford et al. 2021, section 2.5.
        return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, math.log(largest))}

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        return _cost(settings["loss"], model, batch_size, micro_batches, mesh, slices, negatives)

    objective = Objective(views=views(settings, model, tokenizer), embed=embed, across=across, cost=cost)
    # SigLIP's scale has no bound (big_vision), and its published models exceed 100: clamped, they would change at once.
    clamped = largest > 0 and settings["loss"] == "softmax"
    return objective._replace(constrain=constrain) if clamped else objective


def views(settings: Settings, model: CLIP, tokenizer: Tokenizer | None) -> dict[str, View]:
    """The class of an example, and hard negatives: the example's own, then those made of one of its captions."""
    number, length, found = settings["negatives"], model.architecture.text.context_length, {}

    def fill_label(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        arrays["label"][:] = sample.label

    def fill_negatives(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        texts = tuple(sample.extras.get("negatives", ()))[:number]
        if len(texts) < number:
            caption = sample.captions[int(rng.integers(len(sample.captions)))]
            texts += hard_negatives(caption, number - len(texts), rng, avoid=(*sample.captions, *texts))
        arrays["negatives"][:] = 0
        arrays["has_negative"][:] = np.arange(number) < len(texts)
        if texts:
            arrays["negatives"][: len(texts)] = tokenizer(list(texts))

    if settings["positives"] == "labels":
        found["label"] = View({"label": ((1,), np.dtype(np.int32))}, fill_label)
    if number:
        arrays = {"negatives": ((number, length), np.dtype(np.int32)), "has_negative": ((number,), np.dtype(bool))}
        found["negatives"] = View(arrays, fill_negatives)
    return found


def embed_negatives(
    model: CLIP, params: Params, tokens: Int[Array, "batch negatives length"]
) -> Float[Array, "batch negatives dim"]:
    batch, number, length = tokens.shape
    return unit(model.encode_text(params, tokens.reshape(-1, length))).reshape(batch, number, -1)


def positive_groups(positives: str, batch: Batch) -> Int32[Array, "batch words"] | None:
    """Numbers that are equal for an image and a text that are positives of each other; None: only pairs are."""
    if positives == "captions":
        return groups_of(batch["text"])
    if positives == "labels":  # an example without a label is in a group of its own
        label = batch["label"]
        return jnp.where(label >= 0, label, -1 - batch["row"][:, None])
    return None


def groups_of(tokens: Int[Array, "*texts length"]) -> Int32[Array, "*texts 2"]:
    """Two words of 32 bits that are equal for equal texts: a Zobrist hash, the sum of hashes of (token, position).

    Two of 32,768 different captions share both words with a probability of 3e-11.
    """
    positions = jnp.arange(tokens.shape[-1], dtype=jnp.uint32)[None, :] * jnp.uint32(0x9E3779B1)
    salts = positions + jnp.asarray([[0x85EBCA6B], [0xC2B2AE35]], jnp.uint32)
    x = tokens.astype(jnp.uint32)[..., None, :] * jnp.uint32(0x27D4EB2F) ^ salts
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # murmur3's finalizer
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return jnp.sum(x ^ (x >> 16), axis=-1, dtype=jnp.uint32).astype(jnp.int32)


def loss(
    name: str,
    params: Params,
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    mesh: Mesh,
    **options: Any,
) -> tuple[Float[Array, ""], Metrics]:
    """The named loss, with the scale and bias of ``params``; ``options`` are those of ``losses.softmax``."""
    scale = jnp.exp(params["logit_scale"])
    if name == "sigmoid":
        return sigmoid(image, text, scale, params["logit_bias"], mesh=mesh, **options)
    return softmax(image, text, scale, mesh=mesh, **options)


def make_held_out_loss(
    name: str, mesh: Mesh
) -> Callable[[Params, Float[np.ndarray, "pairs dim"], Float[np.ndarray, "pairs dim"]], float]:
    """The loss over all pairs of a set as one batch, so that its value depends on no batch size."""
    jitted = jax.jit(lambda params, image, text, valid: loss(name, params, image, text, mesh, valid=valid)[0])

    def held_out_loss(params: Params, image: np.ndarray, text: np.ndarray) -> float:
        shards, pairs = batch_shards(mesh), len(image)
        # Whole blocks of rows on every device: a prime number of rows would be scanned one by one.
        multiple = shards * BLOCK_ROWS
        size = -(-pairs // multiple) * multiple
        arrays = {"image": image, "text": text, "valid": np.ones(pairs, bool)}
        rows = process_rows(mesh, size)
        padded = {
            key: np.pad(array, ((0, size - pairs), *((0, 0),) * (array.ndim - 1)))[rows]
            for key, array in arrays.items()
        }
        scalars = {key: params[key] for key in ("logit_scale", "logit_bias") if key in params}
        batch = to_devices(padded, mesh, size)
        return float(jitted(scalars, batch["image"], batch["text"], batch["valid"]))

    return held_out_loss


def adapt(settings: Settings, architecture: Architecture) -> Architecture:
    """Adds a bias for the sigmoid loss, initialized for mostly negative pairs (Zhai et al. 2023, section 3.2)."""
    if settings["loss"] != "sigmoid":
        return architecture
    return dataclasses.replace(architecture, init_logit_scale=math.log(10.0), init_logit_bias=-10.0)


def _cost(
    name: str, model: CLIP, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int, negatives: int
) -> Cost:
    """Images and their gradients travel around a row of the grid; texts are gathered along a column and their gradients
    scattered back. Slices divide the rows: texts come from all of them. Negatives are texts, which are encoded."""
    shards, dim = batch_shards(mesh), model.architecture.embed_dim
    itemsize = jnp.dtype(model.compute.dtype).itemsize
    text_count = batch_size * (1 + negatives)
    rows = grid_rows(shards, text_count, dim, itemsize)
    columns, pairs = shards // rows, batch_size // shards
    images = RING_TRIPS[name] * batch_size // rows * itemsize * dim if columns > 1 else 0
    texts = 2 * text_count // columns * itemsize * dim
    dcn = crossing(texts, rows, min(slices, rows))
    cost = Cost(
        flops=LOSS_PASSES[name] * 2 * pairs * text_count * dim,
        across=dim * (4 * FLOAT32 * pairs * (2 + negatives) + (itemsize + FLOAT32) * (text_count // columns))
        + LOGITS_BYTES,
        transfers=(Transfer("embeddings and their gradients", images + texts * (rows - 1) // rows - dcn, dcn),),
    )
    if not negatives:
        return cost
    passes = 3 + (micro_batches > 1)
    encoding = passes * pairs * negatives * model.architecture.text.forward_flops(dim) // mesh.shape["tensor"]
    saved = _negatives_bytes(traceable(model), pairs // micro_batches, negatives)
    return cost._replace(flops=cost.flops + encoding, activations=saved)


@functools.lru_cache(maxsize=64)
def _negatives_bytes(model: CLIP, pairs: int, negatives: int) -> int:
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    length = model.architecture.text.context_length

    def encode(params: Params, rows: int) -> Array:
        return embed_negatives(model, params, jnp.zeros((rows, negatives, length), jnp.int32))

    return saved_bytes(encode, params, pairs)


SPEC = ObjectiveSpec(
    make=make,
    weight=1.0,
    compares=True,
    needs_images=False,
    needs_full_texts=False,
    kind="contrastive loss",
    defaults={
        "loss": "softmax",  # CLIP's; or sigmoid, SigLIP's, which gives the model a bias
        "max_logit_scale": 100.0,  # softmax: clamp of exp(logit_scale) after each update (Radford et al. 2021); 0: none
        "positives": "pairs",  # or captions: all examples with an equal caption; labels: all of one class (UniCL)
        "label_smoothing": 0.0,  # share of the target that is spread over the batch (ALIGN: 0.1)
        "negatives": 0,  # hard negatives of each caption, as further texts (NegCLIP: 1)
    },
    choices={"loss": ("softmax", "sigmoid"), "positives": ("pairs", "captions", "labels")},
    ranges={"max_logit_scale": (0, math.inf), "label_smoothing": (0, 1), "negatives": (0, 64)},
    adapt=adapt,
)
