"""CLIP's modified ResNet (Radford et al. 2021, section 2.4): three convolutions as stem, anti-aliased strides (an
average pool in front of each strided convolution, as in Zhang 2019), and attention pooling instead of an average.

Batch norm sees the global batch: under ``jit`` a mean over a sharded axis is the mean over all devices. The blocks of
a stage behind its first one are alike and stored stacked, as those of the transformers are.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.transformer import REMAT_POLICIES, Initializer, Remat, normal, uniform, zeros
from clip_jax.sharding import split_rows

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

    @property
    def patch_size(self) -> int:
        """Pixels a side that one vector of the last stage stands for."""
        return 32

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def features(self) -> int:
        """The width of the last stage."""
        return 8 * EXPANSION * self.width


class ModifiedResNet(nn.Module):
    """float32[B, H, W, 3] (normalised) -> float32[B, embed_dim], not normalised.

    Training normalises by the batch and returns new running statistics in the collection ``batch_stats``.
    ``tokens_only`` stops behind the last stage: float32[B, (H/32)(W/32), features].
    """

    tower: ResNetTower
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    tokens_only: bool = False

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"], train: bool = False) -> Array:
        width = self.tower.width
        x = image.astype(self.dtype)
        for number, (features, stride) in enumerate([(width // 2, 2), (width // 2, 1), (width, 1)], start=1):
            x = split_rows(Conv(features, 3, stride, self.dtype, name=f"conv_{number}")(split_rows(x)))
            x = nn.relu(BatchNorm(self.dtype, train, name=f"norm_{number}")(x))
        x = average_pool(x)

        block = Bottleneck
        if self.remat != "none":
            block = nn.remat(Bottleneck, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        for number, blocks in enumerate(self.tower.stages, start=1):
            features, stride = width * 2 ** (number - 1), 1 if number == 1 else 2
            x, _ = block(features, stride, True, self.dtype, train, name=f"stage_{number}_first")(x, None)
            if blocks > 1:
                rest = nn.scan(
                    block,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    length=blocks - 1,
                    unroll=1 if self.scan else blocks - 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = rest(features, 1, False, self.dtype, train, name=f"stage_{number}_rest")(x, None)
        tokens = x.reshape(x.shape[0], -1, self.tower.features)
        if self.tokens_only:
            return tokens
        return AttentionPooling(self.tower.heads, self.embed_dim, self.dtype, name="attention_pooling")(tokens)


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
    """1x1, 3x3, 1x1 convolutions beside a shortcut; a stride is an average pool in front of the last one."""

    features: int
    stride: int
    project: bool
    """Whether the shortcut has a convolution: it changes the width or the size."""
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"], _=None) -> tuple[Array, None]:
        def conv_norm(x, features, size, name, scale_init=nn.initializers.ones):
            x = split_rows(Conv(features, size, 1, self.dtype, name=f"conv_{name}")(split_rows(x)))
            return BatchNorm(self.dtype, self.train, scale_init, name=f"norm_{name}")(x)

        pool = average_pool if self.stride > 1 else lambda x: x
        out = nn.relu(conv_norm(x, self.features, 1, "1"))
        out = pool(nn.relu(conv_norm(out, self.features, 3, "2")))
        out = conv_norm(out, EXPANSION * self.features, 1, "3", zeros)  # a block starts as its shortcut
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
