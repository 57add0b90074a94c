"""The softmax loss on a mesh: every device has one tile of the B x B logit matrix, and never holds even that at once.

The P devices that split a batch are viewed as the most square r x c grid, b = B / P pairs each. Device (i, j) gathers
the images of its grid row (B / r) and the texts of its grid column (B / c), so that every logit exists exactly once
on the mesh; the log-sum-exps of rows and columns are finished by reductions along one axis each. A tile is walked in
blocks of rows. The backward pass rebuilds the blocks, and its gradients are reduce-scattered along row and column.

Per device: 8 b B D matmul FLOPs, traffic and memory in proportion to B D / sqrt(P) instead of B D.

With aligned embeddings the loss is a small difference of large numbers. So the positive is left out of the sums:
loss_i = log(1 + sum over j != i of exp(l_ij - l_ii)), whose gradient needs no ``p_ii - 1``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float

from clip_jax.losses.reference import Metrics
from clip_jax.sharding import batch_shards

ROWS, COLUMNS, REPLICAS = "grid_row", "grid_column", "replica"
PAIRS = PartitionSpec((ROWS, COLUMNS))
WHOLE = PartitionSpec()
BLOCK_ROWS = 256
"""Rows of a tile whose logits exist at one time."""


def softmax(
    image: Float[Array, "batch dim"], text: Float[Array, "batch dim"], scale: Float[Array, ""], *, mesh: Mesh
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3); equals ``reference.softmax``.

    Raises ValueError when the batch does not divide over the mesh.
    """
    if image.shape[0] % batch_shards(mesh):
        raise ValueError(f"a batch of {image.shape[0]} pairs does not divide over {batch_shards(mesh)} devices")
    loss, accuracy = _softmax(image, text, scale, grid_of(mesh))
    return loss, {"accuracy": accuracy}


