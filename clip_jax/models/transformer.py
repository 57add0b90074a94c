"""The pre-norm transformer that both towers are built from: attention, MLP, block, and a stack of blocks.

Parameters are float32; matrix products run in the compute type; layer norms and the attention softmax in float32.
Every parameter names its logical axes; only ``devices/sharding.py`` maps them to mesh axes:

    layers   stacked blocks          embed   the residual width
    heads    attention heads         mlp     the hidden width of the MLP
    vocab    token ids               joint   the shared embedding of image and text
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from clip_jax.devices.sharding import split_rows
from clip_jax.models.attention import Mask, Rotary, rotate
from clip_jax.models.attention_tpu import TPUAttention
from clip_jax.models.compute import REMAT_POLICIES, Compute
from clip_jax.models.linear import add_bias, product
from clip_jax.models.norm import LayerNorm

Initializer = Callable[..., Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's approximation; its weights need it
}

zeros = nn.initializers.zeros


def normal(stddev: float) -> Initializer:
    return nn.initializers.normal(stddev)


def uniform(bound: float) -> Initializer:
    """U(-bound, bound): PyTorch's default is ``bound = 1 / sqrt(fan_in)`` for weights and biases alike."""
    return lambda rng, shape, dtype=jnp.float32: jax.random.uniform(rng, shape, dtype, -bound, bound)


class BlockInit(NamedTuple):
    """The initializers of one block; CLIP's image and text blocks differ (Radford et al. 2021, released code)."""

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
    """CLIP's text blocks follow GPT-2: the layers that write to the residual stream shrink with depth."""
    residual = width**-0.5 * (2 * layers) ** -0.5
    return BlockInit(
        qkv=normal(width**-0.5),
        attention_out=normal(residual),
        mlp_up=normal((2 * width) ** -0.5),
        mlp_up_bias=uniform(width**-0.5),
        mlp_down=normal(residual),
        mlp_down_bias=uniform(mlp_width**-0.5),
    )


def timm_block_init() -> BlockInit:
    """The image towers that OpenCLIP takes from timm: N(0, 0.02) and zero biases."""
    return BlockInit(normal(0.02), normal(0.02), normal(0.02), zeros, normal(0.02), zeros)


@dataclass(frozen=True)
class BlockShape:
    """Everything that decides a block's parameters and what it computes."""

    heads: int
    mlp_width: int
    activation: str = "gelu"
    causal: bool = False
    norm_epsilon: float = 1e-5
    norm_last: bool = False
    """Norms after attention and MLP, before the residual sum, instead of before them (EVA-02 E)."""
    swiglu: bool = False
    """A gated MLP with norms inside it and inside the attention (EVA-02; Sun et al. 2023)."""
    key_bias: bool = True
    layer_scale: float | None = None
    """The initial value of LayerScale's factors (Touvron et al. 2021, CaiT); None: no LayerScale."""
    bias: bool = True
    """False: no biases at all, neither in attention, MLP nor norms (CapPa's decoder)."""


def bias(module: nn.Module, name: str, init: Initializer, axes: tuple, shape: tuple[int, ...]) -> Array:
    """A module's bias; zeros, and no parameter, where its ``shape`` has none."""
    if not module.shape.bias:
        return jnp.zeros(shape)
    return module.param(name, nn.with_logical_partitioning(init, axes), shape)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values.

    With ``compute.cache`` it is given one token at a time, which sees those before it by their keys and values in the
    Flax collection ``cache``.
    """

    shape: BlockShape
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], rotary: Rotary | None, mask: Mask | None
    ) -> Float[Array, "batch tokens width"]:
        width = x.shape[-1]
        heads = self.shape.heads
        head_dim = width // heads
        qkv_axes, out_axes = ("embed", None, "heads", None), ("heads", None, "embed")
        shape = (3, heads, head_dim)
        qkv = self.param("qkv", nn.with_logical_partitioning(self.inits.qkv, qkv_axes), (width, *shape))
        bias_shape = shape if self.shape.key_bias else (2, *shape[1:])
        qkv_bias = bias(self, "qkv_bias", zeros, qkv_axes[1:], bias_shape)
        out = self.param("out", nn.with_logical_partitioning(self.inits.attention_out, out_axes), (*shape[1:], width))
        out_bias = bias(self, "out_bias", zeros, ("embed",), (width,))
        if not self.shape.key_bias:
            qkv_bias = jnp.stack([qkv_bias[0], jnp.zeros_like(qkv_bias[0]), qkv_bias[1]])

        query, key, value = self._project(x, qkv, qkv_bias)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        causal = self.shape.causal
        if self.compute.cache:
            key, value, filled = self._cached(key, value)
            mask, causal = filled if mask is None else filled & mask, False
        mixed = self.compute.attend(query, key, value, causal=causal, mask=mask)
        if self._fused:
            mixed = checkpoint_name(mixed.reshape(x.shape), "kernel_mixed")
        else:
            mixed = checkpoint_name(mixed, "mixed")
        if self.shape.swiglu:
            norm = LayerNorm(self.compute, self.shape.norm_epsilon, name="norm")
            mixed = norm(mixed.reshape(x.shape)).reshape(mixed.shape)
        if self._fused:
            mixed = product("...f,fw->...w", mixed, out.reshape(width, width), self.compute)
        else:
            mixed = product("...hd,hdw->...w", mixed, out, self.compute)
        return add_bias(mixed, out_bias, self.compute)

    @property
    def _fused(self) -> bool:
        return isinstance(self.compute.attend, TPUAttention)

    def _project(
        self, x: Float[Array, "batch tokens width"], qkv: Float[Array, "width 3 heads dim"], bias: Array
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values, [batch, tokens, heads, dim] each.

        The kernel for TPUs reads each as [batch, tokens, width]. Three products write them so; slices of one product
        would be copied, and heads of 64 features as the minor axis would be laid out in another order and copied.
        """
        dtype = self.compute.dtype
        if self._fused:
            width, _, heads, dim = qkv.shape
            parts = (
                add_bias(
                    product("...w,wf->...f", x, qkv[:, part].reshape(width, heads * dim), self.compute),
                    bias[part].reshape(-1),
                    self.compute,
                )
                for part in range(3)
            )
            return tuple(checkpoint_name(part, "kernel_qkv").reshape(*x.shape[:2], heads, dim) for part in parts)
        projected = product("...w,wshd->...shd", x, qkv, self.compute) + bias.astype(dtype)
        projected = checkpoint_name(projected, "qkv")
        return projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]

    def _cached(
        self, key: Float[Array, "batch 1 heads dim"], value: Float[Array, "batch 1 heads dim"]
    ) -> tuple[Array, Array, Mask]:
        """Keys and values of all tokens so far, and which slots of the cache are filled."""
        (batch, _, *rest), length = key.shape, self.compute.cache
        keys, values = (
            self.variable("cache", name, jnp.zeros, (batch, length, *rest), key.dtype) for name in ("key", "value")
        )
        index = self.variable("cache", "index", jnp.zeros, (), jnp.int32)
        keys.value = jax.lax.dynamic_update_slice_in_dim(keys.value, key, index.value, axis=1)
        values.value = jax.lax.dynamic_update_slice_in_dim(values.value, value, index.value, axis=1)
        filled = jnp.arange(length) <= index.value
        index.value = index.value + 1
        return keys.value, values.value, filled[None, None]


