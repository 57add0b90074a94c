"""The contrastive loss over the global batch: softmax (CLIP) or sigmoid (SigLIP), on the mesh."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices.sharding import batch_shards, process_rows, to_devices
from clip_jax.losses.mesh_grid import grid_rows
from clip_jax.losses.sigmoid import sigmoid
from clip_jax.losses.softmax import softmax
from clip_jax.models.clip import CLIP, Architecture, Batch, Params
from clip_jax.objectives.cost import Cost, Transfer, crossing
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
    """The loss of the whole batch from both towers' embeddings."""
    dtype, largest = model.compute.dtype, settings["max_logit_scale"]

    def embed(rows: Rows) -> Embeddings:
        return {"image": rows.outputs.image, "text": rows.outputs.text}

    def across(params: Params, embeddings: Embeddings, batch: Batch, mesh: Mesh) -> tuple[Float[Array, ""], Metrics]:
        # Embeddings travel in the compute type; logits and sums are float32 in any case.
        image, text = (embeddings[name].astype(dtype) for name in ("image", "text"))
        return loss(settings["loss"], params, image, text, mesh)

    def constrain(params: Params) -> Params:
        # Radford et al. 2021, section 2.5.
        return params | {"logit_scale": jnp.clip(params["logit_scale"], 0.0, math.log(largest))}

    def cost(*, batch_size: int, micro_batches: int, mesh: MeshLike, slices: int) -> Cost:
        return _cost(settings["loss"], model, batch_size, mesh, slices)

    objective = Objective(embed=embed, across=across, cost=cost)
    # SigLIP's scale has no bound (big_vision), and its published models exceed 100: clamped, they would change at once.
    clamped = largest > 0 and settings["loss"] == "softmax"
    return objective._replace(constrain=constrain) if clamped else objective


def loss(
    name: str,
    params: Params,
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    mesh: Mesh,
    valid: Array | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The named loss, with the scale and bias of ``params``."""
    scale = jnp.exp(params["logit_scale"])
    if name == "sigmoid":
        return sigmoid(image, text, scale, params["logit_bias"], mesh=mesh, valid=valid)
    return softmax(image, text, scale, mesh=mesh, valid=valid)


def make_held_out_loss(
    name: str, mesh: Mesh
) -> Callable[[Params, Float[np.ndarray, "pairs dim"], Float[np.ndarray, "pairs dim"]], float]:
    """The loss over all pairs of a set as one batch, so that its value depends on no batch size."""
    jitted = jax.jit(lambda params, image, text, valid: loss(name, params, image, text, mesh, valid)[0])

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


def _cost(name: str, model: CLIP, batch_size: int, mesh: MeshLike, slices: int) -> Cost:
    """Images and their gradients travel around a row of the grid; texts are gathered along a column and their gradients
    scattered back. Slices divide the rows: texts come from all of them."""
    shards, dim = batch_shards(mesh), model.architecture.embed_dim
    itemsize = jnp.dtype(model.compute.dtype).itemsize
    rows = grid_rows(shards, batch_size, dim, itemsize)
    columns, pairs = shards // rows, batch_size // shards
    images = RING_TRIPS[name] * batch_size // rows * itemsize * dim if columns > 1 else 0
    texts = 2 * batch_size // columns * itemsize * dim
    dcn = crossing(texts, rows, min(slices, rows))
    return Cost(
        flops=LOSS_PASSES[name] * 2 * pairs * batch_size * dim,
        across=dim * (8 * FLOAT32 * pairs + (itemsize + FLOAT32) * (batch_size // columns)) + LOGITS_BYTES,
        transfers=(Transfer("embeddings and their gradients", images + texts * (rows - 1) // rows - dcn, dcn),),
    )


SPEC = ObjectiveSpec(
    make=make,
    weight=1.0,
    defaults={
        "loss": "softmax",  # CLIP's; or sigmoid, SigLIP's, which gives the model a bias
        "max_logit_scale": 100.0,  # softmax: clamp of exp(logit_scale) after each update (Radford et al. 2021); 0: none
    },
    choices={"loss": ("softmax", "sigmoid")},
    ranges={"max_logit_scale": (0, math.inf)},
    adapt=adapt,
)
