"""The softmax loss (InfoNCE) on a mesh, exact over the global batch; ``mesh_grid`` describes how it is split.

The forward pass computes the log-sum-exp of every row and column of the logit matrix. The backward pass recomputes the
logits, and needs the embeddings and those two vectors. Per device: 8 b B D FLOPs of matrix products.
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


def softmax(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    *,
    mesh: Mesh,
    valid: Bool[Array, "batch"] | None = None,
    tiling: Tiling = DEFAULT_TILING,
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3); equals ``reference.softmax``.

    Pairs that are not ``valid`` are padding: the loss is that of the other pairs alone.
    Raises ValueError when the batch does not divide over the mesh.
    """
    image, texts = mesh_grid.global_batch(image, text, valid, mesh)
    loss, accuracy = _softmax(image, texts, scale, mesh_grid.make_grid(mesh, text, tiling), tiling)
    return loss, {"accuracy": accuracy}


class OnlineSoftmax(NamedTuple):
    """The maximum of a set of logits, and the sum of exp(logit - maximum) (Milakov and Gimelshein 2018)."""

    max: Float[Array, "..."]
    sum: Float[Array, "..."]


EMPTY = OnlineSoftmax(np.float32(-np.inf), np.float32(0))


def _init_columns(texts: int) -> OnlineSoftmax:
    """The columns of ``texts`` texts without any logits."""
    return mesh_grid.varying(jax.tree.map(lambda x: jnp.full(texts, x), EMPTY))


def _of_block(logits: Float[Array, "images texts"], axis: int) -> OnlineSoftmax:
    """Reduces a block along an axis; gives ``EMPTY`` where all logits are -inf."""
    maximum = jnp.max(logits, axis=axis)
    return OnlineSoftmax(maximum, jnp.sum(jnp.exp(logits - jnp.expand_dims(_finite(maximum), axis)), axis=axis))


def _merge(one: OnlineSoftmax, other: OnlineSoftmax) -> OnlineSoftmax:
    """Combines two disjoint sets of logits."""
    maximum = jnp.maximum(one.max, other.max)
    shift = _finite(maximum)
    return OnlineSoftmax(maximum, one.sum * jnp.exp(one.max - shift) + other.sum * jnp.exp(other.max - shift))


def _reduce_grid_rows(columns: OnlineSoftmax) -> OnlineSoftmax:
    """Combines the columns of the devices of a grid column, each of which has the images of its own grid row."""
    maximum = jax.lax.pmax(columns.max, ROWS)
    return OnlineSoftmax(maximum, jax.lax.psum(columns.sum * jnp.exp(columns.max - _finite(maximum)), ROWS))


def _log_sum_exp(state: OnlineSoftmax) -> Float[Array, "..."]:
    return _finite(state.max) + jnp.log(state.sum)


