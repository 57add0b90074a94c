"""Vision transformers: patches, blocks, pooling, a projection. One module for CLIP, CLIPA, SigLIP and EVA-02-CLIP.

The defaults are CLIP's (Radford et al. 2021, section 2.4). The others differ in how they begin (class token, bias of
the patches, norm), in their blocks, and in how they pool; each difference is a field of ``ImageTower``.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from clip_jax.models.attention import Attend, Rotary, xla
from clip_jax.models.transformer import (
    MLP,
    BlockInit,
    BlockShape,
    LayerNorm,
    Remat,
    Stack,
    image_block_init,
    normal,
    product,
    timm_block_init,
    uniform,
    zeros,
)
from clip_jax.sharding import split_rows

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
    pooling: Literal["class", "average", "attention"] = "class"
    """The class token, the mean of the patches, or a learned query that attends to all (SigLIP's MAP head)."""
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

    @property
    def grid(self) -> int:
        """Patches a side; pixels that fill no patch are cut off."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.grid**2 + self.class_token

    @property
    def from_timm(self) -> bool:
        """OpenCLIP takes the towers of SigLIP and EVA-02 from timm, whose initialisation and names differ."""
        return not self.class_token or not self.key_bias

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


class ViT(nn.Module):
    """float32[B, H, W, 3] (normalised) -> float32[B, embed_dim], not normalised.

    ``patch_dropout`` is the share of patches that training leaves out, others for each image (FLIP, Li et al. 2023);
    it needs ``keys``, one for each image. ``tokens_only`` stops behind the last block: [B, tokens, width].
    """

    tower: ImageTower
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    attend: Attend = xla
    patch_dropout: float = 0.0
    tokens_only: bool = False

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width 3"], train: bool = False, keys: Key[Array, "batch"] | None = None
    ) -> Array:
        tower, width, patch = self.tower, self.tower.width, self.tower.patch_size
        batch = image.shape[0]
        rows, columns = image.shape[1] // patch, image.shape[2] // patch
        image = image[:, : rows * patch, : columns * patch]
        embedding_init = normal(0.02 if tower.from_timm else width**-0.5)

        # A convolution whose stride is its size is a matrix product of unfolded patches, which every backend runs well.
        patches = image.reshape(batch, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, rows * columns, patch * patch * 3).astype(self.dtype)
        fan_in = patch * patch * 3
        kernel_init = nn.with_logical_partitioning(uniform(fan_in**-0.5), (None, "embed"))
        kernel = self.param("patch_embedding", kernel_init, (fan_in, width))
        if tower.class_token:
            class_init = nn.with_logical_partitioning(embedding_init, ("embed",))
            class_embedding = self.param("class_embedding", class_init, (width,))
        position_init = nn.with_logical_partitioning(embedding_init, (None, "embed"))
        positions = self.param("position_embedding", position_init, (tower.tokens, width))

        tokens = product("...p,pw->...w", split_rows(patches), kernel.astype(self.dtype))
        if tower.patch_bias:
            bias_init = nn.with_logical_partitioning(uniform(fan_in**-0.5), ("embed",))
            tokens = tokens + self.param("patch_bias", bias_init, (width,)).astype(self.dtype)
        if tower.class_token:
            first = jnp.broadcast_to(class_embedding.astype(self.dtype), (batch, 1, width))
            tokens = jnp.concatenate([first, tokens], axis=1)
        tokens = tokens + positions.astype(self.dtype)
        rotary = None
        if tower.rotary_grid is not None:
            rotary = rotary_angles(rows, columns, width // tower.heads, tower.rotary_grid, tower.class_token)
        if train and self.patch_dropout > 0:
            tokens, rotary = self._drop(tokens, rotary, keys)
        if tower.norm_pre:
            tokens = LayerNorm(self.dtype, tower.norm_epsilon, name="norm_pre")(tokens)
        inits = timm_block_init() if tower.from_timm else image_block_init(width, tower.mlp_width)
        compute = (self.dtype, self.scan, self.remat, self.attend)
        tokens = Stack(tower.layers, tower.block, inits, *compute, name="transformer")(tokens, rotary)
        if self.tokens_only:
            return tokens
        pooled = split_rows(self._pool(tokens, inits))
        if not tower.projection:
            return pooled.astype(jnp.float32)
        projection_init = nn.with_logical_partitioning(embedding_init, ("embed", "joint"))
        projection = self.param("projection", projection_init, (width, self.embed_dim))
        embedding = split_rows(jnp.dot(pooled, projection.astype(self.dtype), preferred_element_type=jnp.float32))
        if tower.projection_bias:
            bias_init = nn.with_logical_partitioning(zeros, ("joint",))
            embedding = embedding + self.param("projection_bias", bias_init, (self.embed_dim,))
        return embedding

    def _pool(self, tokens: Float[Array, "batch tokens width"], inits: BlockInit) -> Float[Array, "batch width"]:
        """One normed vector an image. The norm works on one token at a time, so the class token is picked first."""
        tower = self.tower
        norm = LayerNorm(self.dtype, tower.norm_epsilon, name="norm_post")
        if tower.pooling == "class":
            return norm(tokens[:, 0])
        if tower.norm_before_pooling:
            tokens = norm(tokens)
        if tower.pooling == "attention":
            pooled = AttentionPooling(tower.block, inits, self.dtype, name="attention_pooling")(tokens)
        else:
            pooled = jnp.mean(tokens[:, int(tower.class_token) :].astype(jnp.float32), axis=1).astype(self.dtype)
        return pooled if tower.norm_before_pooling else norm(pooled)

    def _drop(self, tokens: Float[Array, "batch tokens width"], rotary: Rotary | None, keys: Key[Array, "batch"]):
        """A random subset of the patches of each image, and their rotary angles; the class token always stays.

        Each image draws from a key of its own, so that it loses the same patches whatever it is batched with.
        """
        prefix = int(self.tower.class_token)
        batch, patches = tokens.shape[0], tokens.shape[1] - prefix
        kept = max(1, int(patches * (1 - self.patch_dropout)))
        order = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
        chosen = jax.lax.top_k(order, kept)[1] + prefix
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
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        width, heads, dtype = x.shape[-1], self.shape.heads, self.dtype
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
        projected = product("...w,wshd->...shd", x, key_value.astype(dtype)) + kv_bias.astype(dtype)
        key, value = projected[:, :, 0], projected[:, :, 1]
        logits = jnp.einsum("hd,bkhd->bhk", asked, key, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        mixed = jnp.einsum("bhk,bkhd->bhd", weights, value)
        pooled = jnp.einsum("bhd,hdw->bw", mixed, out.astype(dtype)) + out_bias.astype(dtype)
        normed = LayerNorm(dtype, self.shape.norm_epsilon, name="norm")(pooled)
        return pooled + MLP(self.shape, self.inits, dtype, name="mlp")(normed)


def eva_start(params: dict) -> dict:
    """EVA-02's own start: what writes to the residual stream shrinks with depth, and the projection is almost zero."""
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
    places = np.stack(np.meshgrid(down, across, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = np.repeat((places * bands).reshape(rows * columns, -1), 2, axis=-1)
    if class_token:
        angles = np.concatenate([np.zeros((1, head_dim), np.float32), angles])
    return Rotary(jnp.asarray(np.sin(angles), jnp.float32)[None], jnp.asarray(np.cos(angles), jnp.float32)[None])
