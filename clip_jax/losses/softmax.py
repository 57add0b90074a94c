"""The softmax loss (InfoNCE) on a mesh, exact over the global batch; ``mesh_grid`` describes how it is split.

The forward pass computes the log-sum-exp of every row and column of the logit matrix. The backward pass recomputes the
logits from the embeddings and those two vectors. With b of the B pairs on a device and D features, a device computes
8 b B D FLOPs of matrix products.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int32

from clip_jax.losses import mesh_grid, targets
from clip_jax.losses.mesh_grid import BATCH, DEFAULT_TILING, REPLICATED, ROWS, Embeddings, ExtraTexts, Tiling
from clip_jax.losses.reference import Metrics


def softmax(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    *,
    mesh: Mesh,
    valid: Bool[Array, "batch"] | None = None,
    groups: Int32[Array, "batch words"] | None = None,
    extra: ExtraTexts | None = None,
    smoothing: float = 0.0,
    tiling: Tiling = DEFAULT_TILING,
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3); equals ``reference.softmax``.

    Pairs that are not ``valid`` are padding: the loss is that of the other pairs alone. An image and a text with equal
    ``groups`` are positives of each other: the target of a row or column is uniform over them (UniCL, Yang et al.
    2022). ``extra`` texts are columns for the rows to choose from, with no loss of their own (NegCLIP, Yuksekgonul et
    al. 2023). ``smoothing`` mixes the targets with a uniform one (ALIGN, Jia et al. 2021).
    Raises ValueError when the batch does not divide over the mesh.
    """
    image, texts = mesh_grid.global_batch(image, text, valid, mesh, groups, extra)
    if smoothing > 0 and groups is None:  # every pair is a group
        texts = texts._replace(groups=texts.ids[:, None])
    grid = mesh_grid.make_grid(mesh, texts.vectors, tiling)
    loss, accuracy = _softmax(image, texts, scale, grid, tiling, smoothing)
    return loss, {"accuracy": accuracy}


class OnlineSoftmax(NamedTuple):
    """The maximum of a set of logits, and the sum of exp(logit - maximum) (Milakov and Gimelshein 2018)."""

    max: Float[Array, "..."]
    sum: Float[Array, "..."]


EMPTY = OnlineSoftmax(np.float32(-np.inf), np.float32(0))


class LogitSums(NamedTuple):
    """The state of a row or a column in the forward pass: sums over all logits except that of its own pair."""

    softmax: OnlineSoftmax
    target: targets.TargetSums | None
    """None if only pairs are positives."""


def reduce_block(logits: Float[Array, "images texts"], axis: int) -> OnlineSoftmax:
    """Reduces a block along an axis; gives ``EMPTY`` where all logits are -inf."""
    maximum = jnp.max(logits, axis=axis)
    return OnlineSoftmax(maximum, jnp.sum(jnp.exp(logits - jnp.expand_dims(_finite(maximum), axis)), axis=axis))


def _merge(one: LogitSums, other: LogitSums) -> LogitSums:
    """Combines two disjoint sets of logits."""
    merged = None if one.target is None else targets.merge(one.target, other.target)
    return LogitSums(merge_softmax(one.softmax, other.softmax), merged)


def merge_softmax(one: OnlineSoftmax, other: OnlineSoftmax) -> OnlineSoftmax:
    maximum = jnp.maximum(one.max, other.max)
    shift = _finite(maximum)
    return OnlineSoftmax(maximum, one.sum * jnp.exp(one.max - shift) + other.sum * jnp.exp(other.max - shift))


def _reduce_grid_rows(columns: LogitSums) -> LogitSums:
    """Reduces column states along each grid column, whose devices have seen the images of different grid rows."""
    softmax = columns.softmax
    maximum = jax.lax.pmax(softmax.max, ROWS)
    softmax = OnlineSoftmax(maximum, jax.lax.psum(softmax.sum * jnp.exp(softmax.max - _finite(maximum)), ROWS))
    return LogitSums(softmax, None if columns.target is None else targets.reduce_grid_rows(columns.target))


def log_sum_exp(state: OnlineSoftmax) -> Float[Array, "..."]:
    return _finite(state.max) + jnp.log(state.sum)


