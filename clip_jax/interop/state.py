"""``State``: the tensors of a file by name, read one at a time when they are asked for.

Every reader here returns one, and every layout's names are turned into another's by a ``State`` over a ``State``; so a
checkpoint is never in memory twice, whatever it went through.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """One tensor that has not been read yet."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class State(Mapping[str, np.ndarray]):
    """Names -> arrays. ``state[name]`` reads the tensor anew, and nothing is kept; ``entries`` has the shapes.

    ``source`` is what error messages call it.
    """

    def __init__(self, source: str, entries: Mapping[str, Entry]):
        self.source = source
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would read the tensor.

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> Shape:
        return self.entries[name].shape


def from_arrays(source: str, arrays: Mapping[str, np.ndarray]) -> State:
    """A state over arrays that are in memory."""
    return State(source, {name: Entry(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()})
