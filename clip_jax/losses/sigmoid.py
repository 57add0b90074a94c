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
from jaxtyping import Array, Bool, Float, Int32

from clip_jax.losses import mesh_grid
from clip_jax.losses.mesh_grid import BATCH, DEFAULT_TILING, REPLICATED, ROWS, Embeddings, ExtraTexts, Tiling
from clip_jax.losses.reference import Metrics


def sigmoid(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    mesh: Mesh,
    valid: Bool[Array, "batch"] | None = None,
    groups: Int32[Array, "batch words"] | None = None,
    extra: ExtraTexts | None = None,
    smoothing: float = 0.0,
    tiling: Tiling = DEFAULT_TILING,
) -> tuple[Float[Array, ""], Metrics]:
    """The pairwise sigmoid loss (Zhai et al. 2023, equation 1); equals ``reference.sigmoid``.

    Pairs that are not ``valid`` are padding: the loss is that of the other pairs alone. An image and a text with equal
    ``groups`` count as a pair. ``extra`` texts are columns of the logits like the others. ``smoothing`` replaces the
    targets 1 and 0 by 1 - smoothing / 2 and smoothing / 2.
    Raises ValueError when the batch does not divide over the mesh.
    """
    image, texts = mesh_grid.global_batch(image, text, valid, mesh, groups, extra)
    if smoothing > 0 and groups is None:  # every pair is a group
        texts = texts._replace(groups=texts.ids[:, None])
    grid = mesh_grid.make_grid(mesh, texts.vectors, tiling)
    loss, accuracy = _sigmoid(image, texts, scale, bias, grid, tiling, smoothing)
    return loss, {"accuracy": accuracy}


class RowState(NamedTuple):
    """Sums over the logits of an image except its pair's, and the maxima of its negatives and its other positives."""

    image_gradient: Float[Array, "images dim"]
    negative: Float[Array, "images"]
    positive: Float[Array, "images"] | None
    """None if only pairs are positives."""
    loss: Float[Array, "images"]
    scale_gradient: Float[Array, "images"]
    bias_gradient: Float[Array, "images"]


class ColumnState(NamedTuple):
    text_gradient: Float[Array, "texts dim"]
    negative: Float[Array, "texts"]
    positive: Float[Array, "texts"] | None


Gradients = tuple[Float[Array, "images dim"], Float[Array, "texts dim"], Float[Array, ""], Float[Array, ""]]
"""Gradients with respect to images, texts, scale and bias."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sigmoid(
    image: Float[Array, "images dim"],
    texts: Embeddings,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    grid: AbstractMesh,
    tiling: Tiling,
    smoothing: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, accuracy). There may be more texts than images: then each device's texts begin with those of its
    images."""
    return _forward(image, texts, scale, bias, grid, tiling, smoothing)[0]


