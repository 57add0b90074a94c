"""Cross-entropy over a vocabulary, a chunk of tokens at a time.

The logits of a batch of captions would be [batch, length, vocabulary]: 200 GB for 32,768 captions of 32 tokens in a
vocabulary of 50,000. Here a device holds the logits of one chunk at a time; the backward pass recomputes them. Tokens
of weight 0 (padding) are sorted to the end, and chunks that contain only padding are skipped.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from clip_jax.devices.sharding import batch_shards, copy_for_each_part, split_rows

CHUNK_LOGITS = 2**24
"""Target for the logits that a device holds at one time (64 MiB of float32), unless MIN_CHUNK_TOKENS requires more."""
MIN_CHUNK_TOKENS = 1024
"""Minimum tokens per chunk: each chunk reads and writes the head's gradient, 800 MB for 256,000 vocabulary entries."""

Chunks = Float[Array, "chunks devices tokens *"]


def chunk_size(tokens: int, vocabulary: int) -> int:
    """The number of tokens per chunk that splits ``tokens`` into as few chunks as possible, of about equal size."""
    largest = max(MIN_CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)
    return -(-tokens // -(-tokens // largest))


def cross_entropy(
    hidden: Float[Array, "batch length width"],
    head: Float[Array, "width vocabulary"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    mesh: Mesh | AbstractMesh | None,
    bias: Float[Array, "vocabulary"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the sum of ``-weight * log softmax(hidden @ head + bias)[target]`` and the weight of correct predictions.

    Gradients do not flow to ``weights``.
    """
    shards = 1 if mesh is None else batch_shards(mesh)
    tokens = targets.size // shards
    size = chunk_size(tokens, head.shape[1])

    def by_device(x: Array) -> Array:
        return split_rows(x.reshape(shards, tokens, *x.shape[2:]), mesh)

    is_padding = by_device(weights) == 0
    order = jnp.argsort(is_padding, axis=1, stable=True)
    used_tokens = jnp.max(jnp.sum(~is_padding, axis=1))

    def chunks(x: Array) -> Array:
        """[batch, length, ...] -> [chunks, devices, tokens, ...], each device's tokens with weight first."""
        x = jax.vmap(lambda rows, order: rows[order])(by_device(x), order)
        x = jnp.pad(x, ((0, 0), (0, -tokens % size), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(shards, -1, size, *x.shape[2:]).swapaxes(0, 1)

    # Each device sums the head's gradient over its chunks before the reduction over devices.
    heads = copy_for_each_part(head, mesh), None if bias is None else copy_for_each_part(bias[None], mesh)
    loss, correct = _sums(mesh, heads, chunks(hidden), chunks(targets), chunks(weights), used_tokens)
    return jnp.sum(loss), jnp.sum(correct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    mesh: Mesh | AbstractMesh | None,
    heads: tuple[Array, Array | None],
    hidden: Chunks,
    targets: Chunks,
    weights: Chunks,
    used_tokens: Int[Array, ""],
) -> tuple[Float[Array, " devices"], Float[Array, " devices"]]:
    """The sums of each device, whose first ``used_tokens`` tokens have weight."""
    return _forward(mesh, heads, hidden, targets, weights, used_tokens)[0]


def _forward(mesh, heads, hidden, targets, weights, used_tokens):
    kernels, size = heads[0].astype(hidden.dtype), hidden.shape[2]

    def compute(hidden: Array, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
        logits = _logits(kernels, heads[1], hidden)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        lse = jax.nn.logsumexp(logits, axis=-1)
        correct = target >= jnp.max(logits, axis=-1)
        return jnp.sum(weights * (lse - target), axis=1), jnp.sum(weights * correct, axis=1), lse

    def step(sums: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        number, *arrays = chunk
        loss, correct, lse = jax.lax.cond(number * size < used_tokens, compute, lambda *_: nothing, *arrays)
        return (sums[0] + loss, sums[1] + correct), lse

    zeros = split_rows(jnp.zeros(hidden.shape[1:3], jnp.float32), mesh)
    nothing = (zeros[:, 0], zeros[:, 0], zeros)
    numbers = jnp.arange(len(hidden))
    sums, lses = jax.lax.scan(step, nothing[:2], (numbers, hidden, targets, weights))
    return sums, (heads, hidden, targets, weights, used_tokens, lses)


def _backward(mesh, residuals, gradients):
    heads, hidden, targets, weights, used_tokens, lses = residuals
    kernels, size = heads[0].astype(hidden.dtype), hidden.shape[2]
    vocabulary = jnp.arange(heads[0].shape[2])

    def compute(sums, hidden: Array, targets: Array, weights: Array, lse: Array):
        probabilities = jnp.exp(_logits(kernels, heads[1], hidden) - lse[..., None])
        share = weights * gradients[0][:, None]
        d_logits = (probabilities - (vocabulary == targets[..., None])) * share[..., None]
        d_bias = None if heads[1] is None else jnp.sum(d_logits, axis=1, keepdims=True)
        d_logits = d_logits.astype(hidden.dtype)
        d_kernel = jnp.einsum("dtw,dtv->dwv", hidden, d_logits, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("dtv,dwv->dtw", d_logits, kernels, preferred_element_type=jnp.float32)
        return jax.tree.map(jnp.add, sums, (d_kernel, d_bias)), d_hidden.astype(hidden.dtype)

    def step(sums, chunk: tuple[Array, ...]):
        number, *arrays = chunk
        return jax.lax.cond(
            number * size < used_tokens, compute, lambda sums, hidden, *_: (sums, jnp.zeros_like(hidden)), sums, *arrays
        )

    nothing = jax.tree.map(lambda x: copy_for_each_part(jnp.zeros(x.shape[1:], jnp.float32), mesh), heads)
    numbers = jnp.arange(len(hidden))
    sums, d_hidden = jax.lax.scan(step, nothing, (numbers, hidden, targets, weights, lses))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), sums, heads), d_hidden, None, None, None


_sums.defvjp(_forward, _backward)


def _logits(
    kernels: Float[Array, "devices width vocabulary"],
    biases: Float[Array, "devices 1 vocabulary"] | None,
    hidden: Float[Array, "devices tokens width"],
) -> Float[Array, "devices tokens vocabulary"]:
    logits = jnp.einsum("dtw,dwv->dtv", hidden, kernels, preferred_element_type=jnp.float32)
    return logits if biases is None else logits + biases
