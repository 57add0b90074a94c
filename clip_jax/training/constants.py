"""What objectives read and never train: a teacher's weights or stored embeddings, and how a run identifies them.

A run resumes with the constants it began with: ``run.json`` has a fingerprint of stored embeddings, made from their
manifest, and a checksum of the weights of each teacher.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from clip_jax.errors import UserError
from clip_jax.models.clip import Params
from clip_jax.storage import run_folder
from clip_jax.training.run import Phase, Run, description

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def check_stored(run: Run, previous: Mapping[str, Any]) -> None:
    """Raises UserError if a run's stored constants are not those of the earlier ``run.json``."""
    now = run.stored_constants
    if {name: previous.get("constants", {}).get(name) for name in now} != now:
        raise _changed(run)


def load(run: Run, phase: Phase) -> dict[str, Params]:
    """The constants of a phase, on the devices. Their checksums are recorded; UserError if they differ from earlier."""
    constants = phase.learner.load_constants()
    for objective, tree in constants.items():
        name = f"{objective}@{phase.start}" if phase.start else objective
        if run.constants.setdefault(name, found := checksum(tree)) != found:
            raise _changed(run)
    if constants and jax.process_index() == 0:
        run_folder.write(run.workdir, description(run))
    return constants


def checksum(tree: Params) -> str:
    """16 hexadecimal digits of the names and values of arrays, the same for every sharding."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get([_checksum(leaf) for _, leaf in leaves])
    found = [
        (jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), int(value))
        for (path, leaf), value in zip(leaves, sums, strict=True)
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    """The sum, modulo 2^32, of mixed values and positions: integers, so that no order of additions changes it."""
    mixed = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    for axis in range(x.ndim):
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (mixed ^ (position + 1) * jnp.uint32(0x9E3779B1)) * jnp.uint32(0x85EBCA6B)
        mixed ^= mixed >> 15
    return jnp.sum(mixed, dtype=jnp.uint32)


def _changed(run: Run) -> UserError:
    return UserError(f"{run.folder}: the weights of a teacher are not those this run began with; restore them")
