"""The gradient of a batch: of all of it at once, or micro-batch by micro-batch with exactly the same result.

The contrastive loss needs the embeddings of the whole batch, but the towers' activations are only needed to go from
embeddings to parameters, and that can be done piece by piece (gradient caching: Gao et al. 2021, section 3.2):

1. encode all micro-batches and keep their embeddings alone;
2. the loss over the whole batch, and its gradient by every embedding, by the scale and the bias;
3. encode each micro-batch again, and pull its embeddings' gradients back to the parameters.

Activations of one micro-batch exist at a time; the price is one more forward pass, a third of the step's FLOPs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from clip_jax.sharding import join_batch, split_batch

Metrics = dict[str, Float[Array, ""]]
Encode = Callable[[Any, Any, Any], tuple[Array, Array, Any]]
"""(params, batch_stats, batch) -> (image embeddings, text embeddings, new batch_stats)"""
Loss = Callable[[Any, Array, Array], tuple[Float[Array, ""], Metrics]]
"""(params, image embeddings, text embeddings) -> (loss, metrics); of the params it uses scale and bias alone"""


def whole(encode: Encode, loss: Loss, params: Any, batch_stats: Any, batch: Any) -> tuple[Array, Metrics, Any, Any]:
    """(loss, metrics, new batch_stats, gradient by the parameters) of a batch, all activations held at one time."""

    def encoded_loss(params):
        image, text, new_stats = encode(params, batch_stats, batch)
        value, metrics = loss(params, image, text)
        return value, (metrics, new_stats)

    (value, (metrics, batch_stats)), gradient = jax.value_and_grad(encoded_loss, has_aux=True)(params)
    return value, metrics, batch_stats, gradient


def accumulated(
    encode: Encode,
    loss: Loss,
    params: Any,
    batch_stats: Any,
    batch: Any,
    *,
    parts: int,
    mesh: Mesh,
    pin: Callable[[Any], Any],
) -> tuple[Array, Metrics, Any, Any]:
    """As ``whole``, with the activations of one of ``parts`` micro-batches at a time.

    ``encode`` must give a pair the same embeddings in both passes, so what is random in it hangs on the pair. Batch
    norm sees one micro-batch at a time, and its running statistics move once for each. ``pin`` keeps the sum of
    gradients sharded as the parameters are.
    """
    micro = jax.tree.map(lambda x: split_batch(x, parts, mesh), batch)

    def embed(_, part):
        image, text, _ = encode(params, batch_stats, part)
        return None, (image, text)

    _, embeddings = jax.lax.scan(embed, None, micro)
    image, text = (join_batch(x, mesh) for x in embeddings)
    (value, metrics), (gradient, *by_embedding) = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        params, image, text
    )

    def replay(carry, part):
        gradient, batch_stats = carry
        part, cotangents = part

        def embed(params):
            image, text, new_stats = encode(params, batch_stats, part)
            return (image, text), new_stats

        _, pull, batch_stats = jax.vjp(embed, params, has_aux=True)
        gradient = pin(jax.tree.map(jnp.add, gradient, *pull(cotangents)))
        return (gradient, batch_stats), None

    cotangents = tuple(split_batch(x, parts, mesh) for x in by_embedding)
    # The loss's own gradient is where the sum starts: by scale and bias it is whole, and counted once.
    (gradient, batch_stats), _ = jax.lax.scan(replay, (pin(gradient), batch_stats), (micro, cotangents))
    return value, metrics, batch_stats, gradient