def _finite(maximum: Float[Array, "..."]) -> Float[Array, "..."]:
    """``maximum`` if it is finite, else 0, so that subtracting it from -inf gives no NaN."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0.0)


class Side(NamedTuple):
    """One side of the logit matrix: images with the values of their rows, or texts with those of their columns."""

    embeddings: Embeddings
    positives: Float[Array, "n"] | None
    """The logits of the pairs; in the forward pass, None if only the pairs are positives."""
    lse: Float[Array, "n"] | None = None
    """Log-sum-exp of all logits, the pair's included: exp(logit - lse) is a probability. For the backward pass."""
    target: targets.Targets | None = None
    """Also for the backward pass; None if only pairs are positives."""


Residuals = tuple[
    *(Float[Array, "images dim"], Embeddings, Float[Array, ""]),
    *(Float[Array, "images"], Float[Array, "images"]),
    *(targets.Targets | None, targets.Targets | None),
]
"""The arguments of the loss; the log-sum-exps of rows and columns without the pairs; the targets of both."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _softmax(
    image: Float[Array, "images dim"],
    texts: Embeddings,
    scale: Float[Array, ""],
    grid: AbstractMesh,
    tiling: Tiling,
    smoothing: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns (loss, accuracy). If there are more texts than images, each device's texts start with those of its
    images; the others are candidates in the rows, but their columns are not part of the loss."""
    return _forward(image, texts, scale, grid, tiling, smoothing)[0]


def _forward(
    image: Float[Array, "images dim"],
    texts: Embeddings,
    scale: Float[Array, ""],
    grid: AbstractMesh,
    tiling: Tiling,
    smoothing: float,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Residuals]:
    has_targets = texts.groups is not None

    def device(
        image: Float[Array, "local_images dim"], texts: Embeddings, scale: Float[Array, ""]
    ) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], tuple]:
        size, positives = len(texts.ids), mesh_grid.positive_logits(image, texts.vectors, scale)
        images = Side(mesh_grid.paired_images(image, texts), positives if has_targets else None)
        padded = mesh_grid.pad_rows(positives, size, 0) if has_targets else None
        gathered = mesh_grid.gather_texts(Side(texts, padded))

        def step(images: Side, texts: Side, rows: LogitSums, columns: LogitSums) -> tuple[LogitSums, LogitSums]:
            logits = mesh_grid.masked_logits(images.embeddings, texts.embeddings, scale)
            row_target = column_target = None
            if has_targets:
                same = mesh_grid.same_group(images.embeddings, texts.embeddings)
                row_target = targets.reduce_block(logits, images.positives[:, None], same, 1)
                column_target = targets.reduce_block(logits, texts.positives[None, :], same, 0)
            rows = _merge(rows, LogitSums(reduce_block(logits, 1), row_target))
            return rows, _merge(columns, LogitSums(reduce_block(logits, 0), column_target))

        empty = LogitSums(EMPTY, targets.EMPTY if has_targets else None)

        def scan_tile(images: Side, columns: LogitSums) -> tuple[LogitSums, LogitSums]:
            return mesh_grid.scan_blocks(step, images, gathered, empty, columns, tiling)

        columns = mesh_grid.varying(jax.tree.map(lambda x: jnp.full(len(gathered.embeddings.ids), x), empty))
        rows, columns = mesh_grid.scan_ring(scan_tile, _merge, images, columns)
        columns = mesh_grid.local_slice(_reduce_grid_rows(columns), size)
        columns = jax.tree.map(lambda x: x[: len(image)], columns)
        row_lse, column_lse = log_sum_exp(rows.softmax), log_sum_exp(columns.softmax)
        # Softplus is 0 for padding, which has no negatives: its log-sum-exp is -inf.
        loss = jnp.sum(jax.nn.softplus(row_lse - positives) + jax.nn.softplus(column_lse - positives))
        row_target = column_target = None
        valid = images.embeddings.valid
        if has_targets:
            row_target, column_target = (targets.targets(side.target, smoothing) for side in (rows, columns))
            loss -= jnp.sum(targets.expected(rows.target, row_target) + targets.expected(columns.target, column_target))
            correct = sum(
                mesh_grid.count_correct(jnp.maximum(positives, side.target.positive), side.target.negative, valid)
                for side in (rows, columns)
            )
        else:
            correct = sum(mesh_grid.count_correct(positives, side.softmax.max, valid) for side in (rows, columns))
        count = mesh_grid.pair_count(images.embeddings)
        loss, accuracy = (x / (2 * count) for x in mesh_grid.psum_grid((loss, correct)))
        return (loss, accuracy), (row_lse, column_lse, row_target, column_target)

    in_specs, out_specs = (BATCH, BATCH, REPLICATED), ((REPLICATED, REPLICATED), BATCH)
    out, residuals = jax.shard_map(device, mesh=grid, in_specs=in_specs, out_specs=out_specs)(image, texts, scale)
    return out, (image, texts, scale, *residuals)