@functools.lru_cache
def grid_of(mesh: Mesh) -> Mesh:
    """The same devices in the same order, data x fsdp as r rows of c; replicas along tensor."""
    shards = batch_shards(mesh)
    rows = max(r for r in range(1, int(shards**0.5) + 1) if shards % r == 0)
    devices = np.asarray(mesh.devices).reshape(rows, shards // rows, -1)
    return Mesh(devices, (ROWS, COLUMNS, REPLICAS), axis_types=(AxisType.Auto,) * 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _softmax(image, text, scale, grid):
    return _forward(image, text, scale, grid)[0]


def _forward(image, text, scale, grid):
    batch = image.shape[0]

    def device(image, text, scale):
        tile = _Tile(image, text, scale)
        row_maximum, row_sum, column_maximum, column_sum = tile.statistics()
        row_lse, row_maximum = _finish(row_maximum, row_sum, COLUMNS)
        column_lse, _ = _finish(column_maximum, column_sum, ROWS)
        row_lse, column_lse, row_maximum = (
            tile.own_rows(row_lse),
            tile.own_columns(column_lse),
            tile.own_rows(row_maximum),
        )
        loss = jnp.sum(jax.nn.softplus(row_lse - tile.positives) + jax.nn.softplus(column_lse - tile.positives))
        correct = jnp.sum(tile.positives >= row_maximum)
        loss, correct = jax.lax.psum((loss / (2 * batch), correct / batch), (ROWS, COLUMNS))
        return (loss, correct), (row_lse, column_lse)

    specs = dict(mesh=grid, in_specs=(PAIRS, PAIRS, WHOLE), out_specs=((WHOLE, WHOLE), (PAIRS, PAIRS)))
    out, (row_lse, column_lse) = jax.shard_map(device, **specs)(image, text, scale)
    return out, (image, text, scale, row_lse, column_lse)


def _backward(grid, residuals, cotangents):
    image = residuals[0]
    batch = image.shape[0]

    def device(image, text, scale, row_lse, column_lse, cotangent):
        tile = _Tile(image, text, scale)
        weight = cotangent / (2 * batch)
        # Of all logits of a row, the positive included: what exp(l - lse) is a probability of.
        row_whole = jnp.logaddexp(row_lse, tile.positives)
        column_whole = jnp.logaddexp(column_lse, tile.positives)
        image_gradient, text_gradient, scale_gradient = tile.gradients(
            *(jax.lax.all_gather(x, COLUMNS, tiled=True) for x in (row_whole, tile.positives)),
            *(jax.lax.all_gather(x, ROWS, tiled=True) for x in (column_whole, tile.positives)),
        )
        image_gradient = jax.lax.psum_scatter(image_gradient, COLUMNS, tiled=True)
        text_gradient = jax.lax.psum_scatter(text_gradient, ROWS, tiled=True)
        # p_ii - 1 is minus the sum of all other probabilities, of the row and of the column.
        positive = -jax.nn.sigmoid(row_lse - tile.positives) - jax.nn.sigmoid(column_lse - tile.positives)
        own_image, own_text = image.astype(jnp.float32), text.astype(jnp.float32)
        image_gradient = weight * scale * (image_gradient + positive[:, None] * own_text)
        text_gradient = weight * scale * (text_gradient + positive[:, None] * own_image)
        scale_gradient = weight / scale * jax.lax.psum(scale_gradient, (ROWS, COLUMNS))
        return image_gradient.astype(image.dtype), text_gradient.astype(text.dtype), scale_gradient

    specs = dict(mesh=grid, in_specs=(PAIRS, PAIRS, WHOLE, PAIRS, PAIRS, WHOLE), out_specs=(PAIRS, PAIRS, WHOLE))
    return jax.shard_map(device, **specs)(*residuals, cotangents[0])


_softmax.defvjp(_forward, _backward)


class _Tile:
    """What a device knows of its tile: gathered embeddings, its own pairs' logits, and how to walk through blocks."""

    def __init__(self, image, text, scale):
        self.pairs = image.shape[0]
        self.scale = scale
        self.images = jax.lax.all_gather(image, COLUMNS, tiled=True)
        self.texts = jax.lax.all_gather(text, ROWS, tiled=True)
        # Multiplied in float32, for bfloat16 products would not match the logits.
        self.positives = scale * jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), axis=-1)
        # Own pairs are block j of the grid row's images and block i of the grid column's texts.
        self.first_row = jax.lax.axis_index(COLUMNS) * self.pairs
        self.first_column = jax.lax.axis_index(ROWS) * self.pairs
        rows = self.images.shape[0]
        self.block = max(k for k in range(1, min(BLOCK_ROWS, rows) + 1) if rows % k == 0)

    def own_rows(self, x):
        return jax.lax.dynamic_slice_in_dim(x, self.first_row, self.pairs)

    def own_columns(self, x):
        return jax.lax.dynamic_slice_in_dim(x, self.first_column, self.pairs)

    def blocks(self):
        """(first row, images) of each block, to scan over."""
        rows, dim = self.images.shape
        return jnp.arange(0, rows, self.block), self.images.reshape(rows // self.block, self.block, dim)

    def logits(self, first, images):
        """float32[block, columns], -inf where image and text are a pair."""
        logits = self.scale * jnp.dot(images, self.texts.T, preferred_element_type=jnp.float32)
        row = first + jnp.arange(self.block)[:, None] - self.first_row
        column = jnp.arange(self.texts.shape[0])[None, :] - self.first_column
        return jnp.where((row == column) & (row >= 0) & (row < self.pairs), -jnp.inf, logits)

    def statistics(self):
        """Maximum and sum of exponentials of the rows (over this tile's columns) and of the columns."""

        def walk(carry, block):
            maximum, total = carry
            logits = self.logits(*block)
            row_maximum = jnp.max(logits, axis=1)
            row_sum = jnp.sum(jnp.exp(logits - _finite(row_maximum)[:, None]), axis=1)
            new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=0))
            shift = _finite(new_maximum)
            total = total * jnp.exp(maximum - shift) + jnp.sum(jnp.exp(logits - shift[None, :]), axis=0)
            return (new_maximum, total), (row_maximum, row_sum)

        columns = self.texts.shape[0]
        start = (_varying(jnp.full(columns, -jnp.inf)), _varying(jnp.zeros(columns)))
        (column_maximum, column_sum), (row_maximum, row_sum) = jax.lax.scan(walk, start, self.blocks())
        return row_maximum.reshape(-1), row_sum.reshape(-1), column_maximum, column_sum

    def gradients(self, row_whole, row_positives, column_whole, column_positives):
        """Sums over the tile, without positives: p @ texts, p.T @ images, and p times how far a logit is above its
        positive, which is the gradient by scale with nothing left to cancel; p of the rows and of the columns."""

        def walk(carry, block):
            text_gradient, scale_gradient = carry
            first, images, row_whole, row_positives = block
            logits = self.logits(first, images)
            row_p, column_p = jnp.exp(logits - row_whole[:, None]), jnp.exp(logits - column_whole[None, :])
            above = row_p * (logits - row_positives[:, None]) + column_p * (logits - column_positives[None, :])
            scale_gradient += jnp.sum(jnp.where(jnp.isfinite(logits), above, 0))
            p = row_p + column_p
            p = p.astype(images.dtype)
            image_gradient = jnp.dot(p, self.texts, preferred_element_type=jnp.float32)
            text_gradient += jnp.dot(p.T, images, preferred_element_type=jnp.float32)
            return (text_gradient, scale_gradient), image_gradient

        start = (_varying(jnp.zeros(self.texts.shape, jnp.float32)), _varying(jnp.zeros((), jnp.float32)))
        blocks = (*self.blocks(), row_whole.reshape(-1, self.block), row_positives.reshape(-1, self.block))
        (text_gradient, scale_gradient), image_gradient = jax.lax.scan(walk, start, blocks)
        return image_gradient.reshape(self.images.shape), text_gradient, scale_gradient


def _varying(x):
    """A scan's carry must vary over the mesh from the start, as what is added to it does."""
    return jax.lax.pcast(x, (ROWS, COLUMNS), to="varying")


def _finite(maximum):
    """A maximum to subtract: 0 where there was nothing but the positive."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0.0)


def _finish(maximum, total, axis):
    """(log-sum-exp, maximum) over all tiles along a grid axis."""
    largest = jax.lax.pmax(maximum, axis)
    total = jax.lax.psum(total * jnp.exp(maximum - _finite(largest)), axis)
    return _finite(largest) + jnp.log(total), largest
