"""Muon (Jordan et al. 2024): the momentum of each matrix is replaced by the nearest orthogonal matrix.

Which axes of a kernel are its matrix follows from its name: heads belong to one of its sides; the layers of a stack,
and queries, keys and values, are matrices of their own. Embeddings, the first and the last layer, and vectors are left
to Adam, as in Jordan's implementation.
"""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

STEPS = 5
"""Newton-Schulz iterations (optax's and Jordan's default)."""
UPDATE_RMS = 0.2
"""The RMS of AdamW's updates, with which AdamW's learning rate and weight decay can be kept (Liu et al. 2025, 2.2)."""

MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "qkv": ((-4,), (-2, -1)),
    "key_value": ((-4,), (-2, -1)),
    "query": ((-3,), (-2, -1)),
    "key": ((-3,), (-2, -1)),
    "value": ((-3,), (-2, -1)),
    "out": ((-3, -2), (-1,)),
    "up": ((-2,), (-1,)),
    "gate": ((-2,), (-1,)),
    "down": ((-2,), (-1,)),
    "kernel": ((-4, -3, -2), (-1,)),
}
"""Name -> axes that are summed over, axes of the output. All other axes count matrices."""


def dimensions(params: Any) -> Any:
    """``MuonDimensionNumbers`` for every matrix of a tree that has no others."""

    def one(path, leaf):
        axes = (tuple(axis + leaf.ndim for axis in side) for side in _axes(_name(path), leaf.ndim))
        return MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(one, params)


def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if _name(path) in MATRICES else "adam", params)


def scale_by(
    adam: optax.GradientTransformation, *, beta: float, eps: float, first_moment_dtype: Any
) -> optax.GradientTransformation:
    """Muon for the matrices, with updates as large as AdamW's; ``adam`` for the rest."""
    muon = scale_by_muon(
        ns_steps=STEPS, beta=beta, eps=eps, mu_dtype=first_moment_dtype, weight_dimension_numbers=dimensions
    )

    def rescale(updates, params=None):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x * UPDATE_RMS * math.sqrt(max(_sides(_name(path), x.shape))), updates
        )

    return optax.partition({"muon": optax.chain(muon, optax.stateless(rescale)), "adam": adam}, labels)


def update_flops(params: Any) -> int:
    """FLOPs on one device for the orthogonal matrices, from shapes and shardings: three products per iteration."""

    def one(path, leaf):
        if _name(path) not in MATRICES:
            return 0
        short, long = sorted(_sides(_name(path), leaf.shape))
        products = STEPS * (2 * 2 * short * short * long + 2 * short**3)
        share = math.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size
        return int(products * leaf.size // (short * long) * share)

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(one, params)))


def _sides(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    return tuple(math.prod(shape[axis] for axis in side) for side in _axes(name, len(shape)))


def _axes(name: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ((-2,), (-1,)) if name == "kernel" and ndim < 4 else MATRICES[name]  # a dense layer's; else a convolution's


def _name(path) -> str:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
