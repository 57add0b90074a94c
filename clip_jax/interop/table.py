"""Foreign tensors <-> our tree, by a table: each row names a tensor on both sides and says how its axes are arranged.

One table works in both directions. A layout is written as in einops: ``(three heads dim) width -> width three heads
dim`` turns their fused matrix (left) into our four axes (right), or back; ``()`` is an axis of size one. ``{layer}`` in
a foreign name is the index of a block, which is the first axis of our stacked leaf; ``{layer+1}`` starts at one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Num

from clip_jax.errors import UserError
from clip_jax.interop.tensors import check_names
from clip_jax.models.clip import CLIP, Architecture, Params

VECTOR = "features -> features"
SCALAR = " -> "
ROWS = "rows features -> rows features"
MATRIX = "out in -> in out"


class Row(NamedTuple):
    """One of their tensors, or one per block, and the leaf of our tree that holds it."""

    theirs: str
    ours: str
    layout: str
    part: int | None = None
    """Where several of their tensors make up one leaf: the index of this one on the axis named ``part``."""


def rows(theirs: str, ours: str, *table: tuple) -> list[Row]:
    """Rows with a prefix on each side."""
    return [Row(theirs + their_name, ours + our_name, *layout) for their_name, our_name, *layout in table]


def read(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Row],
    shapes: Mapping[str, tuple],
    sizes: Mapping[str, int],
    put: Callable[[str, np.ndarray], Any] = lambda path, leaf: leaf,
) -> Params:
    """Their tensors -> our tree, in float32; each is read once.

    ``shapes`` are those of our leaves, ``sizes`` those of axes that our leaves do not show (height and width of a
    patch). ``put(path, leaf)`` moves each complete leaf, for example to the devices; the largest leaves come first, so
    that no large leaf is ever in memory twice next to all others. Raises UserError for a tensor that is missing,
    unknown or of a wrong shape.
    """
    check_names(tensors, {name for row in table for name in _names(row, shapes)})
    by_leaf: dict[str, list[Row]] = {}
    for row in table:
        by_leaf.setdefault(row.ours, []).append(row)
    params = {}
    for path in sorted(by_leaf, key=lambda path: -math.prod(shapes[path])):
        leaf = np.empty(shapes[path], np.float32)
        for row in by_leaf[path]:
            _read_row(tensors, row, leaf, shapes, sizes)
        params[path] = put(path, leaf)
    return unflatten_dict(params, sep="/")


def _read_row(
    tensors: Mapping[str, np.ndarray],
    row: Row,
    leaf: Float[np.ndarray, "..."],
    shapes: Mapping[str, tuple],
    sizes: Mapping[str, int],
) -> None:
    source, target, axes = _layout(row, shapes, sizes)
    expected = _shape(source, axes)
    for name, index in _indices(row, shapes):
        tensor = np.asarray(tensors[name])
        if tensor.shape != expected:
            raise UserError(f"{name}: has the shape {list(tensor.shape)}, this model's is {list(expected)}")
        leaf[index] = _rearrange(tensor, source, target, axes)


def write(params: Params, table: Sequence[Row], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Our tree -> their tensors, the inverse of ``read``."""
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    tensors = {}
    for row in table:
        source, target, axes = _layout(row, shapes, sizes)
        for name, index in _indices(row, shapes):
            tensor = _rearrange(leaves[row.ours][index], target, source, axes)
            # ascontiguousarray turns a scalar into a vector: reshape it back.
            tensors[name] = np.ascontiguousarray(tensor).reshape(_shape(source, axes))
    return tensors


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of an architecture's tree, by path (``image/transformer/blocks/mlp/up``)."""
    return shapes_of(CLIP(architecture).init, jax.random.key(0))


def shapes_of(function: Callable[..., Any], *arguments: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tree that a function would return, by path, without computing it."""
    tree = nn.meta.unbox(jax.eval_shape(function, *arguments))
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


LAYER = re.compile(r"\{layer(?:\+(\d+))?\}")


def _names(row: Row, shapes: Mapping[str, tuple]) -> list[str]:
    found = LAYER.search(row.theirs)
    if not found:
        return [row.theirs]
    first = int(found[1] or 0)
    return [LAYER.sub(str(first + layer), row.theirs) for layer in range(shapes[row.ours][0])]


def _indices(row: Row, shapes: Mapping[str, tuple]) -> list[tuple[str, tuple]]:
    """The name of each tensor of a row, and the index of its values in our leaf."""
    inside = ()
    if row.part is not None:
        before = next(i for i, names in enumerate(_sides(row.layout)[1]) if names == ["part"])
        inside = (*(slice(None),) * before, row.part)
    stacked = LAYER.search(row.theirs)
    names = _names(row, shapes)
    return [(name, ((layer,) if stacked else ()) + (inside or (...,))) for layer, name in enumerate(names)]


Side = list[list[str]]


def _sides(layout: str) -> tuple[Side, Side]:
    """For each side, the names of the factors of every axis."""
    left, right = ([(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\S+)", s)] for s in layout.split("->"))
    return left, right


def _layout(row: Row, shapes: Mapping[str, tuple], sizes: Mapping[str, int]) -> tuple[Side, Side, dict[str, int]]:
    """Both sides of one tensor, without our axes for blocks and parts, and the size of every named axis."""
    source, target = _sides(row.layout)
    shape = shapes[row.ours][1:] if LAYER.search(row.theirs) else shapes[row.ours]
    known = {names[0]: size for names, size in zip(target, shape, strict=True) if len(names) == 1}
    return source, [names for names in target if names != ["part"]], {**sizes, **known}


def _shape(side: Side, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[name] for name in names) for names in side)


def _rearrange(
    array: Num[np.ndarray, "..."], source: Side, target: Side, sizes: Mapping[str, int]
) -> Num[np.ndarray, "..."]:
    before, after = ([name for names in side for name in names] for side in (source, target))
    array = array.reshape([sizes[name] for name in before]).transpose([before.index(name) for name in after])
    return array.reshape(_shape(target, sizes))
