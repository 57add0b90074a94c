"""The losses by definition: about ten lines each, with the whole logit matrix at once. Tests compare with them."""

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int32

Metrics = dict[str, Float[Array, ""]]


def softmax(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    *,
    valid: Bool[Array, "batch"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3).

    Pairs sit on the diagonal of ``scale * image @ text.T``; rows classify texts, columns classify images. Pairs that
    are not ``valid`` are padding: they count neither as rows nor as columns.
    """
    valid = jnp.ones(len(image), bool) if valid is None else valid
    logits = scale * jnp.dot(image, text.T, preferred_element_type=jnp.float32)
    # The diagonal, without the matrix; multiplied in float32, for bfloat16 products would not match the logits.
    positives = scale * jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), axis=-1)
    rows, columns = logsumexp(logits, axis=1, where=valid[None, :]), logsumexp(logits, axis=0, where=valid[:, None])
    loss = jnp.mean((rows + columns) / 2 - positives, where=valid)
    return loss, {"accuracy": accuracy(logits, valid)}


def sigmoid(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    valid: Bool[Array, "batch"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The pairwise sigmoid loss (Zhai et al. 2023, equation 1): every logit is a binary classification, pair or not.

    Summed over columns and averaged over rows, as the original does; padding as in ``softmax``.
    """
    valid = jnp.ones(len(image), bool) if valid is None else valid
    logits = scale * jnp.dot(image, text.T, preferred_element_type=jnp.float32) + bias
    signs = 2 * jnp.eye(len(logits)) - 1
    rows = -jnp.sum(jax.nn.log_sigmoid(signs * logits), axis=1, where=valid[None, :])
    return jnp.mean(rows, where=valid), {"accuracy": accuracy(logits, valid)}


def softmax_targets(
    image: Float[Array, "batch dim"],
    text: Float[Array, "texts dim"],
    scale: Float[Array, ""],
    *,
    image_groups: Int32[Array, "batch"],
    text_groups: Int32[Array, "texts"],
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """The softmax loss with targets (UniCL, Yang et al. 2022): T_ij = 1 where groups are equal, in rows of sum 1.

    The first ``batch`` texts are those of the images; the others are columns for the rows alone (NegCLIP). Label
    smoothing as Szegedy et al. 2016 define it.
    """
    logits = scale * jnp.dot(image, text.T, precision="highest")
    same = (image_groups[:, None] == text_groups[None, :]).astype(jnp.float32)

    def cross_entropy(logits, same):
        targets = (1 - smoothing) * same / same.sum(1, keepdims=True) + smoothing / same.shape[1]
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1))

    pairs = len(image)
    return (cross_entropy(logits, same) + cross_entropy(logits[:, :pairs].T, same[:, :pairs].T)) / 2


def sigmoid_targets(
    image: Float[Array, "batch dim"],
    text: Float[Array, "texts dim"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    image_groups: Int32[Array, "batch"],
    text_groups: Int32[Array, "texts"],
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """The sigmoid loss with targets: binary cross-entropy with T_ij of ``softmax_targets``, smoothed towards 1/2."""
    logits = scale * jnp.dot(image, text.T, precision="highest") + bias
    targets = (1 - smoothing) * (image_groups[:, None] == text_groups[None, :]) + smoothing / 2
    losses = -targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
    return jnp.mean(jnp.sum(losses, axis=1))


def accuracy(logits: Float[Array, "batch batch"], valid: Bool[Array, "batch"]) -> Float[Array, ""]:
    """The share of images and of texts, half and half, whose own pair has the largest logit in the batch."""
    logits, pairs = jnp.where(valid[:, None] & valid[None, :], logits, -jnp.inf), jnp.arange(len(logits))
    return jnp.mean(jnp.stack([jnp.argmax(logits, axis=axis) == pairs for axis in (0, 1)]), where=valid)
