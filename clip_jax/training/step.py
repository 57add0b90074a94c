"""State and the training step: one jitted function from (state, batch) to (state, metrics), sharded over a mesh."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from clip_jax.losses import grid
from clip_jax.models.clip import CLIP
from clip_jax.presets import Preprocess
from clip_jax.sharding import batch_sharding, parameter_shardings, replicated

Batch = dict[str, jax.Array]
Metrics = dict[str, Float[Array, ""]]


class State(NamedTuple):
    """Everything a run needs to go on; nothing about hosts or devices is in it."""

    step: Int[Array, ""]
    data_step: Int[Array, ""]
    """The position in the data: the next batch. Equals ``step`` until a rollback skips a window."""
    params: Any
    batch_stats: Any
    opt_state: Any


def boxed_state(model: CLIP, optimizer: optax.GradientTransformation, rng: Key[Array, ""]) -> State:
    """A fresh state whose parameters and moments are boxed with their logical axes."""
    params = model.init(rng)
    zero = jnp.zeros((), jnp.int32)
    # The optimizer sees boxed parameters, so that its moments are boxed, and thus sharded, in the same way.
    return State(zero, zero, params, model.init_batch_stats(), optimizer.init(params))


def abstract_state(model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state's shapes with the sharding of every leaf: nothing is computed."""
    boxed = jax.eval_shape(lambda rng: boxed_state(model, optimizer, rng), jax.random.key(0))
    shardings = parameter_shardings(boxed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )


def create_state(model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> State:
    """A fresh state, created where it belongs: no device ever holds more than its part."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh))
    create = jax.jit(lambda rng: nn.meta.unbox(boxed_state(model, optimizer, rng)), out_shardings=shardings)
    return create(jax.random.key(seed))


def make_train_step(
    model: CLIP,
    preprocess: Preprocess,
    optimizer: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    mesh: Mesh,
    *,
    max_logit_scale: float,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """``(state, {"image": uint8[B, H, W, 3], "text": int32[B, L]}) -> (state, metrics)``; the state is donated."""
    abstract = abstract_state(model, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def loss(params, batch_stats, batch):
        pixels = preprocess.normalize(batch["image"])
        image, text, batch_stats = model.forward(params, batch_stats, pixels, batch["text"], train=True)
        value, metrics = grid.softmax(image, text, jnp.exp(params["logit_scale"]), mesh=mesh)
        return value, (metrics, batch_stats)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (metrics, batch_stats)), gradients = gradient(state.params, state.batch_stats, batch)
        # Pinned: without it the partitioner may replicate the gradients of sharded parameters.
        gradients = jax.lax.with_sharding_constraint(gradients, shardings.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params["logit_scale"] = jnp.clip(params["logit_scale"], 0.0, math.log(max_logit_scale))
        metrics |= {
            "loss": value,
            "grad_norm": optax.global_norm(gradients),
            "param_norm": optax.global_norm(state.params),
            "update_norm": optax.global_norm(updates),
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "learning_rate": rate(state.step),
        }
        return State(state.step + 1, state.data_step + 1, params, batch_stats, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
