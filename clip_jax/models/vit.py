"""Vision transformers: patches, blocks, pooling, a projection. One module for CLIP, CLIPA, SigLIP and EVA-02-CLIP.

The defaults are CLIP's (Radford et al. 2021, section 2.4). The others differ in how they begin (class token, bias of
the patches, norm), in their blocks, and in how they pool; each difference is a field of ``ImageTower``.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from clip_jax.devices.sharding import split_rows
from clip_jax.models import flops
from clip_jax.models.attention import Rotary
from clip_jax.models.compute import DEFAULT, Compute
from clip_jax.models.cross_attention import QueryPooling
from clip_jax.models.linear import product
from clip_jax.models.norm import LayerNorm
from clip_jax.models.transformer import (
    MLP,
    BlockInit,
    BlockShape,
    Stack,
    image_block_init,
    normal,
    timm_block_init,
    uniform,
    zeros,
)

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class ImageTower:
    """The shape of an image tower; sizes in pixels, widths in features."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    class_token: bool = True
    patch_bias: bool = False
    norm_pre: bool = True
    norm_epsilon: float = 1e-5
    pooling: Literal["class", "average", "attention", "queries"] = "class"
    """The class token, the mean of the patches, a learned query that attends to all (SigLIP's MAP head), or the first
    of several such ``queries``, the others of which a decoder sees (CoCa)."""
    norm_before_pooling: bool = False
    projection: bool = True
    """Without it the embedding is as wide as the tower."""
    projection_bias: bool = False
    norm_last: bool = False
    swiglu: bool = False
    key_bias: bool = True
    rotary_grid: int | None = None
    """Rotary position embeddings, whose grid of any size is spread over this many patches a side (EVA-02: 16)."""
    layer_scale: float | None = None
    """Where the learned factors of what each block adds begin (OpenCLIP's M/16-alt: 1e-4); None: there are none."""
    init: Literal["clip", "timm", "eva"] = "clip"
    """How parameters are initialized: as the CLIP paper's code, as timm's ViTs (SigLIP), or as EVA-02."""
    queries: int = 256
    query_heads: int = 8

    has_batch_norm: ClassVar[bool] = False

    @property
    def grid(self) -> int:
        """Patches per side; pixels that fill no patch are cut off."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """The length of the sequence that the blocks work on: patches and the class token."""
        return self.grid**2 + self.class_token

    def module(self, embed_dim: int, compute: Compute) -> "ViT":
        return ViT(self, embed_dim, compute)

    def dropping(self, patch_dropout: float) -> "ImageTower":
        """The tower as it trains without this share of the patches, for counting its work."""
        return _ShortenedTower(**{f.name: getattr(self, f.name) for f in fields(self)}, patch_dropout=patch_dropout)

    def stored(self) -> "ImageTower":
        """The tower as it trains where its embeddings are read from a disk, for counting its work."""
        return _StoredTower(**{f.name: getattr(self, f.name) for f in fields(self)})

    def adjust_init(self, params: dict) -> dict:
        """What an initialization does to the whole tower after each layer's own."""
        return eva_init(params) if self.init == "eva" else params

    def forward_flops(self, embed_dim: int) -> int:
        """FLOPs of one image's forward pass: matrix products, a multiply-add counted as two."""
        patches = flops.product(self.patch_size**2 * 3, self.width, times=self.grid**2)
        pooling = 0
        if self.pooling == "attention":  # keys and values of all tokens; the rest for one query
            keys_and_values = flops.product(self.width, 2 * self.width, times=self.tokens)
            pooling = keys_and_values + flops.product(self.width, 2 * self.width + 2 * self.mlp_width)
        if self.pooling == "queries":
            pooling = flops.product(self.width, 2 * embed_dim, times=self.tokens)
            pooling += flops.product(embed_dim, 2 * embed_dim + 2 * self.tokens, times=self.queries)
        pooled_width = embed_dim if self.pooling == "queries" else self.width
        projection = flops.product(pooled_width, embed_dim) if self.projection else 0
        return patches + flops.blocks(self) + pooling + projection

    @property
    def block(self) -> BlockShape:
        return BlockShape(
            self.heads,
            self.mlp_width,
            self.activation,
            norm_epsilon=self.norm_epsilon,
            norm_last=self.norm_last,
            swiglu=self.swiglu,
            key_bias=self.key_bias,
            layer_scale=self.layer_scale,
        )