class MLP(nn.Module):
    """Two layers with an activation between them; SwiGLU has two first layers, one gating the other, and a norm."""

    shape: BlockShape
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        inner, outer = self.shape.mlp_width, x.shape[-1]
        init, compute = self.inits, self.compute
        up = self.param("up", nn.with_logical_partitioning(init.mlp_up, ("embed", "mlp")), (outer, inner))
        up_bias = bias(self, "up_bias", init.mlp_up_bias, ("mlp",), (inner,))
        down = self.param("down", nn.with_logical_partitioning(init.mlp_down, ("mlp", "embed")), (inner, outer))
        down_bias = bias(self, "down_bias", init.mlp_down_bias, ("embed",), (outer,))
        hidden = add_bias(product("...w,wm->...m", x, up, compute), up_bias, compute)
        if self.shape.swiglu:
            gate = self.param("gate", nn.with_logical_partitioning(init.mlp_up, ("embed", "mlp")), (outer, inner))
            gate_bias = self.param("gate_bias", nn.with_logical_partitioning(init.mlp_up_bias, ("mlp",)), (inner,))
            hidden = nn.silu(add_bias(product("...w,wm->...m", x, gate, compute), gate_bias, compute)) * hidden
            hidden = LayerNorm(compute, self.shape.norm_epsilon, "mlp", name="norm")(hidden)
        else:
            hidden = ACTIVATIONS[self.shape.activation](hidden)
        return add_bias(product("...m,mw->...w", hidden, down, compute), down_bias, compute)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    With ``norm_last`` the norm comes last, ``x + norm(attention(x))``; with ``layer_scale`` each feature of what is
    added has a learned factor. ``rotary`` rotates queries and keys.
    """

    shape: BlockShape
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], rotary: Rotary | None, mask: Mask | None
    ) -> tuple[Array, None]:
        compute, mesh = self.compute, self.compute.mesh
        attention = Attention(self.shape, self.inits, compute, name="attention")
        mlp = MLP(self.shape, self.inits, compute, name="mlp")
        norm_1 = LayerNorm(compute, self.shape.norm_epsilon, name="norm_1")
        norm_2 = LayerNorm(compute, self.shape.norm_epsilon, name="norm_2")
        x = split_rows(x, mesh)
        if self.shape.norm_last:
            x = split_rows(x + norm_1(attention(x, rotary, mask)), mesh)
            x = split_rows(x + norm_2(mlp(x)), mesh)
        else:
            x = split_rows(x + self._scaled("scale_1", attention(split_rows(norm_1(x), mesh), rotary, mask)), mesh)
            x = split_rows(x + self._scaled("scale_2", mlp(split_rows(norm_2(x), mesh))), mesh)
        return x, None

    def _scaled(self, name: str, added: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        if self.shape.layer_scale is None:
            return added
        init = nn.with_logical_partitioning(nn.initializers.constant(self.shape.layer_scale), ("embed",))
        return added * self.param(name, init, added.shape[-1:]).astype(self.compute.dtype)


class Stack(nn.Module):
    """``layers`` blocks whose parameters are stored stacked ``[layers, ...]``, in a loop or unrolled.

    ``Compute.scan`` compiles one block whatever the depth; unrolled, XLA may fuse across blocks. The numbers and the
    parameter tree are the same. ``Compute.remat`` trades compute for activation memory; from the most memory to the
    least:

    none     saves everything                dots     saves the products with weights
    named    saves the attention's (SAVED)   offload  saves the same in the host's memory
    full     saves only the blocks' inputs
    """

    layers: int
    shape: BlockShape
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], rotary: Rotary | None = None, mask: Mask | None = None
    ) -> Float[Array, "batch tokens width"]:
        block = Block
        if self.compute.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.compute.remat])
        stacked = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.layers,
            unroll=1 if self.compute.scan else self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = stacked(self.shape, self.inits, self.compute, name="blocks")(x, rotary, mask)
        return x
