"""Learning rates that differ between the parameters of a model: factors by pattern, and by depth."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax.errors import UserError

HEADS = ("norm_post", "norm_final", "projection", "projection_bias", "attention_pooling")
"""Parameters after a tower's blocks."""


def scale_by_factors(
    factors: Sequence[Mapping[str, float]], layer_decay: float, depths: Mapping[str, int]
) -> optax.GradientTransformation:
    """Multiplies each update by its parameter's factor: the last part of a chain, so that decay is scaled as well.

    A parameter has the product of the factors of all patterns that match its path. With a ``layer_decay`` d, block i of
    a tower of n blocks (``depths``: tower -> n) has d^(n - i), its embeddings d^(n + 1), and what comes after its
    blocks 1 (Bao et al. 2022, BEiT, appendix).
    """

    def factor(path, leaf):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        matching = [
            value
            for patterns in factors
            for pattern, value in patterns.items()
            if fnmatch.fnmatchcase("/".join(names), pattern)
        ]
        product = math.prod(matching)
        depth = depths.get(names[0])
        if layer_decay == 1 or depth is None or names[1] in HEADS:
            return product
        if "blocks" not in names:
            return product * layer_decay ** (depth + 1)
        layers = jnp.arange(depth, dtype=jnp.float32).reshape(-1, *(1,) * (leaf.ndim - 1))
        return product * layer_decay ** (depth - layers)

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(
            lambda p, x: (x * factor(p, x)).astype(x.dtype), updates
        )
    )


def frozen_patterns(factors: Sequence[Mapping[str, float]]) -> tuple[str, ...]:
    """The patterns with a factor of 0: such parameters are frozen, with neither gradient nor moments."""
    return tuple(pattern for patterns in factors for pattern, value in patterns.items() if value == 0)


def check_factors(params: Any, factors: Sequence[Mapping[str, float]]) -> None:
    """Raises UserError for a pattern that matches no parameter."""
    paths = [
        "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    for patterns in factors:
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
                raise UserError(f"config.optimizer.rate_factors: {pattern!r} matches no parameter, as {paths[0]} would")
