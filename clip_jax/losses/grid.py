"""The softmax loss on a mesh: exact over the global batch, without a logit matrix of the global batch.

Every device keeps its own b of the B pairs and gathers the embeddings (not the logits) of all others under
``jax.shard_map``: its b rows classify all B texts and its b columns all B images. The gather's transpose is a
reduce-scatter, so gradients are exact and arrive where they belong.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from clip_jax.losses.reference import Metrics
from clip_jax.sharding import BATCH_AXES, batch_shards


def softmax(
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    scale: Float[Array, ""],
    *,
    mesh: Mesh,
) -> tuple[Float[Array, ""], Metrics]:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, fig. 3); equals ``reference.softmax``.

    Raises ValueError when the batch does not divide over the mesh.
    """
    batch = image.shape[0]
    if batch % batch_shards(mesh):
        raise ValueError(f"a batch of {batch} pairs does not divide over {batch_shards(mesh)} devices")

    def device(image, text, scale):
        first = jax.lax.axis_index(BATCH_AXES) * image.shape[0]
        positives = jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), axis=-1)
        image_to_text, correct = _cross_entropy(image, text, positives, scale, first)
        text_to_image, _ = _cross_entropy(text, image, positives, scale, first)
        loss = jax.lax.psum(jnp.sum(image_to_text + text_to_image), BATCH_AXES) / (2 * batch)
        return loss, {"accuracy": jax.lax.psum(jnp.sum(correct), BATCH_AXES) / batch}

    rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    return jax.shard_map(device, mesh=mesh, in_specs=(rows, rows, whole), out_specs=(whole, whole))(image, text, scale)


def _cross_entropy(queries, keys, positives, scale, first):
    """float32[b], bool[b]: the loss of each local query against all keys, and whether its own key comes first."""
    logits = scale * jnp.dot(
        queries, jax.lax.all_gather(keys, BATCH_AXES, tiled=True).T, preferred_element_type=jnp.float32
    )
    correct = jnp.argmax(logits, axis=1) == first + jnp.arange(len(logits))
    return jax.nn.logsumexp(logits, axis=1) - scale * positives, correct
