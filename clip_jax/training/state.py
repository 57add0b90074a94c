"""The state of a run: one pytree, created where it belongs and described without computing anything."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from clip_jax.models.clip import CLIP
from clip_jax.sharding import parameter_shardings


class State(NamedTuple):
    """Everything a run needs to go on; nothing about hosts or devices is in it."""

    step: Int[Array, ""]
    data_step: Int[Array, ""]
    """The position in the data: the next batch. Equals ``step`` until a rollback skips a window."""
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = None
    """The exponential moving average of ``params``, where the run keeps one."""

    @property
    def evaluated(self) -> Any:
        """The parameters that a user gets: the average, where there is one."""
        return self.params if self.average is None else self.average


def boxed_state(
    model: CLIP, optimizer: optax.GradientTransformation, rng: Key[Array, ""], *, average: bool = False
) -> State:
    """A fresh state whose parameters and moments are boxed with their logical axes."""
    params = model.init(rng)
    zero = jnp.zeros((), jnp.int32)
    # The optimizer sees boxed parameters, so that its moments are boxed, and thus sharded, in the same way.
    return State(
        zero, zero, params, model.init_batch_stats(), optimizer.init(params), average=params if average else None
    )


def abstract_state(model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh, *, average: bool = False) -> State:
    """The state's shapes with the sharding of every leaf: nothing is computed."""
    boxed = jax.eval_shape(lambda rng: boxed_state(model, optimizer, rng, average=average), jax.random.key(0))
    shardings = parameter_shardings(boxed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )


def create_state(
    model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int, *, average: bool = False
) -> State:
    """A fresh state, created where it belongs: no device ever holds more than its part."""
    abstract = abstract_state(model, optimizer, mesh, average=average)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    create = jax.jit(
        lambda rng: nn.meta.unbox(boxed_state(model, optimizer, rng, average=average)), out_shardings=shardings
    )
    return create(jax.random.key(seed))