@dataclass(frozen=True)
class _ShortenedTower(ImageTower):
    patch_dropout: float = 0.0

    @property
    def tokens(self) -> int:
        return remaining_patches(self.grid**2, self.patch_dropout) + self.class_token


@dataclass(frozen=True)
class _StoredTower(ImageTower):
    tokens: ClassVar[int] = 0

    def forward_flops(self, embed_dim: int) -> int:
        return 0


class ViT(nn.Module):
    """float32[B, H, W, 3] (normalized) -> (embeddings float32[B, embed_dim], tokens [B, tokens, width]).

    The embeddings are not of unit length; the tokens are those after the last block, the class token first. Where the
    tower pools by ``queries``, the tokens are the pooled ones after the first, unless ``unpooled``.
    """

    tower: ImageTower
    embed_dim: int
    compute: Compute = DEFAULT
    unpooled: bool = False

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "batch height width 3"],
        train: bool = False,
        keys: Key[Array, "batch"] | None = None,
        patch_dropout: float = 0.0,
        masked: Bool[Array, "batch patches"] | None = None,
        mask_embedding: Float[Array, "width"] | None = None,
    ) -> tuple[Array, Array]:
        """Training with ``patch_dropout``, the share of patches that each image loses, needs one key per image (FLIP,
        Li et al. 2023). ``mask_embedding`` replaces the embedding of each ``masked`` patch; its position stays."""
        tower, width, patch = self.tower, self.tower.width, self.tower.patch_size
        dtype, mesh = self.compute.dtype, self.compute.mesh
        batch = image.shape[0]
        rows, columns = image.shape[1] // patch, image.shape[2] // patch
        image = image[:, : rows * patch, : columns * patch]
        embedding_init = normal(width**-0.5 if tower.init == "clip" else 0.02)

        # A convolution whose stride is its size is a matrix product of unfolded patches, which every backend runs well.
        patches = image.reshape(batch, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, rows * columns, patch * patch * 3).astype(dtype)
        fan_in = patch * patch * 3
        kernel_init = nn.with_logical_partitioning(uniform(fan_in**-0.5), (None, "embed"))
        kernel = self.param("patch_embedding", kernel_init, (fan_in, width))
        if tower.class_token:
            class_init = nn.with_logical_partitioning(embedding_init, ("embed",))
            class_embedding = self.param("class_embedding", class_init, (width,))
        position_init = nn.with_logical_partitioning(embedding_init, (None, "embed"))
        positions = self.param("position_embedding", position_init, (tower.tokens, width))

        tokens = product("...p,pw->...w", split_rows(patches, mesh), kernel, self.compute)
        if tower.patch_bias:
            bias_init = nn.with_logical_partitioning(uniform(fan_in**-0.5), ("embed",))
            tokens = tokens + self.param("patch_bias", bias_init, (width,)).astype(dtype)
        if masked is not None:
            tokens = jnp.where(masked[..., None], mask_embedding.astype(dtype), tokens)
        if tower.class_token:
            first = jnp.broadcast_to(class_embedding.astype(dtype), (batch, 1, width))
            tokens = jnp.concatenate([first, tokens], axis=1)
        tokens = tokens + positions.astype(dtype)
        rotary = None
        if tower.rotary_grid is not None:
            rotary = rotary_angles(rows, columns, width // tower.heads, tower.rotary_grid, tower.class_token)
        if train and patch_dropout > 0:
            tokens, rotary = drop_patches(tokens, rotary, keys, patch_dropout, class_token=tower.class_token)
        if tower.norm_pre:
            tokens = LayerNorm(self.compute, tower.norm_epsilon, name="norm_pre")(tokens)
        inits = image_block_init(width, tower.mlp_width) if tower.init == "clip" else timm_block_init()
        tokens = Stack(tower.layers, tower.block, inits, self.compute, name="transformer")(tokens, rotary)
        if tower.pooling == "queries":
            pooling = QueryPooling(tower.queries, self.embed_dim, tower.query_heads, self.compute, name="query_pooling")
            queries = pooling(tokens)
            pooled, tokens = queries[:, 0], tokens if self.unpooled else queries[:, 1:]
        else:
            pooled = self._pool(tokens, inits)
        pooled = split_rows(pooled, mesh)
        if not tower.projection:
            return pooled.astype(jnp.float32), tokens
        projection_init = nn.with_logical_partitioning(embedding_init, ("embed", "joint"))
        projection = self.param("projection", projection_init, (pooled.shape[-1], self.embed_dim))
        embedding = split_rows(jnp.dot(pooled, projection.astype(dtype), preferred_element_type=jnp.float32), mesh)
        if tower.projection_bias:
            bias_init = nn.with_logical_partitioning(zeros, ("joint",))
            embedding = embedding + self.param("projection_bias", bias_init, (self.embed_dim,))
        return embedding, tokens

    def _pool(self, tokens: Float[Array, "batch tokens width"], inits: BlockInit) -> Float[Array, "batch width"]:
        """One vector per image. The norm works on one token at a time, so the class token is selected before it."""
        tower, dtype = self.tower, self.compute.dtype
        norm = LayerNorm(self.compute, tower.norm_epsilon, name="norm_post")
        if tower.pooling == "class":
            return norm(tokens[:, 0])
        if tower.norm_before_pooling:
            tokens = norm(tokens)
        if tower.pooling == "attention":
            pooled = AttentionPooling(tower.block, inits, self.compute, name="attention_pooling")(tokens)
        else:
            pooled = jnp.mean(tokens[:, int(tower.class_token) :].astype(jnp.float32), axis=1).astype(dtype)
        return pooled if tower.norm_before_pooling else norm(pooled)


def remaining_patches(patches: int, rate: float) -> int:
    """How many patches of an image training keeps."""
    return max(1, int(patches * (1 - rate)))


def drop_patches(
    tokens: Float[Array, "batch tokens width"],
    rotary: Rotary | None,
    keys: Key[Array, "batch"],
    rate: float,
    *,
    class_token: bool,
) -> tuple[Float[Array, "batch remaining width"], Rotary | None]:
    """A random subset of the patches of each image, with their rotary angles; the class token always stays.

    Each image draws from its own key, so that it loses the same patches whatever it is batched with.
    """
    prefix = int(class_token)
    batch, patches = tokens.shape[0], tokens.shape[1] - prefix
    remaining = remaining_patches(patches, rate)
    order = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    chosen = jax.lax.top_k(order, remaining)[1] + prefix
    first = jnp.zeros((batch, prefix), chosen.dtype)
    chosen = jnp.concatenate([first, chosen], axis=1)[:, :, None]
    tokens = jnp.take_along_axis(tokens, chosen, axis=1)
    if rotary is not None:
        rotary = Rotary(*(jnp.take_along_axis(angles, chosen, axis=1) for angles in rotary))
    return tokens, rotary


class AttentionPooling(nn.Module):
    """A learned query attends to all tokens; then a residual MLP (the MAP head of Zhai et al. 2022 and SigLIP)."""

    shape: BlockShape
    inits: BlockInit
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        width, heads, dtype = x.shape[-1], self.shape.heads, self.compute.dtype
        head_dim = width // heads
        split, split_bias = ("embed", "heads", None), ("heads", None)
        qkv, out = self.inits.qkv, self.inits.attention_out
        probe_init = nn.with_logical_partitioning(truncated_normal(width**-0.5), ("embed",))
        probe = self.param("probe", probe_init, (width,))
        query = self.param("query", nn.with_logical_partitioning(qkv, split), (width, heads, head_dim))
        query_bias = self.param("query_bias", nn.with_logical_partitioning(zeros, split_bias), (heads, head_dim))
        both, both_bias = ("embed", None, "heads", None), (None, "heads", None)
        key_value = self.param("key_value", nn.with_logical_partitioning(qkv, both), (width, 2, heads, head_dim))
        kv_bias = self.param("key_value_bias", nn.with_logical_partitioning(zeros, both_bias), (2, heads, head_dim))
        out_init = nn.with_logical_partitioning(out, ("heads", None, "embed"))
        out = self.param("out", out_init, (heads, head_dim, width))
        out_bias = self.param("out_bias", nn.with_logical_partitioning(zeros, ("embed",)), (width,))

        asked = jnp.einsum("w,whd->hd", probe.astype(dtype), query.astype(dtype)) + query_bias.astype(dtype)
        projected = product("...w,wshd->...shd", x, key_value, self.compute) + kv_bias.astype(dtype)
        key, value = projected[:, :, 0], projected[:, :, 1]
        logits = jnp.einsum("hd,bkhd->bhk", asked, key, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        mixed = jnp.einsum("bhk,bkhd->bhd", weights, value)
        pooled = jnp.einsum("bhd,hdw->bw", mixed, out.astype(dtype)) + out_bias.astype(dtype)
        normed = LayerNorm(self.compute, self.shape.norm_epsilon, name="norm")(pooled)
        return pooled + MLP(self.shape, self.inits, self.compute, name="mlp")(normed)


def eva_init(params: dict) -> dict:
    """EVA-02's own: layers that write to the residual stream shrink with depth, and the projection is near zero."""
    blocks = params["transformer"]["blocks"]

    def shrink(kernel):
        depth = jnp.arange(1, kernel.shape[0] + 1, dtype=jnp.float32).reshape(-1, *(1,) * (kernel.ndim - 1))
        return kernel / jnp.sqrt(2 * depth)

    shrunk = {
        "attention": blocks["attention"] | {"out": jax.tree.map(shrink, blocks["attention"]["out"])},
        "mlp": blocks["mlp"] | {"down": jax.tree.map(shrink, blocks["mlp"]["down"])},
    }
    projection = jax.tree.map(lambda kernel: 0.001 * kernel, params["projection"])
    return params | {"transformer": {"blocks": blocks | shrunk}, "projection": projection}


def truncated_normal(stddev: float):
    """N(0, stddev) cut off at two standard deviations, and not widened again (timm's ``trunc_normal_tf_``)."""
    return lambda rng, shape, dtype=jnp.float32: stddev * jax.random.truncated_normal(rng, -2.0, 2.0, shape, dtype)


def rotary_angles(rows: int, columns: int, head_dim: int, reference: int, class_token: bool) -> Rotary:
    """Axial rotary embeddings: half of the features turn with the row, half with the column (Fang et al. 2023).

    A grid of any size is stretched to ``reference`` patches a side, the size that was pretrained. The class token
    does not turn.
    """
    bands = ROTARY_BASE ** -(np.arange(head_dim // 4, dtype=np.float32) / (head_dim // 4))
    down = np.arange(rows, dtype=np.float32) / rows * reference
    across = np.arange(columns, dtype=np.float32) / columns * reference
    coordinates = np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = np.repeat((coordinates * bands).reshape(rows * columns, -1), 2, axis=-1)
    if class_token:
        angles = np.concatenate([np.zeros((1, head_dim), np.float32), angles])
    return Rotary(jnp.asarray(np.sin(angles), jnp.float32)[None], jnp.asarray(np.cos(angles), jnp.float32)[None])
