"""The gradient of a batch, computed at once or one micro-batch at a time, with the same result up to rounding.

The loss needs the embeddings of the full batch, but the activations of the towers are needed only to propagate
gradients from the embeddings to the parameters. That can be done one micro-batch at a time (gradient caching, Gao et
al. 2021, section 3.2):

1. encode all micro-batches and cache only their embeddings;
2. compute the loss over the batch and its gradient with respect to every cached row, the scale and the bias;
3. encode each micro-batch again, and pull the gradients of its rows back to the parameters; local terms, which are sums
   over rows, are differentiated in the same pass.

Only one micro-batch's activations are allocated at a time, at the cost of another forward pass (a third more FLOPs).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from clip_jax.devices.sharding import join_batch, split_batch
from clip_jax.models.clip import Batch, Params
from clip_jax.objectives.objective import Metrics

Cached = dict[str, dict[str, Float[Array, "batch ..."]]]
"""Objective -> the rows that it caches."""


class Encoded(NamedTuple):
    """The outputs of both towers and the objectives for a batch or a micro-batch."""

    cached: Cached
    local: Float[Array, ""] | None
    """The weighted sum of the local terms; None if no objective has one."""
    sums: dict[str, Any]
    """Objective -> its sums over rows."""
    batch_stats: Params


class Gradient(NamedTuple):
    """The loss of a batch with its gradient."""

    loss: Float[Array, ""]
    metrics: Metrics
    encoded: Encoded
    gradient: Params
    """The gradient with respect to the trainable parameters."""


Forward = Callable[[Params, Params, Batch], Encoded]
"""(trainable parameters, batch_stats, batch) -> Encoded"""
Across = Callable[[Params, Cached], tuple[Float[Array, ""], Metrics]]
"""(trainable parameters, cached rows of the full batch) -> (loss, metrics); reads no parameters of the towers."""


def full_batch(forward: Forward, across: Across, params: Params, batch_stats: Params, batch: Batch) -> Gradient:
    """Computes the loss and its gradient in one pass, with the activations of the full batch in memory."""

    def loss(params: Params) -> tuple[Array, tuple[Metrics, Encoded]]:
        encoded = forward(params, batch_stats, batch)
        value, metrics = across(params, encoded.cached)
        if encoded.local is not None:
            value = value + encoded.local
        return value, (metrics, encoded)

    (value, (metrics, encoded)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return Gradient(value, metrics, encoded, gradient)


def micro_batches(
    forward: Forward,
    across: Across,
    params: Params,
    batch_stats: Params,
    batch: Batch,
    *,
    parts: int,
    mesh: Mesh,
    constrain: Callable[[Params], Params],
) -> Gradient:
    """Like ``full_batch``, with the activations of only one of ``parts`` micro-batches in memory.

    ``forward`` must return the same result for a row in both passes, so its randomness must depend on the row alone.
    Batch norm normalizes each micro-batch separately and updates its running statistics once per micro-batch.
    ``constrain`` keeps the accumulated gradient sharded like the parameters.
    """
    micro = jax.tree.map(lambda x: split_batch(x, parts, mesh), batch)

    def embed(_: None, part: Batch) -> tuple[None, Cached]:
        return None, forward(params, batch_stats, part).cached

    _, cached = jax.lax.scan(embed, None, micro)
    cached = jax.tree.map(lambda x: join_batch(x, mesh), cached)
    grad = jax.value_and_grad(across, argnums=(0, 1), has_aux=True)
    (value, metrics), (gradient, cached_gradient) = grad(params, cached)

    def pull_back(carry: tuple[Params, Params], part: tuple[Batch, Cached]) -> tuple[tuple[Params, Params], Any]:
        gradient, batch_stats = carry
        part, cotangents = part

        def encode(params: Params) -> tuple[tuple[Cached, Array | None], tuple[dict[str, Any], Params]]:
            encoded = forward(params, batch_stats, part)
            return (encoded.cached, encoded.local), (encoded.sums, encoded.batch_stats)

        (_, local), vjp_fn, (sums, batch_stats) = jax.vjp(encode, params, has_aux=True)
        one = None if local is None else jnp.ones_like(local)
        gradient = constrain(jax.tree.map(jnp.add, gradient, *vjp_fn((cotangents, one))))
        return (gradient, batch_stats), (local, sums)

    cotangents = jax.tree.map(lambda x: split_batch(x, parts, mesh), cached_gradient)
    # Start from the gradient of the batch loss, which contains the gradients of the scale and the bias.
    (gradient, batch_stats), (local, sums) = jax.lax.scan(
        pull_back, (constrain(gradient), batch_stats), (micro, cotangents)
    )
    local, sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), (local, sums))
    if local is not None:
        value = value + local
    return Gradient(value, metrics, Encoded(cached, local, sums, batch_stats), gradient)
