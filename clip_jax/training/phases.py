"""Converts the state from one phase of a run to the next, which may have other sizes and objectives."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, keystr, tree_flatten_with_path, tree_unflatten
from jaxtyping import Array

from clip_jax.data.order import fold
from clip_jax.errors import UserError
from clip_jax.models.resize import linear, resize_grid
from clip_jax.training.learner import Learner
from clip_jax.training.state import TrainState, matching


def convert(state: TrainState, old: Learner, new: Learner, step: int) -> TrainState:
    """The state of ``old`` as ``new`` continues it.

    Parameters, moments and EMAs are taken over by their path in the tree. Position embeddings of another length are
    resized; what ``old`` has not is created from the seed and the step, so that a resumed run creates the same. A new
    EMA starts from the parameters as they are.
    """
    target, before = new.abstract_state(), state.ema.keys()
    found = {keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}
    wanted, tree = tree_flatten_with_path(target)
    missing = [path for path, leaf in wanted if not _fits(path, found.get(keystr(path)), leaf)]
    created: Mapping[str, Array] = {}
    if missing:
        fresh = new.create_state(fold(new.seed, step) % 2**31)
        created = {keystr(path): leaf for path, leaf in tree_flatten_with_path(fresh)[0]}

    def build(found: Mapping[str, Array], created: Mapping[str, Array]) -> TrainState:
        leaves = []
        for path, leaf in wanted:
            name = keystr(path)
            if not _fits(path, found.get(name), leaf):
                leaves.append(created[name])
            elif found[name].shape == leaf.shape:
                leaves.append(found[name])
            else:
                leaves.append(resize_positions(found[name], len(leaf), image="image" in _names(path)))
        state = tree_unflatten(tree, leaves)
        emas = {
            # Copies: the step donates the state, and a donated buffer has one owner.
            name: state.ema[name] if name in before else jax.tree.map(jnp.copy, matching(state.params, ema.of))
            for name, ema in new.emas.items()
        }
        return state._replace(ema=emas)

    for path in missing:
        if keystr(path) in found and not keystr(path).startswith((".opt_state", ".aux")):
            raise UserError(f"config.phases: {keystr(path)} changes its shape at step {step} and cannot be resized")
    return jax.jit(build, out_shardings=new.shardings())(found, {keystr(p): created[keystr(p)] for p in missing})


def resize_positions(positions: Array, length: int, *, image: bool) -> Array:
    """Position embeddings, or their moments, for ``length`` tokens, as ``models.resize`` resizes those of files.

    Where nothing was negative, as in second moments, nothing is.
    """
    old, rows = len(positions), positions.reshape(len(positions), -1)
    resized = resize_grid(rows, length) if image else jnp.asarray(linear(old, length)) @ rows
    resized = jnp.where(jnp.min(positions) >= 0, jnp.maximum(resized, 0), resized)
    return resized.reshape(length, *positions.shape[1:]).astype(positions.dtype)


def _fits(path: tuple[Any, ...], found: Array | None, wanted: jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf can be taken over, as it is or resized."""
    if found is None:
        return False
    if found.shape == wanted.shape:
        return True
    names = _names(path)
    return (
        bool(names)
        and names[-1] in ("position_embedding", "spatial_embedding")
        and (found.ndim == len(wanted.shape) > 0 and found.shape[1:] == wanted.shape[1:])
    )


def _names(path: tuple[Any, ...]) -> list[str]:
    return [key.key for key in path if isinstance(key, DictKey)]
