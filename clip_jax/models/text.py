"""Text transformers: CLIP's is causal and pooled at the end token (Radford et al. 2021, section 2.4); CLIPA's and
SigLIP's see the whole text and are pooled at the last position. Each difference is a field of ``TextTower``.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.models.attention import Attend, xla
from clip_jax.models.transformer import BlockShape, LayerNorm, Remat, Stack, normal, text_block_init, zeros
from clip_jax.sharding import gather_features, split_rows


@dataclass(frozen=True)
class TextTower:
    """The shape of a text tower; lengths in tokens, widths in features."""

    context_length: int
    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str = "gelu"
    causal: bool = True
    pooling: Literal["argmax", "eos", "first", "last"] = "argmax"
    """The token with the highest id (CLIP's end token), the first ``eos_id``, or a fixed position."""
    eos_id: int | None = None
    norm_epsilon: float = 1e-5
    projection: bool = True
    """Without it the embedding is as wide as the tower."""
    projection_bias: bool = False

    @property
    def block(self) -> BlockShape:
        return BlockShape(self.heads, self.mlp_width, self.activation, self.causal, self.norm_epsilon)


class TextTransformer(nn.Module):
    """int32[B, L] -> float32[B, embed_dim], not normalised.

    ``tokens_only`` stops behind the last block: float32[B, L, width]. A causal tower that is pooled at its end token
    may be given texts shorter than its context; one that is pooled at the last position may not.
    """

    tower: TextTower
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: Remat = "none"
    attend: Attend = xla
    tokens_only: bool = False

    @nn.compact
    def __call__(self, text: Int[Array, "batch length"]) -> Array:
        tower, width = self.tower, self.tower.width
        embedding_init = nn.with_logical_partitioning(normal(0.02), ("vocab", "embed"))
        embedding = self.param("token_embedding", embedding_init, (tower.vocab_size, width))
        position_init = nn.with_logical_partitioning(normal(0.01), (None, "embed"))
        positions = self.param("position_embedding", position_init, (tower.context_length, width))

        # Looked up before it is rounded: the gradient of a frequent token is a sum that must be taken in float32.
        tokens = split_rows(jnp.take(gather_features(embedding), text, axis=0)).astype(self.dtype)
        tokens = tokens + positions[: text.shape[1]].astype(self.dtype)
        inits = text_block_init(width, tower.mlp_width, tower.layers)
        compute = (self.dtype, self.scan, self.remat, self.attend)
        tokens = Stack(tower.layers, tower.block, inits, *compute, name="transformer")(tokens)
        if self.tokens_only:
            return tokens
        # Only the pooled row is normed: the norm works on one token at a time.
        pooled = LayerNorm(self.dtype, tower.norm_epsilon, name="norm_final")(_pick(tokens, text, tower))
        pooled = split_rows(pooled)
        if not tower.projection:
            return pooled.astype(jnp.float32)
        projection_init = nn.with_logical_partitioning(normal(width**-0.5), ("embed", "joint"))
        projection = self.param("projection", projection_init, (width, self.embed_dim))
        embedding = split_rows(jnp.dot(pooled, projection.astype(self.dtype), preferred_element_type=jnp.float32))
        if tower.projection_bias:
            bias_init = nn.with_logical_partitioning(zeros, ("joint",))
            embedding = embedding + self.param("projection_bias", bias_init, (self.embed_dim,))
        return embedding


def _pick(
    tokens: Float[Array, "batch length width"], text: Int[Array, "batch length"], tower: TextTower
) -> Float[Array, "batch width"]:
    """The token that stands for the text. CLIP's end token has the highest id: the argmax is its (first) position."""
    if tower.pooling in ("first", "last"):
        return tokens[:, 0 if tower.pooling == "first" else -1]
    end = jnp.argmax(text if tower.pooling == "argmax" else text == tower.eos_id, axis=-1)
    return jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
