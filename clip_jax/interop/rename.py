"""One layout's tensors under another's names, by a table of rules that is read in both directions.

OpenCLIP's names are the middle: every other layout has rules between its names and OpenCLIP's, and ``open_clip.py``
alone knows our tree. Tensors stay in their file until they are asked for.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.errors import UserError, nearest
from clip_jax.interop.state import Entry, State


class Form(NamedTuple):
    """How the axes of one tensor change on the way to OpenCLIP, and on the way back."""

    to_open_clip: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


SAME = Form(lambda x: x, lambda x: x)
TRANSPOSED = Form(lambda x: x.T, lambda x: x.T)
LEADING_ONE = Form(lambda x: x[None], lambda x: x[0])
NO_LEADING_ONE = Form(lambda x: x[0], lambda x: x[None])
SCALAR = Form(lambda x: x.reshape(()), lambda x: x.reshape(1))


class Rule(NamedTuple):
    """``theirs``, each in its form and joined along the first axis, are ``open_clip``, joined likewise.

    Where ``open_clip`` names several tensors, ``parts`` are their shares of the first axis.
    """

    theirs: tuple[str, ...]
    open_clip: tuple[str, ...]
    form: Form = SAME
    parts: tuple[int, ...] = (1,)


def same(theirs: str, open_clip: str, form: Form = SAME) -> Rule:
    """One tensor for one."""
    return Rule((theirs,), (open_clip,), form)


def both(theirs: str, open_clip: str, form: Form = SAME) -> tuple[Rule, Rule]:
    """The weight, in a form, and the bias, as it is."""
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
    """The rules for each of ``count`` blocks, whose prefixes have ``{}`` for the number."""
    return [rule for i in range(count) for rule in below(theirs.format(i), open_clip.format(i), rules)]


def to_open_clip(state: State, rules: Sequence[Rule], ignored: Callable[[str], bool] = lambda name: False) -> State:
    """A foreign state under OpenCLIP's names. UserError for a tensor that is missing or not known."""
    _check_names(state, {name for rule in rules for name in rule.theirs}, ignored)
    entries = {}
    for rule in rules:
        sources = [_changed(state.entries[name], rule.form.to_open_clip) for name in rule.theirs]
        entries |= zip(rule.open_clip, _split(_joined(sources), rule.parts), strict=True)
    return State(state.source, entries)


def from_open_clip(state: State, rules: Sequence[Rule]) -> State:
    """An OpenCLIP state under foreign names, the inverse of ``to_open_clip``."""
    _check_names(state, {name for rule in rules for name in rule.open_clip}, lambda name: False)
    entries = {}
    for rule in rules:
        whole = _joined([state.entries[name] for name in rule.open_clip])
        pieces = _split(whole, (1,) * len(rule.theirs))
        entries |= {name: _changed(piece, rule.form.back) for name, piece in zip(rule.theirs, pieces, strict=True)}
    return State(state.source, entries)


def _check_names(state: State, expected: set[str], ignored: Callable[[str], bool]) -> None:
    missing = sorted(expected - set(state))
    extra = sorted(name for name in set(state) - expected if not ignored(name))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{state.source}: {missing[0]}{more}: missing{nearest(missing[0], extra)}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{state.source}: {extra[0]}{more}: there, but not a tensor of the model that its config says")


def _changed(entry: Entry, change: Callable[[np.ndarray], np.ndarray]) -> Entry:
    # The shape of the result, from an array of that shape that takes no memory.
    shape = change(np.broadcast_to(np.float32(0), entry.shape)).shape
    return Entry(shape, entry.dtype, lambda: change(entry.read()))


def _joined(entries: list[Entry]) -> Entry:
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