def _finite(maximum: Float[Array, "..."]) -> Float[Array, "..."]:
    """A maximum to subtract: 0 where there are no negatives."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0.0)


Residuals = tuple[
    Float[Array, "images dim"], Embeddings, Float[Array, ""], Float[Array, "images"], Float[Array, "images"]
]
"""The arguments of the loss, and the log-sum-exps of the negatives of rows and columns."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _softmax(
    image: Float[Array, "images dim"], texts: Embeddings, scale: Float[Array, ""], grid: AbstractMesh, tiling: Tiling
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, accuracy). There may be more texts than images: then each device's texts begin with those of its images,
    and the others are negatives in the rows, with no column of their own in the loss."""
    return _forward(image, texts, scale, grid, tiling)[0]


def _forward(
    image: Float[Array, "images dim"], texts: Embeddings, scale: Float[Array, ""], grid: AbstractMesh, tiling: Tiling
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Residuals]:
    def device(
        image: Float[Array, "local_images dim"], texts: Embeddings, scale: Float[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], tuple[Float[Array, "local_images"], ...]]:
        images, gathered = mesh_grid.paired_images(image, texts), mesh_grid.gather_texts(texts)

        def step(
            images: Embeddings, texts: Embeddings, rows: OnlineSoftmax, columns: OnlineSoftmax
        ) -> tuple[OnlineSoftmax, OnlineSoftmax]:
            logits = mesh_grid.masked_logits(images, texts, scale)
            return _merge(rows, _of_block(logits, 1)), _merge(columns, _of_block(logits, 0))

        def scan_tile(images: Embeddings, columns: OnlineSoftmax) -> tuple[OnlineSoftmax, OnlineSoftmax]:
            return mesh_grid.scan_blocks(step, images, gathered, EMPTY, columns, tiling)

        columns = _init_columns(len(gathered.ids))
        rows, columns = mesh_grid.scan_ring(scan_tile, _merge, images, columns)
        columns = mesh_grid.local_slice(_reduce_grid_rows(columns), len(texts.ids))
        columns = jax.tree.map(lambda x: x[: len(image)], columns)
        row_lse, column_lse = _log_sum_exp(rows), _log_sum_exp(columns)
        positives = mesh_grid.positive_logits(image, texts.vectors, scale)
        # Softplus is 0 for padding, which has no negatives: its log-sum-exp is -inf.
        loss = jnp.sum(jax.nn.softplus(row_lse - positives) + jax.nn.softplus(column_lse - positives))
        correct = mesh_grid.count_correct(positives, rows.max, columns.max, images.valid)
        count = mesh_grid.pair_count(images)
        loss, accuracy = (x / (2 * count) for x in mesh_grid.psum_grid((loss, correct)))
        return (loss, accuracy), (row_lse, column_lse)

    in_specs, out_specs = (BATCH, BATCH, REPLICATED), ((REPLICATED, REPLICATED), (BATCH, BATCH))
    sharded = jax.shard_map(device, mesh=grid, in_specs=in_specs, out_specs=out_specs)
    out, (row_lse, column_lse) = sharded(image, texts, scale)
    return out, (image, texts, scale, row_lse, column_lse)


class Side(NamedTuple):
    """Images and their rows of the logit matrix, or texts and their columns, as the backward pass needs them."""

    embeddings: Embeddings
    lse: Float[Array, "n"]
    """Log-sum-exp of all logits, the positive included: exp(logit - lse) is a probability."""
    positives: Float[Array, "n"]


class RowGradients(NamedTuple):
    image: Float[Array, "images dim"]
    scale: Float[Array, "images"]


def _backward(
    grid: AbstractMesh,
    tiling: Tiling,
    residuals: Residuals,
    cotangents: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Float[Array, "images dim"], Embeddings, Float[Array, ""]]:
    def device(
        image: Float[Array, "local_images dim"],
        texts: Embeddings,
        scale: Float[Array, ""],
        row_lse: Float[Array, "local_images"],
        column_lse: Float[Array, "local_images"],
        cotangent: Float[Array, ""],
    ) -> tuple[Float[Array, "local_images dim"], Float[Array, "local_texts dim"], Float[Array, ""]]:
        text, size = texts.vectors, len(texts.ids)
        positives = mesh_grid.positive_logits(image, text, scale)
        images = Side(mesh_grid.paired_images(image, texts), jnp.logaddexp(row_lse, positives), positives)
        # A text without an image has probabilities of 0 in its column.
        column_lse_full = mesh_grid.pad_rows(jnp.logaddexp(column_lse, positives), size, jnp.inf)
        gathered = mesh_grid.gather_texts(Side(texts, column_lse_full, mesh_grid.pad_rows(positives, size, 0)))

        def step(
            images: Side, texts: Side, rows: RowGradients, text_gradient: Float[Array, "texts dim"]
        ) -> tuple[RowGradients, Float[Array, "texts dim"]]:
            """With p the sum of a negative's probabilities in its row and its column, adds p @ texts, p.T @ images, and
            p times the logit's distance from the positive: the gradient with respect to the scale, where nothing is
            left to cancel."""
            logits = mesh_grid.masked_logits(images.embeddings, texts.embeddings, scale)
            row_p, column_p = jnp.exp(logits - images.lse[:, None]), jnp.exp(logits - texts.lse[None, :])
            distance = row_p * (logits - images.positives[:, None]) + column_p * (logits - texts.positives[None, :])
            scale_gradient = rows.scale + jnp.sum(jnp.where(jnp.isfinite(logits), distance, 0), axis=1)
            p = (row_p + column_p).astype(image.dtype)
            image_gradient = rows.image + mesh_grid.matmul(p, texts.embeddings.vectors)
            text_gradient += mesh_grid.matmul(p.T, images.embeddings.vectors)
            return RowGradients(image_gradient, scale_gradient), text_gradient

        def scan_tile(
            images: Side, text_gradient: Float[Array, "texts dim"]
        ) -> tuple[RowGradients, Float[Array, "texts dim"]]:
            init = RowGradients(jnp.zeros(image.shape[1]), np.float32(0))
            return mesh_grid.scan_blocks(step, images, gathered, init, text_gradient, tiling, cast)

        def cast(rows: RowGradients) -> RowGradients:
            """Casts to the dtype of the embeddings: in bfloat16 half of the memory and of the traffic."""
            return rows._replace(image=rows.image.astype(image.dtype))

        def add(one: RowGradients, other: RowGradients) -> RowGradients:
            return jax.tree.map(jnp.add, one, other)

        text_gradient = mesh_grid.varying(jnp.zeros(gathered.embeddings.vectors.shape, jnp.float32))
        rows, text_gradient = mesh_grid.scan_ring(scan_tile, add, images, text_gradient)
        text_gradient = jax.lax.psum_scatter(text_gradient.astype(text.dtype), ROWS, tiled=True)
        # p_ii - 1 is minus the sum of all other probabilities, of the row and of the column.
        positive_gradient = -jax.nn.sigmoid(row_lse - positives) - jax.nn.sigmoid(column_lse - positives)
        weight = cotangent / (2 * mesh_grid.pair_count(images.embeddings))
        image_gradient = weight * scale * mesh_grid.add_pairs(rows.image, positive_gradient, text)
        text_gradient = weight * scale * mesh_grid.add_pairs(text_gradient, positive_gradient, image)
        scale_gradient = weight / scale * mesh_grid.psum_grid(jnp.sum(rows.scale))
        return image_gradient.astype(image.dtype), text_gradient.astype(text.dtype), scale_gradient

    in_specs, out_specs = (BATCH, BATCH, REPLICATED, BATCH, BATCH, REPLICATED), (BATCH, BATCH, REPLICATED)
    sharded = jax.shard_map(device, mesh=grid, in_specs=in_specs, out_specs=out_specs)
    image_gradient, text_gradient, scale_gradient = sharded(*residuals, cotangents[0])
    return image_gradient, Embeddings(text_gradient, None, None), scale_gradient


_softmax.defvjp(_forward, _backward)
