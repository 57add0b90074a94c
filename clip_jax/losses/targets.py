"""Targets of the softmax loss other than the diagonal: several positives in a row or a column, and label smoothing.

A row with n positives among N texts has the target ``(1 - smoothing) / n`` on each positive, plus ``smoothing / N`` on
every text. Its cross-entropy is its log-sum-exp minus the expected logit under the target. Both are
computed relative to the logit of the row's own pair, which avoids cancellation of large terms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from clip_jax.losses.mesh_grid import ROWS


class TargetSums(NamedTuple):
    """Sums over all logits of a row or a column except that of its own pair and those of padding."""

    count: Float[Array, "n"]
    distance: Float[Array, "n"]
    """The sum of ``logit - pair's logit``."""
    positives: Float[Array, "n"]
    """The number of positives."""
    positive_distance: Float[Array, "n"]
    """``distance`` over the positives only."""
    positive: Float[Array, "n"]
    """The largest logit of a positive."""
    negative: Float[Array, "n"]
    """The largest logit of a negative."""


class Targets(NamedTuple):
    """The targets of a row or a column."""

    positive: Float[Array, "n"]
    """The target of each positive, in addition to ``every``."""
    every: Float[Array, "n"]
    """The target of every logit from label smoothing."""
    others: Float[Array, "n"]
    """The sum of the targets of all logits except the pair's."""


EMPTY = TargetSums(*(np.float32(0),) * 4, *(np.float32(-np.inf),) * 2)


def reduce_block(
    logits: Float[Array, "images texts"],
    paired: Float[Array, "..."],
    same_group: Bool[Array, "images texts"],
    axis: int,
) -> TargetSums:
    """The sums of a block along an axis; ``paired`` are the logits of the pairs, and excluded logits are -inf."""
    included = jnp.isfinite(logits)
    positive = included & same_group
    distance = jnp.where(included, logits - paired, 0)
    return TargetSums(
        count=jnp.sum(included, axis, dtype=jnp.float32),
        distance=jnp.sum(distance, axis),
        positives=jnp.sum(positive, axis, dtype=jnp.float32),
        positive_distance=jnp.sum(jnp.where(positive, distance, 0), axis),
        positive=jnp.max(jnp.where(positive, logits, -jnp.inf), axis),
        negative=jnp.max(jnp.where(same_group, -jnp.inf, logits), axis),
    )


def merge(one: TargetSums, other: TargetSums) -> TargetSums:
    added = [a + b for a, b in zip(one[:4], other[:4], strict=True)]
    return TargetSums(*added, *(jnp.maximum(a, b) for a, b in zip(one[4:], other[4:], strict=True)))


def reduce_grid_rows(columns: TargetSums) -> TargetSums:
    """Combines the columns of the devices of a grid column."""
    return TargetSums(*jax.lax.psum(tuple(columns[:4]), ROWS), *jax.lax.pmax(tuple(columns[4:]), ROWS))


def targets(sums: TargetSums, smoothing: float) -> Targets:
    positive, every = (1 - smoothing) / (sums.positives + 1), smoothing / (sums.count + 1)
    return Targets(positive, every, sums.positives * positive + sums.count * every)


def expected(sums: TargetSums, of: Targets) -> Float[Array, "n"]:
    """The expected logit under the target, minus the pair's."""
    return of.positive * sums.positive_distance + of.every * sums.distance


def target_of_logits(
    of: Targets, logits: Float[Array, "images texts"], same_group: Bool[Array, "images texts"]
) -> Float[Array, "images texts"]:
    """The target of each logit of a block; 0 for excluded ones, which are -inf."""
    return jnp.where(jnp.isfinite(logits), jnp.where(same_group, of.positive, 0) + of.every, 0)
