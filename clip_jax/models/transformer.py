"""The pre-norm transformer both towers are built from: attention, MLP, block, and a stack of blocks.

Parameters are float32; matrix products run in ``dtype``; layer norms and the attention softmax in float32.
Every parameter names its logical axes; only ``sharding.py`` knows what mesh axes they lie on:

    layers   stacked blocks          embed   the residual width
    heads    attention heads         mlp     the hidden width of the MLP
    vocab    token ids               joint   the shared embedding of image and text
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Initializer = Callable[..., Array]
Remat = Literal["none", "dots", "full"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's approximation; its weights need it
}

REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def normal(stddev: float) -> Initializer:
    return nn.initializers.normal(stddev)


def uniform(bound: float) -> Initializer:
    """U(-bound, bound): PyTorch's default is ``bound = 1 / sqrt(fan_in)`` for weights and biases alike."""
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


class BlockInit(NamedTuple):
    """How the weights of one block start; CLIP's image and text blocks differ (Radford et al. 2021, released code)."""

    qkv: Initializer
    attention_out: Initializer
    mlp_up: Initializer
    mlp_up_bias: Initializer
    mlp_down: Initializer
    mlp_down_bias: Initializer


def image_block_init(width: int, mlp_width: int) -> BlockInit:
    """CLIP's ViT blocks keep PyTorch's defaults: Xavier over the fused qkv matrix, U(1/sqrt(fan_in)) elsewhere."""
    return BlockInit(
        qkv=uniform((1.5 / width) ** 0.5),
        attention_out=uniform(width**-0.5),
        mlp_up=uniform(width**-0.5),
        mlp_up_bias=uniform(width**-0.5),
        mlp_down=uniform(mlp_width**-0.5),
        mlp_down_bias=uniform(mlp_width**-0.5),
    )


def text_block_init(width: int, mlp_width: int, layers: int) -> BlockInit:
    """CLIP's text blocks follow GPT-2: what writes to the residual stream shrinks with depth."""
    residual = width**-0.5 * (2 * layers) ** -0.5
    return BlockInit(
        qkv=normal(width**-0.5),
        attention_out=normal(residual),
        mlp_up=normal((2 * width) ** -0.5),
        mlp_up_bias=uniform(width**-0.5),
        mlp_down=normal(residual),
        mlp_down_bias=uniform(mlp_width**-0.5),
    )


class LayerNorm(nn.Module):
    """Layer norm over the last axis, computed in float32 whatever comes in."""

    dtype: jnp.dtype = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        width = x.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (width,))
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)), (width,))
        x = x.astype(jnp.float32)
        mean = jnp.mean(x, axis=-1, keepdims=True)
        centred = x - mean
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    heads: int
    inits: BlockInit
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        _, tokens, width = x.shape
        head_dim = width // self.heads
        qkv_axes, out_axes = ("embed", None, "heads", None), ("heads", None, "embed")
        zeros = nn.initializers.zeros
        shape = (3, self.heads, head_dim)
        qkv = self.param("qkv", nn.with_logical_partitioning(self.inits.qkv, qkv_axes), (width, *shape))
        qkv_bias = self.param("qkv_bias", nn.with_logical_partitioning(zeros, qkv_axes[1:]), shape)
        out = self.param("out", nn.with_logical_partitioning(self.inits.attention_out, out_axes), (*shape[1:], width))
        out_bias = self.param("out_bias", nn.with_logical_partitioning(zeros, ("embed",)), (width,))

        projected = jnp.einsum("btw,wshd->btshd", x, qkv.astype(self.dtype)) + qkv_bias.astype(self.dtype)
        query, key, value = projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
        if self.causal:
            logits = jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return jnp.einsum("bthd,hdw->btw", mixed, out.astype(self.dtype)) + out_bias.astype(self.dtype)


class MLP(nn.Module):
    """Two layers with an activation between them."""

    width: int
    activation: str
    inits: BlockInit
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        inner, outer = self.width, x.shape[-1]
        init = self.inits
        up = self.param("up", nn.with_logical_partitioning(init.mlp_up, ("embed", "mlp")), (outer, inner))
        up_bias = self.param("up_bias", nn.with_logical_partitioning(init.mlp_up_bias, ("mlp",)), (inner,))
        down = self.param("down", nn.with_logical_partitioning(init.mlp_down, ("mlp", "embed")), (inner, outer))
        down_bias = self.param("down_bias", nn.with_logical_partitioning(init.mlp_down_bias, ("embed",)), (outer,))
        hidden = ACTIVATIONS[self.activation](x @ up.astype(self.dtype) + up_bias.astype(self.dtype))
        return hidden @ down.astype(self.dtype) + down_bias.astype(self.dtype)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    heads: int
    mlp_width: int
    activation: str
    inits: BlockInit
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"], _=None) -> tuple[Array, None]:
        attention = Attention(self.heads, self.inits, self.causal, self.dtype, name="attention")
        mlp = MLP(self.mlp_width, self.activation, self.inits, self.dtype, name="mlp")
        x = x + attention(LayerNorm(self.dtype, name="norm_1")(x))
        x = x + mlp(LayerNorm(self.dtype, name="norm_2")(x))
        return x, None


class Stack(nn.Module):
    """``layers`` blocks whose parameters are stored stacked ``[layers, ...]``, looped over or unrolled.

    ``scan`` compiles one block whatever the depth; unrolled, XLA may fuse across blocks. The numbers and the
    parameter tree are the same. ``remat`` trades compute for activation memory: ``dots`` recomputes all but the
    weight products, ``full`` everything between blocks.
    """

    layers: int
    heads: int
    mlp_width: int
    activation: str
    inits: BlockInit
    causal: bool = False
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: Remat = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        stacked = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
            unroll=1 if self.scan else self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        arguments = (self.heads, self.mlp_width, self.activation, self.inits, self.causal, self.dtype)
        x, _ = stacked(*arguments, name="blocks")(x, None)
        return x
