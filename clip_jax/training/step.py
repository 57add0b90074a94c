"""The training step: one jitted function from (state, batch) to (state, metrics), sharded over a mesh."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from clip_jax.losses import grid
from clip_jax.models.clip import CLIP
from clip_jax.presets import Preprocess
from clip_jax.sharding import activations_on, batch_sharding, replicated
from clip_jax.training import gradients
from clip_jax.training.gradients import Metrics
from clip_jax.training.state import State, abstract_state

Batch = dict[str, jax.Array]
TrainStep = Callable[[State, Batch], tuple[State, Metrics]]


def make_train_step(
    model: CLIP,
    preprocess: Preprocess,
    optimizer: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    mesh: Mesh,
    *,
    max_logit_scale: float,
    seed: int = 0,
    loss_name: Literal["softmax", "sigmoid"] = "softmax",
    micro_batches: int = 1,
    average_decay: float = 0.0,
) -> TrainStep:
    """``(state, {"image": uint8[B, H, W, 3], "text": int32[B, L]}) -> (state, metrics)``; the state is donated.

    ``max_logit_scale`` clamps exp(logit_scale) after each update; 0: not at all. With ``micro_batches`` the activations
    of one of so many parts of the batch exist at a time. ``average_decay`` is that of the parameters' moving average;
    0: the state has none.
    """
    abstract = abstract_state(model, optimizer, mesh, average=average_decay > 0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def pin(gradient):
        # Without it the partitioner may replicate the gradients of sharded parameters.
        return jax.lax.with_sharding_constraint(gradient, shardings.params)

    def loss(params, image, text):
        # Embeddings travel in the type of the towers' products; logits and sums are float32 in any case.
        image, text = image.astype(model.dtype), text.astype(model.dtype)
        scale = jnp.exp(params["logit_scale"])
        if loss_name == "sigmoid":
            return grid.sigmoid(image, text, scale, params["logit_bias"], mesh=mesh)
        return grid.softmax(image, text, scale, mesh=mesh)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)  # of the step alone: a resumed run draws the same

        def encode(params, batch_stats, batch):
            keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["row"])
            pixels = preprocess.normalize(batch["image"])
            with activations_on(mesh):
                return model.forward(params, batch_stats, pixels, batch["text"], train=True, keys=keys)

        batch = batch | {"row": jnp.arange(batch["text"].shape[0])}
        if micro_batches == 1:
            results = gradients.whole(encode, loss, state.params, state.batch_stats, batch)
        else:
            results = gradients.accumulated(
                encode, loss, state.params, state.batch_stats, batch, parts=micro_batches, mesh=mesh, pin=pin
            )
        value, metrics, batch_stats, gradient = results
        gradient = pin(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if max_logit_scale > 0:
            params["logit_scale"] = jnp.clip(params["logit_scale"], 0.0, math.log(max_logit_scale))
        metrics |= {
            "loss": value,
            "grad_norm": optax.global_norm(gradient),
            "param_norm": optax.global_norm(state.params),
            "update_norm": optax.global_norm(updates),
            "logit_scale": jnp.exp(state.params["logit_scale"]),
            "learning_rate": rate(state.step),
        }
        if "logit_bias" in state.params:
            metrics["logit_bias"] = state.params["logit_bias"]
        average = state.average
        if average_decay > 0:
            average = moving_average(average, params, average_decay, state.step)
        return State(state.step + 1, state.data_step + 1, params, batch_stats, opt_state, average), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def moving_average(average, params, decay: float, step: Array):
    """``decay * average + (1 - decay) * params``; early steps, of which there is little to average, decay faster.

    The decay is min(decay, (1 + step) / (10 + step)), as tf.train.ExponentialMovingAverage has it.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
