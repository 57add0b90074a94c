"""The ranks of a query's positives among all candidates: the computation that retrieval metrics share.

The matrix of all similarities never exists: queries are split over the devices of a mesh, and each device scans the
candidates in blocks and only counts. Memory grows with queries + candidates, not with their product.

Ties. Two similarities within ``TIE`` of each other count as equal. The last bits of a float32 product depend on the
shape of the matrix, so duplicates would otherwise be ordered by their position. How ties are counted is part of the
definition of a metric:

- ``pessimistic``: every equal candidate stands before the positive; a constant model finds nothing;
- ``optimistic``: none does; a constant model finds everything, which is why no metric here has it as its default;
- ``expected``: the mean over all orders of equal candidates; a constant model scores exactly chance.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from scipy.special import digamma, gammaln

from clip_jax.devices.sharding import batch_sharding, batch_shards, replicated

TIE = 1e-6
"""Between cosines: three times the largest rounding error of float32 products of 128 to 2,048 features (3.6e-7)."""
TIES = ("pessimistic", "optimistic", "expected")
QUERY_BLOCK, CANDIDATE_BLOCK = 2048, 1024
"""Queries of a device and candidates whose similarities exist at one time: 8 MiB."""


class Ranked(NamedTuple):
    """The positives of each query, the most similar first; -inf in ``similarity`` where a query has fewer."""

    similarity: Float[np.ndarray, "queries positives"]
    """Positives that are tied with a better one of the same query have its value."""
    above: Int[np.ndarray, "queries positives"]
    """The number of negatives that are more similar than this positive."""
    tied: Int[np.ndarray, "queries positives"]
    """The number of negatives that are equally similar."""


def check_finite(**embeddings: Float[np.ndarray, "n dim"]) -> None:
    """Raises ValueError if embeddings are not finite, because NaN cannot be ranked."""
    for name, rows in embeddings.items():
        bad = len(rows) - int(np.isfinite(rows).all(axis=1).sum())
        if bad:
            raise ValueError(f"{name}: {bad} of {len(rows)} embeddings are not finite")


def rank(
    queries: Float[np.ndarray, "queries dim"],
    group: Int[np.ndarray, " queries"],
    positives: Int[np.ndarray, "queries positives"],
    candidates: Float[np.ndarray, "candidates dim"],
    candidate_group: Int[np.ndarray, " candidates"],
    mesh: Mesh | None = None,
) -> Ranked:
    """Counts the candidates of other groups that are more similar to a query than its positives, and those tied.

    ``positives[q]`` are indices of the candidates of group ``group[q]``, -1 where there are no more. Embeddings are of
    unit length. Without a mesh everything is on one device.
    """
    similarity = np.full(positives.shape, -np.inf, np.float32)
    for column in range(positives.shape[1]):
        has_positive = np.flatnonzero(positives[:, column] >= 0)
        for start in range(0, len(has_positive), QUERY_BLOCK):
            rows = has_positive[start : start + QUERY_BLOCK]
            equal = candidates[positives[rows, column]]
            similarity[rows, column] = np.einsum("qd,qd->q", queries[rows], equal, dtype=np.float64)
    similarity = _join_tied(-np.sort(-similarity, axis=1))
    above, tied = _count(queries, group, similarity, candidates, candidate_group, mesh)
    return Ranked(similarity, above, tied)


def hit(ranked: Ranked, k: int, ties: str) -> Float[np.ndarray, " queries"]:
    """Whether any positive is among the k nearest; under expected ties the probability of it, in 0..1."""
    return hit_of(*_best(ranked), k, ties)


def hit_of(above: np.ndarray, tied: np.ndarray, equal: np.ndarray, k: int, ties: str) -> Float[np.ndarray, " queries"]:
    """``hit`` from the number of negatives above the best positive, of negatives and of positives tied with it."""
    if ties != "expected":
        return (above + (tied if ties == "pessimistic" else 0) < k).astype(np.float64)
    # Probability that the first ``left`` tied candidates are all negatives: C(tied, left) / C(tied + equal, left).
    left = np.clip(k - above, 0, tied + equal)
    possible = left <= tied
    left = np.where(possible, left, 0)
    miss = np.exp(
        gammaln(tied + 1) - gammaln(tied - left + 1) - gammaln(tied + equal + 1) + gammaln(tied + equal - left + 1)
    )
    return np.where(possible & (left > 0), 1 - miss, np.where(possible, 0.0, 1.0))


def all_equal(ranked: Ranked, candidates: int) -> bool:
    """Whether every query is equally similar to all candidates, its positives among them: the model is constant."""
    _, tied, equal = _best(ranked)
    return bool((tied + equal == candidates).all())


def first_rank(ranked: Ranked, ties: str) -> Float[np.ndarray, " queries"]:
    """The rank of the best positive among the negatives, from 1."""
    above, tied, equal = _best(ranked)
    return 1 + above + {"pessimistic": tied, "optimistic": 0, "expected": tied / (equal + 1)}[ties]


def average_precision(ranked: Ranked, ties: str) -> Float[np.ndarray, " queries"]:
    """The mean over a query's positives of the precision at the rank of each.

    With expected ties, in closed form (McSherry and Najork 2008, section 3).
    """
    has_positive = np.isfinite(ranked.similarity)
    order = np.arange(1, ranked.similarity.shape[1] + 1)
    if ties != "expected":
        before = ranked.above + (ranked.tied if ties == "pessimistic" else 0)
        precision = order / (order + before)
    else:
        # Before a group of ``equal`` tied positives come ``first`` positives and ``above`` negatives.
        same = ranked.similarity[:, :, None] == ranked.similarity[:, None, :]
        equal = (same & has_positive[:, None, :]).sum(axis=2)
        first = ((ranked.similarity[:, None, :] > ranked.similarity[:, :, None]) & has_positive[:, None, :]).sum(axis=2)
        # Position s of the n tied candidates is a positive with probability equal / n; the expected number of positives
        # up to it is then first + 1 + (s - 1) slope. The sum of (a + slope s) / (c + s) is a difference of digammas.
        n, c = equal + ranked.tied, first + ranked.above
        slope = np.divide(equal - 1, n - 1, out=np.zeros(n.shape), where=n > 1)
        a = first + 1 - slope
        precision = (slope * n + (a - slope * c) * (digamma(c + n + 1) - digamma(c + 1))) / np.maximum(n, 1)
    return np.where(has_positive, precision, 0).sum(axis=1) / has_positive.sum(axis=1)


def _best(ranked: Ranked) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(negatives above, negatives tied, positives tied) of each query's best positive."""
    equal = (ranked.similarity == ranked.similarity[:, :1]).sum(axis=1)
    return ranked.above[:, 0].astype(np.float64), ranked.tied[:, 0].astype(np.float64), equal


