"""A decoder that predicts captions: self-attention over the text, cross-attention to the image.

coca   continues from the tokens of a causal text tower (Yu et al. 2022, section 3.1). Each layer is a block of the text
       tower, then one that attends to the image and has an MLP of its own, as in OpenCLIP.
cappa  reads the caption itself (Tschannen et al. 2023; Wan et al. 2024, LocCa). Each layer has self-attention,
       cross-attention and one MLP, without biases; inputs are the caption shifted by one, with id 0 before it. For
       some images all inputs are masked, and all tokens are predicted at once from the image alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.devices.sharding import gather_features, split_rows
from clip_jax.models import flops
from clip_jax.models.compute import REMAT_POLICIES, Compute
from clip_jax.models.cross_attention import CrossAttention
from clip_jax.models.norm import LayerNorm
from clip_jax.models.transformer import (
    MLP,
    Attention,
    Block,
    BlockInit,
    BlockShape,
    normal,
    text_block_init,
    zeros,
)


@dataclass(frozen=True)
class CaptionDecoder:
    """The shape of a decoder; lengths in tokens, widths in features."""

    form: Literal["coca", "cappa"]
    length: int
    """The number of predicted tokens."""
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    parallel: bool = False
    """Whether there is a mask to replace the inputs; cappa only."""

    @property
    def block(self) -> BlockShape:
        cappa = self.form == "cappa"
        epsilon = 1e-6 if cappa else 1e-5  # Flax's default, in the released code of CapPa
        return BlockShape(self.heads, self.mlp_width, self.activation, True, epsilon, bias=not cappa)

    def module(self, compute: Compute) -> "Decoder":
        return Decoder(self, compute)

    def forward_flops(self, seen: int, memory_width: int) -> int:
        """FLOPs of one caption's forward pass that attends to ``seen`` image tokens, without the vocabulary."""
        width, length = self.width, self.length
        mlps = 2 if self.form == "coca" else 1
        weights = flops.product(width, 6 * width + 2 * mlps * self.mlp_width, times=length)
        weights += flops.product(memory_width, 2 * width, times=seen)
        attention = 2 * flops.product(length + seen, width, times=length)
        return self.layers * (weights + attention)


class Layer(nn.Module):
    """One layer, of either form."""

    shape: CaptionDecoder
    causal: bool
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], memory: Float[Array, "batch keys memory_width"], mask: Array | None
    ) -> tuple[Array, None]:
        block, compute, mesh = self.shape.block, self.compute, self.compute.mesh
        if not self.causal:
            block = replace(block, causal=False)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(compute, block.norm_epsilon, use_bias=block.bias, name=name)

        if self.shape.form == "coca":
            x, _ = Block(block, self.inits, compute, name="text")(x, None, mask)
            memory = norm("norm_memory")(memory)
        else:
            attention = Attention(block, self.inits, compute, name="attention")
            x = split_rows(x + attention(norm("norm_1")(split_rows(x, mesh)), None, mask), mesh)
        cross = CrossAttention(self.shape.heads, self.inits, compute, block.bias, name="cross")
        x = split_rows(x + cross(norm("norm_cross")(x), memory), mesh)
        x = x + MLP(block, self.inits, compute, name="mlp")(norm("norm_2")(x))
        return split_rows(x, mesh), None


