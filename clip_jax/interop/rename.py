"""Translates the names of one layout into those of another, by a table of rules that works in both directions.

OpenCLIP's names are the common form: every other layout has rules to and from OpenCLIP's names, and only
``open_clip.py`` knows our parameter tree. Tensors stay in their file until they are used.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.interop.tensors import Entry, Tensors, check_names


class Form(NamedTuple):
    """How the axes of one tensor change in the translation to OpenCLIP, and back."""

    to_open_clip: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T)
LEADING_ONE = Form(lambda x: x[None], lambda x: x[0])
NO_LEADING_ONE = Form(lambda x: x[0], lambda x: x[None])
SCALAR = Form(lambda x: x.reshape(()), lambda x: x.reshape(1))


class Rule(NamedTuple):
    """The tensors ``theirs``, each in its form, concatenated on the first axis, equal ``open_clip``, concatenated.

    Where ``open_clip`` names several tensors, ``parts`` are their shares of the first axis.
    """

    theirs: tuple[str, ...]
    open_clip: tuple[str, ...]
    form: Form = SAME
    parts: tuple[int, ...] = (1,)


def same(theirs: str, open_clip: str, form: Form = SAME) -> Rule:
    """One tensor to one tensor."""
    return Rule((theirs,), (open_clip,), form)


def both(theirs: str, open_clip: str, form: Form = SAME) -> tuple[Rule, Rule]:
    """A weight, in a form, and its bias, unchanged."""
    return same(f"{theirs}.weight", f"{open_clip}.weight", form), same(f"{theirs}.bias", f"{open_clip}.bias")


def below(theirs: str, open_clip: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules with a prefix on each side."""
    return [
        rule._replace(
            theirs=tuple(theirs + name for name in rule.theirs),
            open_clip=tuple(open_clip + name for name in rule.open_clip),
        )
        for rule in rules
    ]


def layers(count: int, theirs: str, open_clip: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rules for each of ``count`` blocks; ``{}`` in a prefix is the index of the block."""
    return [rule for i in range(count) for rule in below(theirs.format(i), open_clip.format(i), rules)]


def to_open_clip(
    tensors: Tensors, rules: Sequence[Rule], ignored: Callable[[str], bool] = lambda name: False
) -> Tensors:
    """Foreign tensors under OpenCLIP's names. Raises UserError for a missing or an unknown tensor."""
    check_names((name for name in tensors if not ignored(name)), {name for rule in rules for name in rule.theirs})
    entries = {}
    for rule in rules:
        sources = [_changed(tensors.entries[name], rule.form.to_open_clip) for name in rule.theirs]
        entries |= zip(rule.open_clip, _split(_concatenated(sources), rule.parts), strict=True)
    return Tensors(tensors.source, entries)


def from_open_clip(tensors: Tensors, rules: Sequence[Rule]) -> Tensors:
    """OpenCLIP's tensors under foreign names, the inverse of ``to_open_clip``."""
    check_names(tensors, {name for rule in rules for name in rule.open_clip})
    entries = {}
    for rule in rules:
        fused = _concatenated([tensors.entries[name] for name in rule.open_clip])
        pieces = _split(fused, (1,) * len(rule.theirs))
        entries |= {name: _changed(piece, rule.form.back) for name, piece in zip(rule.theirs, pieces, strict=True)}
    return Tensors(tensors.source, entries)


def _changed(entry: Entry, change: Callable[[np.ndarray], np.ndarray]) -> Entry:
    # The shape of the result, from an array of that shape that takes no memory.
    shape = change(np.broadcast_to(np.float32(0), entry.shape)).shape
    return Entry(shape, entry.dtype, lambda: change(entry.read()))


def _concatenated(entries: list[Entry]) -> Entry:
    if len(entries) == 1:
        return entries[0]
    shape = (sum(entry.shape[0] for entry in entries), *entries[0].shape[1:])
    return Entry(shape, entries[0].dtype, lambda: np.concatenate([entry.read() for entry in entries]))


def _split(entry: Entry, parts: tuple[int, ...]) -> list[Entry]:
    if len(parts) == 1:
        return [entry]
    unit = entry.shape[0] // sum(parts)
    stops = np.cumsum(parts) * unit
    return [
        Entry((stop - start, *entry.shape[1:]), entry.dtype, lambda start=start, stop=stop: entry.read()[start:stop])
        for start, stop in zip(stops - np.array(parts) * unit, stops, strict=True)
    ]
