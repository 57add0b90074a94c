"""Cross-entropy over a vocabulary, a chunk of tokens at a time.

The logits of a batch of captions would be [batch, length, vocabulary]: 200 GB for 32,768 captions of 32 tokens in a
vocabulary of 50,000. Here a device holds those of one chunk, in both passes: the backward pass computes them again.
Tokens without weight, which are padding, are sorted to the end, and chunks with only such tokens are skipped.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from clip_jax.devices.sharding import batch_shards, copy_for_each_part, split_rows

CHUNK_LOGITS = 2**24
"""Logits that a device holds at one time: 64 MiB of float32."""


def chunk_size(tokens: int, vocabulary: int) -> int:
    """The tokens of a chunk, of ``tokens`` on a device."""
    return min(tokens, max(8, CHUNK_LOGITS // vocabulary))


def cross_entropy(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "width vocabulary"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    mesh: Mesh | AbstractMesh | None,
    bias: Float[Array, "vocabulary"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums of ``-weight * log softmax(hidden @ head + bias)[target]``, and of weights of tokens predicted right."""
    shards = 1 if mesh is None else batch_shards(mesh)
    tokens = targets.size // shards
    size = chunk_size(tokens, head.shape[1])
    padding = -tokens % size

    def by_device(x: Array) -> Array:
        return split_rows(x.reshape(shards, tokens, *x.shape[2:]), mesh)

    is_padding = by_device(weights) == 0
    order = jnp.argsort(is_padding, axis=1, stable=True)
    needed = jnp.max(jnp.sum(~is_padding, axis=1))
    # Each device sums the gradients of all its chunks before they are added up: the bias is one more row of the head.
    heads = copy_for_each_part(head if bias is None else jnp.concatenate([head, bias[None]]), mesh)

    def chunks(x: Array) -> Array:
        """[batch, length, ...] -> [chunks, devices, tokens, ...], each device's tokens with weight first."""
        x = jax.vmap(lambda rows, order: rows[order])(by_device(x), order)
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(shards, -1, size, *x.shape[2:]).swapaxes(0, 1)

    def one_chunk(heads: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        kernel = heads[:, : hidden.shape[-1]].astype(hidden.dtype)
        logits = jnp.einsum("dtw,dwv->dtv", hidden, kernel, preferred_element_type=jnp.float32)
        if bias is not None:
            logits = logits + heads[:, -1:]
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - own
        right = own >= jnp.max(logits, axis=-1)
        return jnp.sum(weights * losses, axis=1), jnp.sum(weights * right, axis=1)

    nothing = (split_rows(jnp.zeros(shards, jnp.float32), mesh),) * 2

    @jax.checkpoint
    def step(sums: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], None]:
        number, *arrays = chunk
        new = jax.lax.cond(number * size < needed, one_chunk, lambda *_: nothing, heads, *arrays)
        return (sums[0] + new[0], sums[1] + new[1]), None

    arrays = (chunks(hidden), chunks(targets), chunks(weights))
    sums, _ = jax.lax.scan(step, nothing, (jnp.arange(len(arrays[0])), *arrays))
    return jnp.sum(sums[0]), jnp.sum(sums[1])
