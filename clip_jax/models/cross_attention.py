"""Attention of one sequence to another: learned queries that pool an image's tokens, and a decoder that sees them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.devices.sharding import split_rows
from clip_jax.models.compute import Compute
from clip_jax.models.linear import add_bias, product
from clip_jax.models.norm import LayerNorm
from clip_jax.models.transformer import BlockInit, normal, uniform, zeros


class CrossAttention(nn.Module):
    """Multi-head attention of ``x`` to a memory of any width.

    One matrix makes queries, keys and values where both have the same width, two where they have not, as in PyTorch.
    With ``compute.cache`` keys and values of the memory are computed for the first token and kept in the ``cache``.
    """

    heads: int
    inits: BlockInit
    compute: Compute
    bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch queries width"], memory: Float[Array, "batch keys memory_width"]
    ) -> Float[Array, "batch queries width"]:
        width, heads, dtype = x.shape[-1], self.heads, self.compute.dtype
        dim = width // heads
        qkv_axes = ("embed", None, "heads", None)

        def param(name: str, init: Callable[..., Any], axes: tuple, shape: tuple[int, ...]) -> Array:
            return self.param(name, nn.with_logical_partitioning(init, axes), shape)

        if memory.shape[-1] == width:
            qkv = param("qkv", self.inits.qkv, qkv_axes, (width, 3, heads, dim))
            query, key_value = qkv[:, 0], qkv[:, 1:]
        else:
            query = param("query", self.inits.qkv, ("embed", "heads", None), (width, heads, dim))
            key_value = param("key_value", self.inits.qkv, qkv_axes, (memory.shape[-1], 2, heads, dim))
        out = param("out", self.inits.attention_out, ("heads", None, "embed"), (heads, dim, width))
        qkv_bias, out_bias = jnp.zeros((3, heads, dim)), jnp.zeros(width)
        if self.bias:
            qkv_bias = param("qkv_bias", zeros, qkv_axes[1:], (3, heads, dim))
            out_bias = param("out_bias", zeros, ("embed",), (width,))

        def project() -> Float[Array, "batch keys 2 heads dim"]:
            return product("...w,wshd->...shd", memory, key_value, self.compute) + qkv_bias[1:].astype(dtype)

        projected = self.variable("cache", "memory", project).value if self.compute.cache else project()
        asked = product("...w,whd->...hd", x, query, self.compute) + qkv_bias[0].astype(dtype)
        mixed = self.compute.attend(asked, projected[:, :, 0], projected[:, :, 1], causal=False, mask=None)
        return add_bias(product("...hd,hdw->...w", mixed, out, self.compute), out_bias, self.compute)


class QueryPooling(nn.Module):
    """Learned queries attend to an image's tokens (Yu et al. 2022, CoCa, section 3.2), as in OpenCLIP."""

    queries: int
    width: int
    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens image_width"]) -> Float[Array, "batch queries width"]:
        width = self.width
        queries_init = nn.with_logical_partitioning(normal(1.0), (None, "embed"))
        queries = self.param("queries", queries_init, (self.queries, width))
        asked = LayerNorm(self.compute, name="norm_query")(queries)
        seen = LayerNorm(self.compute, name="norm_key")(tokens)
        inits = BlockInit(xavier, uniform(width**-0.5), zeros, zeros, zeros, zeros)
        attention = CrossAttention(self.heads, inits, self.compute._replace(cache=0), name="attention")
        pooled = attention(jnp.broadcast_to(asked, (len(tokens), *asked.shape)), seen)
        return LayerNorm(self.compute, name="norm_post")(split_rows(pooled, self.compute.mesh))


def xavier(rng: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """PyTorch's for an attention: U(+-sqrt(6 / (fan_in + fan_out))), where a fused matrix counts as one."""
    fused = shape[1] if len(shape) == 4 and shape[1] == 3 else 1
    bound = (6 / (shape[0] + fused * shape[-2] * shape[-1])) ** 0.5
    return jax.random.uniform(rng, shape, dtype, -bound, bound)
