"""CLIP's modified ResNet (Radford et al. 2021, section 2.4).

It differs from a ResNet in three ways: a stem of three convolutions, anti-aliased strides (an average pool before each
strided convolution, as in Zhang 2019), and attention pooling instead of an average.

Batch norm sees the global batch: under ``jit`` a mean over a sharded axis is the mean over all devices. The blocks of a
stage after its first one are alike and stored stacked, like those of the transformers.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.devices.sharding import split_rows
from clip_jax.models import flops
from clip_jax.models.compute import DEFAULT, REMAT_POLICIES, Compute
from clip_jax.models.transformer import Initializer, normal, uniform, zeros

EXPANSION = 4
EPSILON = 1e-5
MOMENTUM = 0.1  # PyTorch's: the share of the new batch in the running statistics


@dataclass(frozen=True)
class ResNetTower:
    """The shape of a modified ResNet; ``stages`` are blocks per stage, ``width`` the features of the stem."""

    image_size: int
    stages: tuple[int, int, int, int]
    width: int
    heads: int

    has_batch_norm: ClassVar[bool] = True
    block: ClassVar[None] = None
    """There are no transformer blocks."""

    @property
    def patch_size(self) -> int:
        """Pixels per side that one vector of the last stage stands for."""
        return 32

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """The width of the last stage."""
        return 8 * EXPANSION * self.width

    def module(self, embed_dim: int, compute: Compute) -> "ModifiedResNet":
        return ModifiedResNet(self, embed_dim, compute)

    def adjust_init(self, params: dict) -> dict:
        """Nothing: each layer's own initialization is all."""
        return params

    def forward_flops(self, embed_dim: int) -> int:
        """FLOPs of one image's forward pass: matrix products, a multiply-add counted as two."""
        width, side = self.width, self.image_size // 2
        half = width // 2
        total = flops.product(1, 9 * (3 * half + half * half + half * width), times=side**2)
        side, channels = side // 2, width
        for number, blocks in enumerate(self.stages):
            inner, outer = width * 2**number, EXPANSION * width * 2**number
            for block in range(blocks):
                total += flops.product(1, channels * inner + 9 * inner * inner, times=side**2)
                if block == 0:
                    side = side if number == 0 else side // 2
                    total += flops.product(channels, outer, times=side**2)
                total += flops.product(inner, outer, times=side**2)
                channels = outer
        tokens = side**2 + 1
        pooling = flops.product(channels, channels, times=2 * tokens + 1)
        return total + pooling + flops.product(channels, embed_dim)