class Decoder(nn.Module):
    """(text tower's tokens, image tokens, ids, parallel) -> (hidden states [batch, predicted, width], head, its bias).

    coca: state i sees the tokens up to i, and predicts token i + 1. cappa: state i sees the ids before i, and predicts
    id i; in ``parallel`` rows all states see a mask in place of every id. ``index``: with ``compute.cache``, the number
    of the one token that is given; its predecessors are in the cache.
    """

    shape: CaptionDecoder
    compute: Compute

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch length width"],
        memory: Float[Array, "batch keys memory_width"],
        text: Int[Array, "batch length"],
        parallel: Bool[Array, "batch"] | None = None,
        index: Int[Array, ""] | None = None,
        seen: Bool[Array, "batch 1 keys"] | None = None,
    ) -> tuple[Float[Array, "batch predicted width"], Float[Array, "width vocab"], Float[Array, "vocab"] | None]:
        shape, compute, dtype = self.shape, self.compute, self.compute.dtype
        mask = seen
        if shape.form == "coca":
            inits = text_block_init(shape.width, shape.mlp_width, shape.layers)
            x = tokens if index is not None else tokens[:, : shape.length]
        else:
            inits = cappa_init()
            x = self._embed(text, parallel, index)
            if parallel is not None:
                length = x.shape[1]
                mask = jnp.tril(jnp.ones((length, length), bool)) | parallel[:, None, None]
        layer = Layer
        if compute.remat != "none":
            layer = nn.remat(Layer, prevent_cse=False, policy=REMAT_POLICIES[compute.remat])
        stacked = nn.scan(
            layer,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=shape.layers,
            unroll=1 if compute.scan else shape.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks = stacked(shape, parallel is None, inits, compute, name="blocks")
        x, _ = blocks(split_rows(x.astype(dtype), compute.mesh), memory.astype(dtype), mask)
        hidden = LayerNorm(self.compute, shape.block.norm_epsilon, use_bias=shape.block.bias, name="norm_final")(x)
        # CoCa's published code leaves the head uninitialized; CapPa's begins with zeros.
        head_init = normal(shape.width**-0.5) if shape.form == "coca" else zeros
        head_init = nn.with_logical_partitioning(head_init, ("embed", "vocab"))
        head = self.param("projection", head_init, (shape.width, shape.vocab_size))
        if shape.form == "coca":
            return hidden, head, None
        bias_init = nn.with_logical_partitioning(zeros, ("vocab",))
        return hidden, head, self.param("projection_bias", bias_init, (shape.vocab_size,))

    def _embed(
        self, text: Int[Array, "batch length"], parallel: Bool[Array, "batch"] | None, index: Int[Array, ""] | None
    ) -> Float[Array, "batch length width"]:
        """The ids before each of ``text``, the first of which has id 0 before it, and learned positions."""
        shape, mesh, width = self.shape, self.compute.mesh, self.shape.width
        table_init = nn.with_logical_partitioning(normal(1.0), ("vocab", "embed"))
        table = self.param("token_embedding", table_init, (shape.vocab_size, width))
        position_init = nn.with_logical_partitioning(normal(width**-0.5), (None, "embed"))
        positions = self.param("position_embedding", position_init, (shape.length, width))
        if shape.parallel:
            mask_init = nn.with_logical_partitioning(normal(1.0), ("embed",))
            masked = self.param("mask_embedding", mask_init, (width,))
        if index is not None:  # ``text`` is the id before it
            return jnp.take(gather_features(table, mesh), text, axis=0) + jax.lax.dynamic_slice_in_dim(
                positions, index, 1
            )
        before = jnp.pad(text[:, :-1], ((0, 0), (1, 0)))
        x = split_rows(jnp.take(gather_features(table, mesh), before, axis=0), mesh)
        if parallel is not None:
            x = jnp.where(parallel[:, None, None], masked, x)
        return x + positions[: text.shape[1]]


def cappa_init() -> BlockInit:
    """Flax's defaults for attention, and those of big_vision's MLPs, as in the released code of CapPa."""
    out = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2)
    mlp = nn.initializers.xavier_uniform()
    return BlockInit(_lecun_normal, out, mlp, zeros, mlp, zeros)


def _lecun_normal(rng: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Flax's ``lecun_normal`` of a matrix whose first axis is its input; 0.8796 is what cutting at 2 leaves of 1."""
    return shape[0] ** -0.5 / 0.87962566103423978 * jax.random.truncated_normal(rng, -2.0, 2.0, shape, dtype)