class RowGradients(NamedTuple):
    image: Float[Array, "images dim"]
    scale: Float[Array, "images"]


def _backward(
    grid: AbstractMesh,
    tiling: Tiling,
    smoothing: float,
    residuals: Residuals,
    cotangents: tuple[Float[Array, ""], Float[Array, ""]],
) -> tuple[Float[Array, "images dim"], Embeddings, Float[Array, ""]]:
    def device(
        image: Float[Array, "local_images dim"],
        texts: Embeddings,
        scale: Float[Array, ""],
        row_lse: Float[Array, "local_images"],
        column_lse: Float[Array, "local_images"],
        row_targets: targets.Targets | None,
        column_targets: targets.Targets | None,
        cotangent: Float[Array, ""],
    ) -> tuple[Float[Array, "local_images dim"], Float[Array, "local_texts dim"], Float[Array, ""]]:
        text, size = texts.vectors, len(texts.ids)
        positives = mesh_grid.positive_logits(image, text, scale)
        paired = mesh_grid.paired_images(image, texts)
        images = Side(paired, positives, jnp.logaddexp(row_lse, positives), row_targets)
        # A text without an image has probabilities of 0 in its column.
        column_lse_full = mesh_grid.pad_rows(jnp.logaddexp(column_lse, positives), size, jnp.inf)
        positives_full, targets_full = jax.tree.map(
            lambda x: mesh_grid.pad_rows(x, size, 0), (positives, column_targets)
        )
        gathered = mesh_grid.gather_texts(Side(texts, positives_full, column_lse_full, targets_full))

        def step(
            images: Side, texts: Side, rows: RowGradients, text_gradient: Float[Array, "texts dim"]
        ) -> tuple[RowGradients, Float[Array, "texts dim"]]:
            """Adds the gradients of one block: p @ texts and p.T @ images, where p is the sum of each logit's row and
            column probabilities minus its targets. The gradient with respect to the scale sums probabilities times
            ``logit - positive``, which avoids cancellation."""
            logits = mesh_grid.masked_logits(images.embeddings, texts.embeddings, scale)
            row_p, column_p = jnp.exp(logits - images.lse[:, None]), jnp.exp(logits - texts.lse[None, :])
            if images.target is not None:
                same = mesh_grid.same_group(images.embeddings, texts.embeddings)
                row_p -= targets.target_of_logits(jax.tree.map(lambda x: x[:, None], images.target), logits, same)
                column_p -= targets.target_of_logits(jax.tree.map(lambda x: x[None, :], texts.target), logits, same)
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
        if row_targets is not None:
            positive_gradient += row_targets.others + column_targets.others
        weight = cotangent / (2 * mesh_grid.pair_count(images.embeddings))
        image_gradient = weight * scale * mesh_grid.add_pairs(rows.image, positive_gradient, text)
        text_gradient = weight * scale * mesh_grid.add_pairs(text_gradient, positive_gradient, image)
        scale_gradient = weight / scale * mesh_grid.psum_grid(jnp.sum(rows.scale))
        return image_gradient.astype(image.dtype), text_gradient.astype(text.dtype), scale_gradient

    in_specs, out_specs = (BATCH, BATCH, REPLICATED, *(BATCH,) * 4, REPLICATED), (BATCH, BATCH, REPLICATED)
    sharded = jax.shard_map(device, mesh=grid, in_specs=in_specs, out_specs=out_specs)
    image_gradient, text_gradient, scale_gradient = sharded(*residuals, cotangents[0])
    return image_gradient, Embeddings(text_gradient, None, None), scale_gradient


_softmax.defvjp(_forward, _backward)
