"""A decoder that predicts captions: self-attention over the text, cross-attention to the image (Yu et al. 2022, CoCa).

Each layer is a block of the text tower followed by one that attends to the image and has an MLP of its own, as in
OpenCLIP. The image is seen through a few learned queries that pool its tokens, or token by token.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clip_jax.devices.sharding import split_rows
from clip_jax.models import flops
from clip_jax.models.compute import REMAT_POLICIES, Compute
from clip_jax.models.transformer import (
    MLP,
    Block,
    BlockInit,
    BlockShape,
    LayerNorm,
    normal,
    product,
    text_block_init,
    zeros,
)


@dataclass(frozen=True)
class DecoderShape:
    """Lengths in tokens, widths in features."""

    length: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    queries: int
    """Learned queries that pool the image's tokens; 0: the decoder attends to all of them."""
    image_width: int

    def block(self, causal: bool) -> BlockShape:
        return BlockShape(self.heads, self.mlp_width, self.activation, causal)

    def forward_flops(self, image_tokens: int) -> int:
        """FLOPs of one caption's forward pass without the vocabulary; see ``models/flops.py``."""
        width, length = self.width, self.length
        seen = self.queries or image_tokens
        pooling = 0
        if self.queries:
            pooling = flops.product(self.image_width, 2 * width, times=image_tokens)
            pooling += flops.product(width, 2 * width, times=seen) + 2 * flops.product(image_tokens, width, times=seen)
        memory_width = width if self.queries else self.image_width
        weights = flops.product(width, 6 * width + 4 * self.mlp_width, times=length)
        weights += flops.product(memory_width, 2 * width, times=seen)
        attention = 2 * flops.product(length + seen, width, times=length)
        return pooling + self.layers * (weights + attention)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory of any width."""

    heads: int
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch queries width"], memory: Float[Array, "batch keys memory_width"]
    ) -> Float[Array, "batch queries width"]:
        width, heads, dtype = x.shape[-1], self.heads, self.compute.dtype
        dim, init = width // heads, self.inits.qkv
        query_init = nn.with_logical_partitioning(init, ("embed", "heads", None))
        query = self.param("query", query_init, (width, heads, dim))
        query_bias_init = nn.with_logical_partitioning(zeros, ("heads", None))
        query_bias = self.param("query_bias", query_bias_init, (heads, dim))
        both_init = nn.with_logical_partitioning(init, ("embed", None, "heads", None))
        both = self.param("key_value", both_init, (memory.shape[-1], 2, heads, dim))
        both_bias_init = nn.with_logical_partitioning(zeros, (None, "heads", None))
        both_bias = self.param("key_value_bias", both_bias_init, (2, heads, dim))
        out_init = nn.with_logical_partitioning(self.inits.attention_out, ("heads", None, "embed"))
        out = self.param("out", out_init, (heads, dim, width))
        out_bias = self.param("out_bias", nn.with_logical_partitioning(zeros, ("embed",)), (width,))

        asked = product("...w,whd->...hd", x, query, self.compute) + query_bias.astype(dtype)
        projected = product("...w,wshd->...shd", memory, both, self.compute) + both_bias.astype(dtype)
        mixed = self.compute.attend(asked, projected[:, :, 0], projected[:, :, 1], causal=False, mask=None)
        return product("...hd,hdw->...w", mixed, out, self.compute) + out_bias.astype(dtype)


class AttentionalPooler(nn.Module):
    """Learned queries attend to an image's tokens (CoCa, section 3.2)."""

    shape: DecoderShape
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens image_width"]) -> Float[Array, "batch queries width"]:
        shape, dtype = self.shape, self.compute.dtype
        queries_init = nn.with_logical_partitioning(normal(1.0), (None, "embed"))
        queries = self.param("queries", queries_init, (shape.queries, shape.width))
        asked = LayerNorm(dtype, name="norm_query")(jnp.broadcast_to(queries, (len(tokens), *queries.shape)))
        seen = LayerNorm(dtype, name="norm_key")(tokens)
        pooled = CrossAttention(shape.heads, self.inits, self.compute, name="attention")(asked, seen)
        return LayerNorm(dtype, name="norm_post")(split_rows(pooled, self.compute.mesh))


class Layer(nn.Module):
    """A block over the text, then ``x + cross_attention(norm(x), norm(memory))`` and ``x + mlp(norm(x))``."""

    shape: DecoderShape
    causal: bool
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], memory: Float[Array, "batch keys memory_width"], mask: Array | None
    ) -> tuple[Array, None]:
        block, compute, mesh = self.shape.block(self.causal), self.compute, self.compute.mesh
        x, _ = Block(block, self.inits, compute, name="text")(x, None, mask)
        attention = CrossAttention(self.shape.heads, self.inits, compute, name="cross")
        seen = LayerNorm(compute.dtype, name="norm_memory")(memory)
        x = split_rows(x + attention(LayerNorm(compute.dtype, name="norm_1")(x), seen), mesh)
        x = x + MLP(block, self.inits, compute, name="mlp")(LayerNorm(compute.dtype, name="norm_2")(x))
        return split_rows(x, mesh), None


class Decoder(nn.Module):
    """(inputs [batch, length, width], image tokens, parallel) -> hidden states [batch, length, width].

    The hidden state at a position sees the inputs up to this position. In ``parallel`` rows all inputs are replaced by
    a mask, and every position sees all others (Tschannen et al. 2023, CapPa), so only the image carries information.
    """

    shape: DecoderShape
    compute: Compute

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch length width"],
        image: Float[Array, "batch tokens image_width"],
        parallel: Bool[Array, "batch"] | None = None,
    ) -> Float[Array, "batch length width"]:
        shape, compute, dtype = self.shape, self.compute, self.compute.dtype
        inits = text_block_init(shape.width, shape.mlp_width, shape.layers)
        position_init = nn.with_logical_partitioning(normal(0.01), (None, "embed"))
        positions = self.param("position_embedding", position_init, (shape.length, shape.width))
        mask_init = nn.with_logical_partitioning(normal(0.02), ("embed",))
        x, mask = inputs.astype(dtype), None
        if parallel is not None:
            masked = self.param("mask_embedding", mask_init, (shape.width,))
            x = jnp.where(parallel[:, None, None], masked.astype(dtype), x)
            length = inputs.shape[1]
            mask = jnp.tril(jnp.ones((length, length), bool)) | parallel[:, None, None]
        x = split_rows(x + positions.astype(dtype), compute.mesh)
        memory = (
            AttentionalPooler(shape, inits, compute, name="pooler")(image) if shape.queries else image.astype(dtype)
        )
        layer = Layer
        if compute.remat != "none":
            layer = nn.remat(Layer, prevent_cse=False, policy=REMAT_POLICIES[compute.remat])
        stacked = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=shape.layers,
            unroll=1 if compute.scan else shape.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stacked(shape, parallel is None, inits, compute, name="blocks")(x, memory, mask)
        return LayerNorm(dtype, name="norm_final")(x)
