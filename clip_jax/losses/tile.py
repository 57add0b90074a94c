"""One device's tile of the logit matrix: the mesh as a grid, gathered embeddings, and the walk through blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from clip_jax.sharding import batch_shards

ROWS, COLUMNS, REPLICAS = "grid_row", "grid_column", "replica"
BLOCK_ROWS = 256
"""Rows of a tile whose logits exist at one time."""


@functools.lru_cache
def grid_of(mesh: Mesh) -> Mesh:
    """The same devices in the same order, data x fsdp as r rows of c; replicas along tensor."""
    shards = batch_shards(mesh)
    rows = max(r for r in range(1, int(shards**0.5) + 1) if shards % r == 0)
    devices = np.asarray(mesh.devices).reshape(rows, shards // rows, -1)
    return Mesh(devices, (ROWS, COLUMNS, REPLICAS), axis_types=(AxisType.Auto,) * 3)


class Tile:
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
            row_sum = jnp.sum(jnp.exp(logits - finite(row_maximum)[:, None]), axis=1)
            new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=0))
            shift = finite(new_maximum)
            total = total * jnp.exp(maximum - shift) + jnp.sum(jnp.exp(logits - shift[None, :]), axis=0)
            return (new_maximum, total), (row_maximum, row_sum)

        columns = self.texts.shape[0]
        start = (varying(jnp.full(columns, -jnp.inf)), varying(jnp.zeros(columns)))
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
            # Kept and sent in the embeddings' own type: in bfloat16 half of the memory and of the traffic.
            return (text_gradient, scale_gradient), image_gradient.astype(images.dtype)

        start = (varying(jnp.zeros(self.texts.shape, jnp.float32)), varying(jnp.zeros((), jnp.float32)))
        blocks = (*self.blocks(), row_whole.reshape(-1, self.block), row_positives.reshape(-1, self.block))
        (text_gradient, scale_gradient), image_gradient = jax.lax.scan(walk, start, blocks)
        return image_gradient.reshape(self.images.shape), text_gradient.astype(self.texts.dtype), scale_gradient

    def sigmoid(self, bias):
        """All of the sigmoid loss but the positives in one walk, for a logit's gradient depends on that logit alone:
        the sum of softplus(l), row maxima, and with p = sigmoid(l): p @ texts, p.T @ images, sums of p * cosine and p.
        """

        def walk(carry, block):
            loss, text_gradient, scale_gradient, bias_gradient = carry
            scaled = self.logits(*block)
            logits, images = scaled + bias, block[1]
            p = jax.nn.sigmoid(logits)
            loss += jnp.sum(jax.nn.softplus(logits))
            scale_gradient += jnp.sum(jnp.where(jnp.isfinite(scaled), p * scaled, 0)) / self.scale
            bias_gradient += jnp.sum(p)
            p = p.astype(images.dtype)
            image_gradient = jnp.dot(p, self.texts, preferred_element_type=jnp.float32).astype(images.dtype)
            text_gradient += jnp.dot(p.T, images, preferred_element_type=jnp.float32)
            return (loss, text_gradient, scale_gradient, bias_gradient), (image_gradient, jnp.max(logits, axis=1))

        zero = varying(jnp.zeros((), jnp.float32))
        start = (zero, varying(jnp.zeros(self.texts.shape, jnp.float32)), zero, zero)
        carry, (image_gradient, row_maximum) = jax.lax.scan(walk, start, self.blocks())
        loss, text_gradient, scale_gradient, bias_gradient = carry
        image_gradient = image_gradient.reshape(self.images.shape)
        text_gradient = text_gradient.astype(self.texts.dtype)
        return loss, row_maximum.reshape(-1), image_gradient, text_gradient, scale_gradient, bias_gradient


def varying(x):
    """A scan's carry must vary over the mesh from the start, as what is added to it does."""
    return jax.lax.pcast(x, (ROWS, COLUMNS), to="varying")


def finite(maximum):
    """A maximum to subtract: 0 where there was nothing but the positive."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0.0)


def finish(maximum, total, axis):
    """(log-sum-exp, maximum) over all tiles along a grid axis."""
    largest = jax.lax.pmax(maximum, axis)
    total = jax.lax.psum(total * jnp.exp(maximum - finite(largest)), axis)
    return finite(largest) + jnp.log(total), largest
