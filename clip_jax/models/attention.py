"""What makes a mix of values from queries, keys and values: XLA's own products, or cuDNN's fused kernel on NVIDIA GPUs.

Both are one function of the same arguments, so that a model is built with either (``config.model.attention``).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Heads = Float[Array, "batch tokens heads dim"]
Attend = Callable[[Heads, Heads, Heads, bool], Heads]
"""(queries, keys, values, causal) -> softmax(queries · keys / sqrt(dim)) · values, in the type of the values."""


def xla(query: Heads, key: Heads, value: Heads, causal: bool) -> Heads:
    """The definition. Logits and softmax are float32, and tokens x tokens of them exist for every head."""
    tokens, dim = query.shape[1], query.shape[-1]
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * dim**-0.5
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def cudnn(query: Heads, key: Heads, value: Heads, causal: bool) -> Heads:
    """In tiles that never leave the chip's cache (Dao et al. 2022, FlashAttention), forward and backward.

    For NVIDIA GPUs from Ampere on, in bfloat16, with heads of at most 128 features (256 from Hopper on).
    """
    batch, tokens = query.shape[:2]
    lengths = None
    if tokens % 2:  # JAX refuses a gradient of odd lengths; XLA pads in the copy that cuts queries, keys, values apart
        query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
        if not causal:  # with it, no real token sees the last one
            lengths = jnp.full((batch,), tokens, jnp.int32)
    mixed = jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return mixed[:, :tokens]


ATTENTION: dict[str, Attend] = {"xla": xla, "cudnn": cudnn}


class Rotary(NamedTuple):
    """Sines and cosines of the angle by which each token turns each feature of its queries and keys."""

    sin: Float[Array, "#batch tokens dim"]
    cos: Float[Array, "#batch tokens dim"]


def rotate(x: Heads, rotary: Rotary) -> Heads:
    """Turns each pair of neighbouring features by its angle, in float32 (Su et al. 2021, eq. 34)."""
    exact = x.astype(jnp.float32)
    turned = jnp.stack([-exact[..., 1::2], exact[..., ::2]], axis=-1).reshape(x.shape)
    return (exact * rotary.cos[:, :, None] + turned * rotary.sin[:, :, None]).astype(x.dtype)
