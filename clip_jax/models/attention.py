"""Attention: XLA's own products, cuDNN's fused kernel on NVIDIA GPUs, or Pallas on TPUs (``attention_tpu.py``).

All implementations are one function of the same arguments, so that a model runs with any (``config.model.attention``).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Queries = Float[Array, "batch queries heads dim"]
Keys = Float[Array, "batch keys heads dim"]
Mask = Bool[Array, "#batch #queries #keys"]
Attend = Callable[..., Queries]
"""``(query, key, value, *, causal, mask) -> softmax(query · key / sqrt(dim)) · value``, in the type of the values.

Queries and keys may differ in number. With ``causal``, query i sees keys 0 to i. ``mask`` is True where a query sees a
key; None hides nothing. The result of a query that sees no key is zero.
"""


def xla(query: Queries, key: Keys, value: Keys, *, causal: bool = False, mask: Mask | None = None) -> Queries:
    """The definition. Logits and softmax are float32 and materialized: queries x keys for every head."""
    dim = query.shape[-1]
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * dim**-0.5
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    if mask is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        seen = mask[:, None] & jnp.isfinite(logits)
        # A finite stand-in for hidden logits: a row of -inf alone would have NaN as its softmax and as its gradient.
        weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1), 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


def cudnn(query: Queries, key: Keys, value: Keys, *, causal: bool = False, mask: Mask | None = None) -> Queries:
    """cuDNN's fused attention, which never writes the logits to memory (Dao et al. 2022, FlashAttention).

    For NVIDIA GPUs from Ampere on, in bfloat16, with heads of at most 128 features (256 from Hopper on).
    """
    (batch, queries), keys = query.shape[:2], key.shape[1]
    lengths = None
    # JAX refuses the gradient of odd lengths; XLA pads in the copy that separates queries, keys and values.
    if queries % 2:
        query = jnp.pad(query, ((0, 0), (0, 1), (0, 0), (0, 0)))
    if keys % 2:
        key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (key, value))
        if not causal or queries > keys:  # otherwise no real query sees the padding
            lengths = jnp.full((batch,), keys, jnp.int32)
    seen = None
    if mask is not None:
        seen = jnp.broadcast_to(mask, (mask.shape[0], queries, keys))
        seen = jnp.pad(seen, ((0, 0), (0, queries % 2), (0, keys % 2)))[:, None]
    mixed = jax.nn.dot_product_attention(
        query, key, value, mask=seen, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )[:, :queries]
    if mask is None:
        return mixed
    visible = jnp.broadcast_to(mask, (mask.shape[0], queries, keys))
    if causal:
        visible = visible & jnp.tril(jnp.ones((queries, keys), bool))
    return jnp.where(jnp.any(visible, axis=-1)[:, :, None, None], mixed, 0)


ATTENTION = ("xla", "cudnn", "tpu")
"""The names of the implementations; ``models/attention_choice.py`` selects one."""


class Rotary(NamedTuple):
    """Sines and cosines of the angles that rotate the features of each token's queries and keys."""

    sin: Float[Array, "#batch tokens dim"]
    cos: Float[Array, "#batch tokens dim"]


def rotate(x: Queries, rotary: Rotary) -> Queries:
    """Rotates each pair of neighboring features by its angle, in float32 (Su et al. 2021, eq. 34)."""
    exact = x.astype(jnp.float32)
    rotated = jnp.stack([-exact[..., 1::2], exact[..., ::2]], axis=-1).reshape(x.shape)
    return (exact * rotary.cos[:, :, None] + rotated * rotary.sin[:, :, None]).astype(x.dtype)