def _forward(
    image: Float[Array, "images dim"],
    texts: Embeddings,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    grid: AbstractMesh,
    tiling: Tiling,
    smoothing: float,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Gradients]:
    has_targets = texts.groups is not None

    def device(
        image: Float[Array, "local_images dim"], texts: Embeddings, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Gradients]:
        images, gathered = mesh_grid.paired_images(image, texts), mesh_grid.gather_texts(texts)

        def step(
            images: Embeddings, texts: Embeddings, rows: RowState, columns: ColumnState
        ) -> tuple[RowState, ColumnState]:
            """Adds the loss of each logit l, and with g = sigmoid(l) - target: g @ texts, g.T @ images, g (l - bias),
            g.

            The target of a negative is 0, and its loss softplus(l)."""
            logits = mesh_grid.masked_logits(images, texts, scale) + bias
            gradient, loss = jax.nn.sigmoid(logits), jax.nn.softplus(logits)
            negatives, best_row, best_column = logits, None, None
            if has_targets:
                same, included = mesh_grid.same_group(images, texts), jnp.isfinite(logits)
                signed = jnp.where(same, logits, -logits)
                loss = jnp.where(included, jax.nn.softplus(-signed) + smoothing / 2 * signed, 0)
                target = jnp.where(same, 1 - smoothing / 2, smoothing / 2)
                gradient = jnp.where(included, gradient - target, 0)
                negatives, positives = jnp.where(same, -jnp.inf, logits), jnp.where(same, logits, -jnp.inf)
                best_row = jnp.maximum(rows.positive, jnp.max(positives, axis=1))
                best_column = jnp.maximum(columns.positive, jnp.max(positives, axis=0))
            loss = rows.loss + jnp.sum(loss, axis=1)
            through_scale = jnp.where(jnp.isfinite(logits), gradient * (logits - bias), 0)
            scale_gradient = rows.scale_gradient + jnp.sum(through_scale, axis=1)
            bias_gradient = rows.bias_gradient + jnp.sum(gradient, axis=1)
            row_max = jnp.maximum(rows.negative, jnp.max(negatives, axis=1))
            column_max = jnp.maximum(columns.negative, jnp.max(negatives, axis=0))
            gradient = gradient.astype(image.dtype)
            image_gradient = rows.image_gradient + mesh_grid.matmul(gradient, texts.vectors)
            text_gradient = columns.text_gradient + mesh_grid.matmul(gradient.T, images.vectors)
            rows = RowState(image_gradient, row_max, best_row, loss, scale_gradient, bias_gradient)
            return rows, ColumnState(text_gradient, column_max, best_column)

        nothing = np.float32(-np.inf)
        no_positive = nothing if has_targets else None

        def scan_tile(images: Embeddings, columns: ColumnState) -> tuple[RowState, ColumnState]:
            zero = np.float32(0)
            init = RowState(jnp.zeros(image.shape[1]), nothing, no_positive, zero, zero, zero)
            return mesh_grid.scan_blocks(step, images, gathered, init, columns, tiling, cast)

        def cast(rows: RowState) -> RowState:
            """Casts to the dtype of the embeddings: in bfloat16 half of the memory and of the traffic."""
            return rows._replace(image_gradient=rows.image_gradient.astype(image.dtype))

        def merge(one: RowState, other: RowState) -> RowState:
            negative, positive = jax.tree.map(
                jnp.maximum, (one.negative, one.positive), (other.negative, other.positive)
            )
            return jax.tree.map(jnp.add, one, other)._replace(negative=negative, positive=positive)

        maxima = jax.tree.map(lambda x: jnp.full(gathered.ids.shape, x), (nothing, no_positive))
        columns = ColumnState(jnp.zeros(gathered.vectors.shape, jnp.float32), *maxima)
        rows, columns = mesh_grid.scan_ring(scan_tile, merge, images, mesh_grid.varying(columns))
        text_gradient = jax.lax.psum_scatter(columns.text_gradient.astype(texts.vectors.dtype), ROWS, tiled=True)
        maxima = jax.lax.pmax((columns.negative, columns.positive), ROWS)
        columns = mesh_grid.local_slice(ColumnState(None, *maxima), len(texts.ids))
        cosines = mesh_grid.positive_logits(image, texts.vectors, 1.0)
        positives = scale * cosines + bias
        loss, positive_gradient = jax.nn.softplus(-positives), -jax.nn.sigmoid(-positives)
        if smoothing > 0:
            loss, positive_gradient = loss + smoothing / 2 * positives, positive_gradient + smoothing / 2
        loss, positive_gradient = (mesh_grid.where_valid(x, images.valid) for x in (loss, positive_gradient))
        correct = sum(
            mesh_grid.count_correct(
                positives if side.positive is None else jnp.maximum(positives, side.positive[: len(positives)]),
                side.negative,
                images.valid,
            )
            for side in (rows, columns)
        )
        count = mesh_grid.pair_count(images)
        image_gradient = scale / count * mesh_grid.add_pairs(rows.image_gradient, positive_gradient, texts.vectors)
        text_gradient = scale / count * mesh_grid.add_pairs(text_gradient, positive_gradient, image)
        sums = (
            jnp.sum(rows.loss + loss),
            correct / 2,
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
    smoothing: float,
    gradients: Gradients,
    cotangents: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Float[Array, "images dim"], Embeddings, Float[Array, ""], Float[Array, ""]]:
    image, text, scale, bias = ((cotangents[0] * gradient).astype(gradient.dtype) for gradient in gradients)
    return image, Embeddings(text, None, None), scale, bias


_sigmoid.defvjp(_forward, _backward)
