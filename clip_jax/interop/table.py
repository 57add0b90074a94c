"""Foreign tensors <-> our tree, by a table: each row names a tensor on both sides and says how its axes are arranged.

One table serves both directions. A layout is written as in einops: ``(three heads dim) width -> width three heads
dim`` reads a fused matrix of theirs (left) as our four axes (right), and backwards the other way round; ``()`` is an
axis of size one. ``{layer}`` in a foreign name counts blocks, which our tree keeps stacked along its first axis;
``{layer+1}`` counts them from one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
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
    part: int | None = None
    """Where several tensors of theirs make up one leaf: the index of this one on the axis that is called ``part``."""


def rows(theirs: str, ours: str, *table: tuple) -> list[Row]:
    """Rows below a prefix on each side."""
    return [Row(theirs + their_name, ours + our_name, *layout) for their_name, our_name, *layout in table]


def read(
    state: Mapping[str, np.ndarray],
    table: Sequence[Row],
    shapes: Mapping[str, tuple],
    sizes: Mapping[str, int],
    place: Callable[[str, np.ndarray], Any] = lambda path, leaf: leaf,
):
    """Their tensors -> our tree, in float32; each is read once. UserError: one missing, one too many, a wrong shape.

    ``shapes`` are those of our leaves, ``sizes`` those of axes that ours do not show (the two of a patch). ``place``
    takes each leaf when it is whole, by its path, to where it shall be. The largest come first: then at no moment
    is there a large leaf twice beside all others.
    """
    expected = {name for row in table for name in _names(row, shapes)}
    _check_names(state.keys(), expected)
    by_leaf: dict[str, list[Row]] = {}
    for row in table:
        by_leaf.setdefault(row.ours, []).append(row)
    params = {}
    for path in sorted(by_leaf, key=lambda path: -math.prod(shapes[path])):
        leaf = np.empty(shapes[path], np.float32)
        for row in by_leaf[path]:
            _read_row(state, row, leaf, shapes, sizes)
        params[path] = place(path, leaf)
    return unflatten_dict(params, sep="/")


def _read_row(state: Mapping, row: Row, leaf: np.ndarray, shapes: Mapping[str, tuple], sizes: Mapping[str, int]):
    source, target, axes = _layout(row, shapes, sizes)
    wanted = _shape(source, axes)
    for name, where in _places(row, shapes):
        tensor = np.asarray(state[name])
        if tensor.shape != wanted:
            raise UserError(f"{name}: has the shape {list(tensor.shape)}, this model's is {list(wanted)}")
        leaf[where] = _rearrange(tensor, source, target, axes)


def write(params: Any, table: Sequence[Row], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Our tree -> their tensors, the inverse of ``read``."""
    leaves = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    state = {}
    for row in table:
        source, target, axes = _layout(row, shapes, sizes)
        for name, place in _places(row, shapes):
            tensor = _rearrange(leaves[row.ours][place], target, source, axes)
            state[name] = np.ascontiguousarray(tensor).reshape(_shape(source, axes))  # a scalar must stay one
    return state


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of an architecture's tree by its path, ``image/transformer/blocks/mlp/up``."""
    return shapes_of(CLIP(architecture).init, jax.random.key(0))


def shapes_of(function: Callable[..., Any], *arguments: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tree that a function would return, by path; nothing is computed."""
    tree = nn.meta.unbox(jax.eval_shape(function, *arguments))
    return {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}


def _check_names(given, expected: set[str]) -> None:
    missing, extra = sorted(expected - set(given)), sorted(set(given) - expected)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}{more}: missing from the weights{nearest(missing[0], extra)}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{extra[0]}{more}: in the weights, but not a tensor of this model")


LAYER = re.compile(r"\{layer(?:\+(\d+))?\}")


def _names(row: Row, shapes: Mapping[str, tuple]) -> list[str]:
    found = LAYER.search(row.theirs)
    if not found:
        return [row.theirs]
    first = int(found[1] or 0)
    return [LAYER.sub(str(first + layer), row.theirs) for layer in range(shapes[row.ours][0])]


def _places(row: Row, shapes: Mapping[str, tuple]) -> list[tuple[str, tuple]]:
    """Each tensor's name, and the index of what it is in our leaf."""
    inside = ()
    if row.part is not None:
        before = next(i for i, names in enumerate(_sides(row.layout)[1]) if names == ["part"])
        inside = (*(slice(None),) * before, row.part)
    stacked = LAYER.search(row.theirs)
    names = _names(row, shapes)
    return [(name, ((layer,) if stacked else ()) + (inside or (...,))) for layer, name in enumerate(names)]


Side = list[list[str]]


def _sides(layout: str) -> tuple[Side, Side]:
    """Per axis of each side, the names of what it is made of."""
    left, right = ([(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\S+)", s)] for s in layout.split("->"))
    return left, right


def _layout(row: Row, shapes: Mapping[str, tuple], sizes: Mapping[str, int]) -> tuple[Side, Side, dict[str, int]]:
    """Both sides of one tensor, without our axes of blocks and parts, and the size of every named axis."""
    source, target = _sides(row.layout)
    shape = shapes[row.ours][1:] if LAYER.search(row.theirs) else shapes[row.ours]
    known = {names[0]: size for names, size in zip(target, shape, strict=True) if len(names) == 1}
    return source, [names for names in target if names != ["part"]], {**sizes, **known}


def _shape(side: Side, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[name] for name in names) for names in side)


def _rearrange(array: np.ndarray, source: Side, target: Side, sizes: Mapping[str, int]) -> np.ndarray:
    before, after = ([name for names in side for name in names] for side in (source, target))
    array = array.reshape([sizes[name] for name in before]).transpose([before.index(name) for name in after])
    return array.reshape(_shape(target, sizes))
