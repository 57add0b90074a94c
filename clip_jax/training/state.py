"""The state of a run: one pytree, created where it belongs and described without computing anything."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Int

from clip_jax.errors import UserError
from clip_jax.models.clip import Params

EMA = "average"
"""The name in a state of the EMA that ``config.ema_decay`` asks for: the one that is evaluated and loaded."""


class TrainState(NamedTuple):
    """Everything a run needs to resume; nothing about hosts or devices is in it."""

    step: Int[Array, ""]
    data_step: Int[Array, ""]
    """The position in the data: the next batch. Equals ``step`` until a rollback skips a window."""
    params: Params
    batch_stats: Params
    opt_state: Any
    ema: dict[str, Params]
    """Exponential moving averages of ``params``, or of some of them, by name."""
    aux: dict[str, Any]
    """The auxiliary state of objectives that have any, by name."""

    @property
    def evaluation_params(self) -> Params:
        """The parameters that a user gets: the EMA where the run has one."""
        return self.ema.get(EMA, self.params)


def select(tree: Params, frozen: Sequence[str], *, trainable: bool, path: str = "") -> Params:
    """The part of a tree of nested dictionaries that is trainable, or the part that is frozen.

    ``frozen`` are patterns of paths: ``image/*``.
    """
    selected = {}
    for name, value in tree.items():
        inside = f"{path}{name}"
        if isinstance(value, Mapping):
            value = select(value, frozen, trainable=trainable, path=f"{inside}/")
            if value:
                selected[name] = value
        elif trainable != any(fnmatch.fnmatchcase(inside, pattern) for pattern in frozen):
            selected[name] = value
    return selected


def matching(tree: Params, patterns: Sequence[str]) -> Params:
    """The part of a tree of nested dictionaries whose paths match one of the patterns."""
    return select(tree, patterns, trainable=False)


def join(one: Params, other: Params) -> Params:
    """The tree of which ``select`` made two parts."""
    joined = dict(one)
    for name, value in other.items():
        joined[name] = join(one[name], value) if name in one else value
    return joined


def check_frozen(params: Params, frozen: Sequence[str]) -> None:
    """Raises UserError for a pattern without effect, and where nothing is left to train."""
    for pattern in frozen:
        if not select(params, (pattern,), trainable=False):
            known = ", ".join(f"{name}/*" for name, value in params.items() if isinstance(value, Mapping))
            raise UserError(f"config.model.frozen: {pattern!r} matches no parameter; for example {known}")
    if not select(params, frozen, trainable=True):
        raise UserError(f"config.model.frozen={tuple(frozen)}: nothing is left to train")
