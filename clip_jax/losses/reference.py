"""The definitions: ten lines each, the whole logit matrix at once. Tests trust them; training uses ``grid``."""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Float

Metrics = dict[str, Float[Array, ""]]


def softmax(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3).

    Pairs sit on the diagonal of ``scale * image @ text.T``; rows classify texts, columns classify images.
    """
    logits = scale * jnp.dot(image, text.T, preferred_element_type=jnp.float32)
    # The diagonal, without the matrix; multiplied in float32, for bfloat16 products would not match the logits.
    positives = scale * jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), axis=-1)
    loss = jnp.mean((logsumexp(logits, axis=1) + logsumexp(logits, axis=0)) / 2 - positives)
    return loss, {"accuracy": accuracy(logits)}


def sigmoid(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """The pairwise sigmoid loss (Zhai et al. 2023, equation 1): every logit alone says pair or no pair.

    Summed over columns and averaged over rows, as the original does.
    """
    logits = scale * jnp.dot(image, text.T, preferred_element_type=jnp.float32) + bias
    signs = 2 * jnp.eye(len(logits)) - 1
    loss = -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=1))
    return loss, {"accuracy": accuracy(logits)}


def accuracy(logits: Float[Array, "batch batch"]) -> Float[Array, ""]:
    """The share of images and of texts, half and half, whose own pair has the largest logit in the batch."""
    pairs = jnp.arange(len(logits))
    return jnp.mean(jnp.stack([jnp.argmax(logits, axis=axis) == pairs for axis in (0, 1)]))