def _join_tied(similarity: Float[np.ndarray, "queries positives"]) -> Float[np.ndarray, "queries positives"]:
    """Replaces each sorted similarity that is tied with the previous one by the value of that one."""
    for column in range(1, similarity.shape[1]):
        before = similarity[:, column - 1]
        similarity[:, column] = np.where(similarity[:, column] >= before - TIE, before, similarity[:, column])
    return similarity


def _count(queries, group, thresholds, candidates, candidate_group, mesh) -> tuple[np.ndarray, np.ndarray]:
    """(int64[queries, positives] above, the same tied)."""
    shards = 1 if mesh is None else batch_shards(mesh)
    rows = min(QUERY_BLOCK, -(-len(queries) // shards)) * shards
    block = min(CANDIDATE_BLOCK, len(candidates))
    put = _put(mesh)
    blocks = put(_blocks(candidates, block, 0), split=False), put(_blocks(candidate_group, block, 0), split=False)
    padding = put(_blocks(np.zeros(len(candidates), np.float32), block, -np.inf), split=False)
    count, found = _counter(mesh), []
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        padded = [
            put(np.pad(x[part], ((0, rows - len(x[part])), *((0, 0),) * (x.ndim - 1))), split=True)
            for x in (queries.astype(np.float32), group.astype(np.int32), thresholds)
        ]
        found.append(jax.tree.map(np.asarray, count(*padded, blocks[0], blocks[1], padding)))
    above, tied = (np.concatenate(parts)[: len(queries)].astype(np.int64) for parts in zip(*found, strict=True))
    return above, tied


@functools.cache
def _counter(mesh: Mesh | None):
    def count(queries, group, thresholds, candidates, candidate_group, padding):
        def one_block(counts, block):
            vectors, groups, minus = block
            similarity = jnp.dot(queries, vectors.T, precision=jax.lax.Precision.HIGHEST) + minus
            similarity = jnp.where(groups[None, :] == group[:, None], -jnp.inf, similarity)
            # One threshold at a time over a block that is still in the cache. -inf, where a query has fewer
            # positives, gives counts that are not used.
            above, at_least = jax.lax.map(
                lambda threshold: (
                    jnp.sum(similarity > threshold[:, None] + TIE, axis=1),
                    jnp.sum(similarity >= threshold[:, None] - TIE, axis=1),
                ),
                thresholds.T,
            )
            return (counts[0] + above.T, counts[1] + (at_least - above).T), None

        zero = jnp.zeros(thresholds.shape, jnp.int32)
        return jax.lax.scan(one_block, (zero, zero), (candidates, candidate_group, padding))[0]

    if mesh is None:
        return jax.jit(count)
    split, everywhere = batch_sharding(mesh), replicated(mesh)
    return jax.jit(count, in_shardings=(split,) * 3 + (everywhere,) * 3, out_shardings=everywhere)


def _put(mesh: Mesh | None):
    """Returns a function that puts an array, equal on all processes, on the devices: sharded by rows or replicated."""

    def put(x: np.ndarray, *, split: bool) -> jax.Array:
        if mesh is None:
            return jnp.asarray(x)
        sharding = batch_sharding(mesh) if split else replicated(mesh)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return put


def _blocks(x: np.ndarray, size: int, fill: float) -> np.ndarray:
    """[n, ...] -> [blocks, size, ...]."""
    x = x.astype(np.int32 if x.dtype.kind in "iu" else np.float32)
    padded = np.pad(x, ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
    return padded.reshape(-1, size, *x.shape[1:])
