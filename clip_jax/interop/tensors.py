"""``Tensors``: the tensors of a file by name, each read from the file only when it is used.

Every reader of this package returns one, and each translation of names wraps a ``Tensors`` in another; so a checkpoint
is never in memory twice, however often it is translated.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from clip_jax.errors import UserError, nearest

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """One tensor that has not been read yet."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """Names -> arrays. ``tensors[name]`` reads the tensor anew, without caching; ``entries`` has the shapes.

    ``source`` is the name of the file in error messages.
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


LEADING = ("module.", "model.")
"""Prefixes that data parallelism, averaging and trainers add to every name, possibly several times."""
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Prefixes that PyTorch adds to the names of a compiled, sharded or rematerialized module."""
COUNTS = ("n_averaged",)
"""A tensor that PyTorch's AveragedModel adds to those of the model."""


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Each name as the bare model has it -> the name in the file. Unchanged where two would become one."""
    names = [name for name in names if name not in COUNTS]
    bare = names
    for part in ANYWHERE:
        bare = [name.replace(part, "") for name in bare]
    while prefix := next((prefix for prefix in LEADING if bare and all(x.startswith(prefix) for x in bare)), ""):
        bare = [name.removeprefix(prefix) for name in bare]
    found = dict(zip(bare, names, strict=True))
    return found if len(found) == len(names) else {name: name for name in names}


def unwrapped(tensors: Tensors) -> Tensors:
    """The tensors under the names of the bare model."""
    names = unwrapped_names(tensors.entries)
    return Tensors(tensors.source, {bare: tensors.entries[name] for bare, name in names.items()})


def from_arrays(source: str, arrays: Mapping[str, np.ndarray]) -> Tensors:
    """Arrays that are already in memory, as ``Tensors``."""
    return Tensors(source, {name: Entry(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()})


def check_names(given: Iterable[str], expected: set[str]) -> None:
    """UserError for the first tensor that the model needs and the weights lack, or that the model does not have."""
    given = set(given)
    missing, extra = sorted(expected - given), sorted(given - expected)
    if missing:
        raise UserError(f"{_first(missing)}: missing from the weights{nearest(missing[0], extra)}")
    if extra:
        raise UserError(f"{_first(extra)}: in the weights, but not a tensor of this model")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
