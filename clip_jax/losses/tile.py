"""One device's tile of the logit matrix: the mesh as a grid, the ring that brings images, and the walk through blocks.

Nothing here knows which loss it is for.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jaxtyping import Array, Float

from clip_jax.sharding import batch_shards

ROWS, COLUMNS, REPLICAS = "grid_row", "grid_column", "replica"
BLOCK_LOGITS = 2**21
"""Logits that a device holds at one time (8 MiB of float32), in blocks as square as the tile allows."""
GATHERED_BYTES = 2**30
"""What gathered texts and their float32 gradient may take on a device. A grid of fewer rows gathers less and sends
more; one of a single row gathers nothing: a plain ring."""


def grid_of(mesh: Mesh, text: Float[Array, "batch dim"]) -> AbstractMesh:
    """The same devices in the same order, data x fsdp as rows and columns; replicas along tensor."""
    shards = batch_shards(mesh)
    rows = grid_rows(shards, *text.shape, text.dtype.itemsize)
    sizes = (rows, shards // rows, mesh.shape["tensor"])
    return AbstractMesh(sizes, (ROWS, COLUMNS, REPLICAS), axis_types=(AxisType.Auto,) * 3)


def grid_rows(shards: int, batch: int, dim: int, itemsize: int) -> int:
    """As square as possible, which sends least, while the texts of a grid column fit into ``GATHERED_BYTES``."""
    row_bytes = batch // shards * dim * (itemsize + 4)
    rows = range(1, math.isqrt(shards) + 1)
    return max(r for r in rows if shards % r == 0 and (r == 1 or r * row_bytes <= GATHERED_BYTES))


def around(chunk: Any, kept: Any, walk: Callable, merge: Callable) -> tuple[Any, Any]:
    """Sends every device's chunk to all devices of its grid row; what they find out about it comes home.

    ``walk(chunk, kept) -> (result, kept)`` is run by every device for every chunk; ``kept`` stays on the device, the
    results for a chunk are merged on their way, one hop behind it. Hops are issued before the walk that they overlap
    with. (The last one brings the chunks home as well, where nobody needs them: all hops are alike.)
    """
    size = jax.lax.axis_size(COLUMNS)

    def shift(x):
        return jax.lax.ppermute(x, COLUMNS, [(i, (i + 1) % size) for i in range(size)])

    def hop(carry, _):
        chunk, result, kept = carry
        following, arrived = shift((chunk, result))
        result, kept = walk(chunk, kept)
        return (following, merge(arrived, result), kept), None

    if size == 1:
        return walk(chunk, kept)
    following = shift(chunk)
    result, kept = walk(chunk, kept)
    (_, result, kept), _ = jax.lax.scan(hop, (following, result, kept), length=size - 1)
    return shift(result), kept


def walk(step: Callable, send: Callable, rows: Any, columns: Any, start: Any, kept: Any) -> tuple[Any, Any]:
    """Goes through the blocks of a tile; ``rows`` and ``columns`` are trees of arrays whose first axis is the tile's.

    ``step(rows, columns, result, kept) -> (result, kept)`` does one block: ``result`` belongs to the block's rows and
    begins as ``start``, a tree of one row's values; ``kept`` belongs to its columns.
    Returns ``send(result)`` of all rows, and ``kept``.
    """
    height, width = (jax.tree.leaves(x)[0].shape[0] for x in (rows, columns))
    block_height = divisor(height, math.isqrt(BLOCK_LOGITS))
    block_width = divisor(width, BLOCK_LOGITS // block_height)

    def part(x, number):
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * block_width, block_width), x)

    def over_rows(kept, row):
        def over_columns(number, carry):
            result, kept = carry
            result, new = step(row, part(columns, number), result, part(kept, number))
            kept = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, number * block_width, axis=0), kept, new
            )
            return result, kept

        result = jax.tree.map(lambda x: varying(jnp.broadcast_to(x, (block_height, *x.shape))), start)
        result, kept = jax.lax.fori_loop(0, width // block_width, over_columns, (result, kept))
        return kept, send(result)

    blocks = jax.tree.map(lambda x: x.reshape(height // block_height, block_height, *x.shape[1:]), rows)
    kept, results = jax.lax.scan(over_rows, kept, blocks)
    return jax.tree.map(lambda x: x.reshape(height, *x.shape[2:]), results), kept


def own(x: Any, pairs: int) -> Any:
    """What belongs to this device's own pairs, of what belongs to all texts of its grid column."""
    first = jax.lax.axis_index(ROWS) * pairs
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, pairs), x)


def total(x: Any) -> Any:
    """The sum over all devices of the grid, one axis after the other.

    Over both at once XLA stops the process where the mesh's data axis is in both (jax 0.12, data 4 x fsdp 2): it finds
    that two parts of one axis are neighbours and could have been one.
    """
    return jax.lax.psum(jax.lax.psum(x, COLUMNS), ROWS)


def divisor(size: int, limit: int) -> int:
    """The largest divisor up to a limit."""
    return max(k for k in range(1, min(size, limit) + 1) if size % k == 0)


def varying(x):
    """A scan's carry must vary over the mesh from the start, as what is added to it does."""
    return jax.lax.pcast(x, (ROWS, COLUMNS), to="varying")


def product(x, y):
    """float32 of a matrix product. What is float32 is multiplied as float32: unasked, TPUs and GPUs round it first."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def logits(image, image_pair, text, text_pair, scale):
    """float32[images, texts], -inf where image and text are a pair."""
    cosines = product(image, text.T)
    return jnp.where(image_pair[:, None] == text_pair[None, :], -jnp.inf, scale * cosines)


def positives(image, text, scale):
    """float32[pairs]. Multiplied in float32, for bfloat16 products would not match the logits."""
    return scale * jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), axis=-1)


def summary(logits, axis):
    """(maximum, sum of exponentials relative to it) along an axis; (-inf, 0) where there is nothing but -inf."""
    maximum = jnp.max(logits, axis=axis)
    return maximum, jnp.sum(jnp.exp(logits - jnp.expand_dims(finite(maximum), axis)), axis=axis)


def merge(one, other):
    """The summary of two sets of logits together."""
    (maximum, total), (other_maximum, other_total) = one, other
    largest = jnp.maximum(maximum, other_maximum)
    shift = finite(largest)
    return largest, total * jnp.exp(maximum - shift) + other_total * jnp.exp(other_maximum - shift)


def log_sum_exp(summary):
    maximum, total = summary
    return finite(maximum) + jnp.log(total)


def finite(maximum):
    """A maximum to subtract: 0 where there was nothing but the positive."""
    return jnp.where(jnp.isfinite(maximum), maximum, 0.0)
