"""Exact nearest-neighbor search in blocks: the k most similar vectors of an index, which need not fit in memory.

The index is read block by block (memory-mapped files), each block is multiplied by all queries and only its k best are
merged with those found so far. Equal similarities are ordered by the vector's number, so that a result does not depend
on the blocks.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax.devices.sharding import batch_sharding, batch_shards, replicated
from clip_jax.evaluation.ranking import check_finite

BLOCK = 65_536
"""Vectors of the index at one time: 128 MiB at 512 features."""
CHUNK = 128
"""Neighbors of which at first only the largest similarity is compared."""


class Hits(NamedTuple):
    """The nearest vectors of each query, best first; -1 and -inf where the index has fewer."""

    similarity: Float[np.ndarray, "queries k"]
    number: Int[np.ndarray, "queries k"]


def search(
    queries: Float[np.ndarray, "queries dim"],
    index: Iterable[Float[np.ndarray, "n dim"]],
    k: int,
    mesh: Mesh | None = None,
    block: int = BLOCK,
) -> Hits:
    """The k most similar vectors, numbered through all parts of ``index`` in their order.

    With a mesh each device searches its share of a block. Raises ValueError for queries that are not finite; a vector
    of the index that is not finite is never found.
    """
    check_finite(queries=queries)
    best = Hits(np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64))
    offset, shards = 0, 1 if mesh is None else batch_shards(mesh)
    on_device = jnp.asarray(queries, jnp.float32)
    for part in index:
        for start in range(0, len(part), block):
            vectors = np.asarray(part[start : start + block], np.float32)
            rows = -(-len(vectors) // shards) * shards
            # A short block is padded to a power of two, so that few programs are compiled.
            rows = min(max(rows, shards * (1 << (rows // shards - 1).bit_length())), -(-block // shards) * shards)
            if rows > len(vectors):
                vectors = np.pad(vectors, ((0, rows - len(vectors)), (0, 0)))
            count = min(block, len(part) - start)
            similarity, number = _nearest(mesh, min(k, rows // shards))(on_device, _put(vectors, mesh), count)
            similarity, number = np.asarray(similarity), np.asarray(number).astype(np.int64)
            best = _merge(best, Hits(similarity, np.where(np.isfinite(similarity), number + offset, -1)), k)
            offset += count
    return best


@functools.cache
def _nearest(mesh: Mesh | None, k: int):
    """(queries, block, valid rows) -> (similarities, rows), the k best of each device's share, side by side."""
    shards = 1 if mesh is None else batch_shards(mesh)

    def nearest(queries, vectors, valid):
        rows = vectors.shape[0] // shards
        if shards == 1:  # a product without a batch axis
            similarity = jnp.dot(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)[None]
        else:
            vectors = vectors.reshape(shards, rows, -1)
            similarity = jnp.einsum("qd,snd->sqn", queries, vectors, precision=jax.lax.Precision.HIGHEST)
        number = jnp.arange(shards)[:, None] * rows + jnp.arange(rows)
        similarity = jnp.where((number < valid)[:, None, :] & jnp.isfinite(similarity), similarity, -jnp.inf)
        found, where = top_k(similarity, k)
        where = where + jnp.arange(shards)[:, None, None] * rows
        return tuple(jnp.moveaxis(x, 0, 1).reshape(queries.shape[0], -1) for x in (found, where))

    if mesh is None:
        return jax.jit(nearest)
    everywhere = replicated(mesh)
    return jax.jit(nearest, in_shardings=(everywhere, batch_sharding(mesh), None), out_shardings=everywhere)


def top_k(
    similarity: Float[Array, "... n"], k: int, chunk: int = CHUNK
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """``jax.lax.top_k``, faster for long rows: the k largest are in the k chunks with the largest maxima.

    This holds for equal values, too, which stay in their order: the maximum of an earlier chunk is an earlier value.
    """
    *lead, n = similarity.shape
    if n % chunk or n // chunk <= k:
        return jax.lax.top_k(similarity, k)
    chunks = similarity.reshape(*lead, n // chunk, chunk)
    best = jnp.sort(jax.lax.top_k(chunks.max(axis=-1), k)[1], axis=-1)
    inside = jnp.take_along_axis(chunks, best[..., None], axis=-2)
    found, where = jax.lax.top_k(inside.reshape(*lead, k * chunk), k)
    return found, jnp.take_along_axis(best, where // chunk, axis=-1) * chunk + where % chunk


def _put(block: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(block)
    return jax.make_array_from_callback(block.shape, batch_sharding(mesh), lambda index: block[index])


def _merge(a: Hits, b: Hits, k: int) -> Hits:
    similarity = np.concatenate([a.similarity, b.similarity], axis=1)
    number = np.concatenate([a.number, b.number], axis=1)
    order = np.lexsort((np.where(number < 0, np.iinfo(np.int64).max, number), -similarity), axis=1)[:, :k]
    return Hits(np.take_along_axis(similarity, order, 1), np.take_along_axis(number, order, 1))
