"""Foreign tensors <-> our tree, by a table: each row names a tensor on both sides and says how its axes are arranged.

One table serves both directions. A layout is written as in einops: ``(three heads dim) width -> width three heads
dim`` reads a fused matrix of theirs (left) as our four axes (right), and backwards the other way round; ``()`` is an
axis of size one. ``{layer}`` in a foreign name counts blocks, which our tree keeps stacked along its first axis.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.errors import UserError, nearest
from clip_jax.models.clip import CLIP, Architecture

VECTOR = "features -> features"
SCALAR = " -> "
ROWS = "rows features -> rows features"
MATRIX = "out in -> in out"


class Row(NamedTuple):
    """One tensor of theirs, or one of each block, and the leaf of our tree that it is."""

    theirs: str
    ours: str
    layout: str


def rows(theirs: str, ours: str, *table: tuple[str, str, str]) -> list[Row]:
    """Rows below a prefix on each side."""
    return [Row(theirs + their_name, ours + our_name, layout) for their_name, our_name, layout in table]


def read(state: Mapping[str, np.ndarray], table: Sequence[Row], shapes: Mapping[str, tuple], sizes: Mapping[str, int]):
    """Their tensors -> our tree, in float32; each is read once. UserError: one missing, one too many, a wrong shape.

    ``shapes`` are those of our leaves, ``sizes`` those of axes that ours do not show (the two of a patch).
    """
    expected = {name for row in table for name in _names(row, shapes)}
    _check_names(state.keys(), expected)
    params = {}
    for row in table:
        shape, layers = _block_shape(row, shapes)
        source, target = _sides(row.layout)
        axes = _sizes(target, shape, sizes)
        leaf = np.empty(shapes[row.ours], np.float32)
        for layer, name in enumerate(_names(row, shapes)):
            tensor = np.asarray(state[name])
            wanted = _shape(source, axes)
            if tensor.shape != wanted:
                raise UserError(f"{name}: has the shape {list(tensor.shape)}, this model's is {list(wanted)}")
            leaf[layer if layers else ...] = _rearrange(tensor, source, target, axes)
        params[row.ours] = leaf
    return unflatten_dict(params, sep="/")


def write(params: Any, table: Sequence[Row], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Our tree -> their tensors, the inverse of ``read``."""
    leaves = flatten_dict(params, sep="/")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    state = {}
    for row in table:
        shape, layers = _block_shape(row, shapes)
        source, target = _sides(row.layout)
        axes = _sizes(target, shape, sizes)
        leaf = np.asarray(leaves[row.ours])
        for layer, name in enumerate(_names(row, shapes)):
            tensor = _rearrange(leaf[layer] if layers else leaf, target, source, axes)
            state[name] = np.ascontiguousarray(tensor).reshape(_shape(source, axes))  # a scalar must stay one
    return state


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of an architecture's tree by its path, ``image/transformer/blocks/mlp/up``."""
    tree = nn.meta.unbox(jax.eval_shape(CLIP(architecture).init, jax.random.key(0)))
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


def _check_names(given, expected: set[str]) -> None:
    missing, extra = sorted(expected - set(given)), sorted(set(given) - expected)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}{more}: missing from the weights{nearest(missing[0], extra)}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{extra[0]}{more}: in the weights, but not a tensor of this model")


def _names(row: Row, shapes: Mapping[str, tuple]) -> list[str]:
    if "{layer}" not in row.theirs:
        return [row.theirs]
    return [row.theirs.replace("{layer}", str(layer)) for layer in range(shapes[row.ours][0])]


def _block_shape(row: Row, shapes: Mapping[str, tuple]) -> tuple[tuple[int, ...], bool]:
    """The shape of our leaf without the axis that stacks blocks, and whether it has one."""
    stacked = "{layer}" in row.theirs
    return shapes[row.ours][1:] if stacked else shapes[row.ours], stacked


Side = list[list[str]]


def _sides(layout: str) -> tuple[Side, Side]:
    """Per axis of each side, the names of what it is made of."""
    left, right = ([(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\S+)", s)] for s in layout.split("->"))
    return left, right


def _sizes(side: Side, shape: tuple[int, ...], sizes: Mapping[str, int]) -> dict[str, int]:
    return {**sizes, **{names[0]: size for names, size in zip(side, shape, strict=True) if len(names) == 1}}


def _shape(side: Side, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[name] for name in names) for names in side)


def _rearrange(array: np.ndarray, source: Side, target: Side, sizes: Mapping[str, int]) -> np.ndarray:
    before, after = ([name for names in side for name in names] for side in (source, target))
    array = array.reshape([sizes[name] for name in before]).transpose([before.index(name) for name in after])
    return array.reshape(_shape(target, sizes))
