"""The pairwise sigmoid loss on a mesh, exact over the global batch; ``mesh_grid`` describes how it is split.

The gradient of a logit depends on that logit alone, so that the forward pass computes the loss and all gradients in one
scan, and the backward pass only multiplies them. Per device: 6 b B D FLOPs of matrix products.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float

from clip_jax.losses import mesh_grid
from clip_jax.losses.mesh_grid import BATCH, DEFAULT_TILING, REPLICATED, ROWS, Embeddings, Tiling
from clip_jax.losses.reference import Metrics


def sigmoid(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    mesh: Mesh,
    valid: Bool[Array, "batch"] | None = None,
    tiling: Tiling = DEFAULT_TILING,
) -> tuple[Float[Array, ""], Metrics]:
    """The pairwise sigmoid loss (Zhai et al. 2023, equation 1); equals ``reference.sigmoid``.

    Pairs that are not ``valid`` are padding: the loss is that of the other pairs alone.
    Raises ValueError when the batch does not divide over the mesh.
    """
    image, texts = mesh_grid.global_batch(image, text, valid, mesh)
    loss, accuracy = _sigmoid(image, texts, scale, bias, mesh_grid.make_grid(mesh, text, tiling), tiling)
    return loss, {"accuracy": accuracy}


class RowState(NamedTuple):
    """Sums over the negatives of an image, and the maximum of their logits."""

    image_gradient: Float[Array, "images dim"]
    max: Float[Array, "images"]
    loss: Float[Array, "images"]
    scale_gradient: Float[Array, "images"]
    bias_gradient: Float[Array, "images"]


class ColumnState(NamedTuple):
    text_gradient: Float[Array, "texts dim"]
    max: Float[Array, "texts"]


Gradients = tuple[Float[Array, "images dim"], Float[Array, "texts dim"], Float[Array, ""], Float[Array, ""]]
"""With respect to images, texts, scale and bias."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _sigmoid(
    image: Float[Array, "images dim"],
    texts: Embeddings,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    grid: AbstractMesh,
    tiling: Tiling,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, accuracy). There may be more texts than images: then each device's texts begin with those of its images,
    and the others are negatives."""
    return _forward(image, texts, scale, bias, grid, tiling)[0]


def _forward(
    image: Float[Array, "images dim"],
    texts: Embeddings,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    grid: AbstractMesh,
    tiling: Tiling,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Gradients]:
    def device(
        image: Float[Array, "local_images dim"], texts: Embeddings, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Gradients]:
        images, gathered = mesh_grid.paired_images(image, texts), mesh_grid.gather_texts(texts)

        def step(
            images: Embeddings, texts: Embeddings, rows: RowState, columns: ColumnState
        ) -> tuple[RowState, ColumnState]:
            """Adds the negatives' softplus(l), and with p = sigmoid(l): p @ texts, p.T @ images, p * (l - bias), p."""
            logits = mesh_grid.masked_logits(images, texts, scale) + bias
            p = jax.nn.sigmoid(logits)
            loss = rows.loss + jnp.sum(jax.nn.softplus(logits), axis=1)
            p_logits = jnp.where(jnp.isfinite(logits), p * (logits - bias), 0)
            scale_gradient = rows.scale_gradient + jnp.sum(p_logits, axis=1)
            bias_gradient = rows.bias_gradient + jnp.sum(p, axis=1)
            row_max = jnp.maximum(rows.max, jnp.max(logits, axis=1))
            column_max = jnp.maximum(columns.max, jnp.max(logits, axis=0))
            p = p.astype(image.dtype)
            image_gradient = rows.image_gradient + mesh_grid.matmul(p, texts.vectors)
            text_gradient = columns.text_gradient + mesh_grid.matmul(p.T, images.vectors)
            rows = RowState(image_gradient, row_max, loss, scale_gradient, bias_gradient)
            return rows, ColumnState(text_gradient, column_max)

        def scan_tile(images: Embeddings, columns: ColumnState) -> tuple[RowState, ColumnState]:
            zero = np.float32(0)
            init = RowState(jnp.zeros(image.shape[1]), np.float32(-np.inf), zero, zero, zero)
            return mesh_grid.scan_blocks(step, images, gathered, init, columns, tiling, cast)

        def cast(rows: RowState) -> RowState:
            """Casts to the dtype of the embeddings: in bfloat16 half of the memory and of the traffic."""
            return rows._replace(image_gradient=rows.image_gradient.astype(image.dtype))

        def merge(one: RowState, other: RowState) -> RowState:
            return jax.tree.map(jnp.add, one, other)._replace(max=jnp.maximum(one.max, other.max))

        columns = ColumnState(jnp.zeros(gathered.vectors.shape, jnp.float32), jnp.full(gathered.ids.shape, -jnp.inf))
        rows, columns = mesh_grid.scan_ring(scan_tile, merge, images, mesh_grid.varying(columns))
        text_gradient = jax.lax.psum_scatter(columns.text_gradient.astype(texts.vectors.dtype), ROWS, tiled=True)
        column_max = mesh_grid.local_slice(jax.lax.pmax(columns.max, ROWS), len(texts.ids))
        cosines = mesh_grid.positive_logits(image, texts.vectors, 1.0)
        positives = scale * cosines + bias
        positive_gradient = mesh_grid.where_valid(-jax.nn.sigmoid(-positives), images.valid)
        count = mesh_grid.pair_count(images)
        image_gradient = scale / count * mesh_grid.add_pairs(rows.image_gradient, positive_gradient, texts.vectors)
        text_gradient = scale / count * mesh_grid.add_pairs(text_gradient, positive_gradient, image)
        sums = (
            jnp.sum(rows.loss + mesh_grid.where_valid(jax.nn.softplus(-positives), images.valid)),
            mesh_grid.count_correct(positives, rows.max, column_max, images.valid) / 2,
            jnp.sum(rows.scale_gradient / scale + positive_gradient * cosines),
            jnp.sum(rows.bias_gradient + positive_gradient),
        )
        loss, accuracy, scale_gradient, bias_gradient = (x / count for x in mesh_grid.psum_grid(sums))
        image_gradient, text_gradient = image_gradient.astype(image.dtype), text_gradient.astype(texts.vectors.dtype)
        return (loss, accuracy), (image_gradient, text_gradient, scale_gradient, bias_gradient)

    in_specs = (BATCH, BATCH, REPLICATED, REPLICATED)
    out_specs = ((REPLICATED, REPLICATED), (BATCH, BATCH, REPLICATED, REPLICATED))
    return jax.shard_map(device, mesh=grid, in_specs=in_specs, out_specs=out_specs)(image, texts, scale, bias)


def _backward(
    grid: AbstractMesh,
    tiling: Tiling,
    gradients: Gradients,
    cotangents: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Float[Array, "images dim"], Embeddings, Float[Array, ""], Float[Array, ""]]:
    image, text, scale, bias = ((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    return image, Embeddings(text, None, None), scale, bias


_sigmoid.defvjp(_forward, _backward)