class ModifiedResNet(nn.Module):
    """float32[B, H, W, 3] (normalized) -> (embeddings float32[B, embed_dim], not normalized; the last stage's features
    [B, (H/32)(W/32), features]).

    Training normalizes by the batch and returns new running statistics in the collection ``batch_stats``.
    """

    tower: ResNetTower
    embed_dim: int
    compute: Compute = DEFAULT

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"], train: bool = False) -> tuple[Array, Array]:
        width, compute = self.tower.width, self.compute
        x = image.astype(compute.dtype)
        for number, (features, stride) in enumerate([(width // 2, 2), (width // 2, 1), (width, 1)], start=1):
            x = Conv(features, 3, stride, compute.dtype, name=f"conv_{number}")(split_rows(x, compute.mesh))
            x = nn.relu(BatchNorm(compute.dtype, train, name=f"norm_{number}")(split_rows(x, compute.mesh)))
        x = average_pool(x)

        block = Bottleneck
        if compute.remat != "none":
            block = nn.remat(Bottleneck, prevent_cse=False, policy=REMAT_POLICIES[compute.remat])
        for number, blocks in enumerate(self.tower.stages, start=1):
            features, stride = width * 2 ** (number - 1), 1 if number == 1 else 2
            x, _ = block(features, stride, True, compute, train, name=f"stage_{number}_first")(x, None)
            if blocks > 1:
                rest = nn.scan(
                    block,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    length=blocks - 1,
                    unroll=1 if compute.scan else blocks - 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = rest(features, 1, False, compute, train, name=f"stage_{number}_rest")(x, None)
        tokens = x.reshape(x.shape[0], -1, self.tower.features)
        pooling = AttentionPooling(self.tower.heads, self.embed_dim, compute.dtype, name="attention_pooling")
        return pooling(tokens), tokens


class Conv(nn.Module):
    """A square convolution without bias, padded so that only its stride changes the size."""

    features: int
    size: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns features"]:
        channels, pad = x.shape[-1], self.size // 2
        init = nn.with_logical_partitioning(uniform((channels * self.size**2) ** -0.5), (None, None, None, "embed"))
        kernel = self.param("kernel", init, (self.size, self.size, channels, self.features))
        if self.size == 1:
            return x @ kernel[0, 0].astype(self.dtype)
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nn.Module):
    """Batch norm over the global batch, in float32, with PyTorch's running statistics (their variance is unbiased)."""

    dtype: jnp.dtype
    train: bool
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width features"]) -> Float[Array, "batch height width features"]:
        features, count = x.shape[-1], x.size // x.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(self.scale_init, ("embed",)), (features,))
        bias = self.param("bias", nn.with_logical_partitioning(zeros, ("embed",)), (features,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, (features,), jnp.float32)
        x = x.astype(jnp.float32)
        if self.train:
            mean = jnp.mean(x, axis=(0, 1, 2))
            variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
            if not self.is_initializing():
                unbiased = variance * (count / (count - 1))
                running_mean.value = (1 - MOMENTUM) * running_mean.value + MOMENTUM * mean
                running_variance.value = (1 - MOMENTUM) * running_variance.value + MOMENTUM * unbiased
        else:
            mean, variance = running_mean.value, running_variance.value
        return ((x - mean) * jax.lax.rsqrt(variance + EPSILON) * scale + bias).astype(self.dtype)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; a stride is an average pool before the last one."""

    features: int
    stride: int
    project: bool
    """Whether the shortcut has a convolution: it changes the width or the size."""
    compute: Compute
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], _=None) -> tuple[Array, None]:
        dtype, mesh = self.compute.dtype, self.compute.mesh

        def conv_norm(x, features, size, name, scale_init=nn.initializers.ones):
            x = Conv(features, size, 1, dtype, name=f"conv_{name}")(split_rows(x, mesh))
            return BatchNorm(dtype, self.train, scale_init, name=f"norm_{name}")(split_rows(x, mesh))

        pool = average_pool if self.stride > 1 else lambda x: x
        out = nn.relu(conv_norm(x, self.features, 1, "1"))
        out = pool(nn.relu(conv_norm(out, self.features, 3, "2")))
        out = conv_norm(out, EXPANSION * self.features, 1, "3", zeros)  # a block is initialized as its shortcut
        if self.project:
            x = conv_norm(pool(x), EXPANSION * self.features, 1, "shortcut")
        return nn.relu(x + out), None


def average_pool(x: Float[Array, "batch height width features"]) -> Float[Array, "batch rows columns features"]:
    """The mean of each two by two pixels."""
    batch, height, width, features = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2].reshape(batch, height // 2, 2, width // 2, 2, features)
    return jnp.mean(x.astype(jnp.float32), axis=(2, 4)).astype(x.dtype)


class AttentionPooling(nn.Module):
    """The mean token, as the query of one attention over itself and all positions; then a projection."""

    heads: int
    embed_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch embed"]:
        width, dtype, heads = x.shape[-1], self.dtype, self.heads
        head_dim = width // heads
        weight, bias = normal(width**-0.5), uniform(width**-0.5)
        shape = (x.shape[1] + 1, width)
        # Decayed in training as OpenCLIP does it, unlike the position embeddings of the transformers.
        positions = self.param("spatial_embedding", nn.with_logical_partitioning(weight, (None, "embed")), shape)

        def projection(name):
            split = nn.with_logical_partitioning(weight, ("embed", "heads", None))
            kernel = self.param(name, split, (width, heads, head_dim))
            offset = nn.with_logical_partitioning(bias, ("heads", None))
            return kernel.astype(dtype), self.param(f"{name}_bias", offset, (heads, head_dim)).astype(dtype)

        query, query_bias = projection("query")
        key, key_bias = projection("key")
        value, value_bias = projection("value")
        out_init = nn.with_logical_partitioning(weight, ("heads", None, "joint"))
        out = self.param("out", out_init, (heads, head_dim, self.embed_dim))
        out_bias = self.param("out_bias", nn.with_logical_partitioning(bias, ("joint",)), (self.embed_dim,))

        mean = jnp.mean(x.astype(jnp.float32), axis=1, keepdims=True).astype(dtype)
        x = jnp.concatenate([mean, x], axis=1) + positions.astype(dtype)
        queries = jnp.einsum("bw,whd->bhd", x[:, 0], query) + query_bias
        keys = jnp.einsum("btw,whd->bthd", x, key) + key_bias
        values = jnp.einsum("btw,whd->bthd", x, value) + value_bias
        logits = jnp.einsum("bhd,bthd->bht", queries, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
        mixed = jnp.einsum("bht,bthd->bhd", jax.nn.softmax(logits, axis=-1).astype(dtype), values)
        return jnp.einsum("bhd,hde->be", mixed, out.astype(dtype), preferred_element_type=jnp.float32) + out_bias
