"""Text transformers.

CLIP's is causal and pooled at the end token (Radford et al. 2021, section 2.4), CoCa's at a class token after it;
CLIPA's and SigLIP's see the whole text and are pooled at the last position. Each difference is a field of
``TextTower``.
"""

from dataclasses import dataclass
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.devices.sharding import gather_features, split_rows
from clip_jax.models import flops
from clip_jax.models.compute import DEFAULT, Compute
from clip_jax.models.norm import LayerNorm
from clip_jax.models.transformer import BlockShape, Stack, normal, text_block_init, zeros


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
    pooling: Literal["argmax", "eos", "first", "last", "class"] = "argmax"
    """The token with the highest id (CLIP's end token), the first ``eos_id``, a fixed position, or a learned class
    token after the text, which does not see padding (CoCa)."""
    eos_id: int | None = None
    norm_epsilon: float = 1e-5
    projection: bool = True
    """Without it the embedding is as wide as the tower."""
    projection_bias: bool = False
    shifted_mask: bool = False
    """Hide the token after each padding instead of the padding: a mistake in OpenCLIP with which its CoCa weights were
    trained (its ``correct_cls_mask`` is the opposite)."""

    @property
    def block(self) -> BlockShape:
        return BlockShape(self.heads, self.mlp_width, self.activation, self.causal, self.norm_epsilon)

    @property
    def tokens(self) -> int:
        """The length of the sequence that the blocks work on."""
        return self.context_length + (self.pooling == "class")

    def module(self, embed_dim: int, compute: Compute) -> "TextTransformer":
        return TextTransformer(self, embed_dim, compute)

    def forward_flops(self, embed_dim: int) -> int:
        """FLOPs of one text's forward pass: matrix products, a multiply-add counted as two."""
        return flops.blocks(self) + (flops.product(self.width, embed_dim) if self.projection else 0)


class TextTransformer(nn.Module):
    """int32[B, L] -> (embeddings float32[B, embed_dim], not normalized; tokens after the last block [B, L, width]).

    A causal tower that is pooled at its end token accepts texts shorter than its context; one that is pooled at the
    last position does not. ``index``: with ``compute.cache``, the number of the one token that is given; its
    predecessors are in the cache, of which it sees those in ``seen``. Then there are no embeddings.
    """

    tower: TextTower
    embed_dim: int
    compute: Compute = DEFAULT

    @nn.compact
    def __call__(
        self,
        text: Int[Array, "batch length"],
        index: Int[Array, ""] | None = None,
        seen: Bool[Array, "batch 1 keys"] | None = None,
    ) -> tuple[Array | None, Array]:
        tower, width = self.tower, self.tower.width
        embedding_init = nn.with_logical_partitioning(normal(0.02), ("vocab", "embed"))
        embedding = self.param("token_embedding", embedding_init, (tower.vocab_size, width))
        position_init = nn.with_logical_partitioning(normal(0.01), (None, "embed"))
        positions = self.param("position_embedding", position_init, (tower.tokens, width))
        if tower.pooling == "class":
            class_init = nn.with_logical_partitioning(normal(0.01), ("embed",))
            class_embedding = self.param("class_embedding", class_init, (width,))

        dtype, mesh = self.compute.dtype, self.compute.mesh
        # The lookup comes before the cast: the gradient of a frequent token is a sum that must be taken in float32.
        tokens = split_rows(jnp.take(gather_features(embedding, mesh), text, axis=0), mesh).astype(dtype)
        inits = text_block_init(width, tower.mlp_width, tower.layers)
        stack = Stack(tower.layers, tower.block, inits, self.compute, name="transformer")
        if index is not None:
            position = jax.lax.dynamic_slice_in_dim(positions, index, 1)
            return None, stack(tokens + position.astype(dtype), None, seen)
        if tower.pooling == "class":
            last = jnp.broadcast_to(class_embedding.astype(dtype), (len(text), 1, width))
            tokens, seen = jnp.concatenate([tokens, last], axis=1), class_mask(text, tower.shifted_mask)[:, None]
        tokens = stack(tokens + positions[: tokens.shape[1]].astype(dtype), None, seen)
        # Only the pooled row is normalized: the norm works on one token at a time.
        pooled = LayerNorm(self.compute, tower.norm_epsilon, name="norm_final")(_pool(tokens, text, tower))
        pooled = split_rows(pooled, mesh)
        if tower.pooling == "class":
            tokens = tokens[:, :-1]
        if not tower.projection:
            return pooled.astype(jnp.float32), tokens
        projection_init = nn.with_logical_partitioning(normal(width**-0.5), ("embed", "joint"))
        projection = self.param("projection", projection_init, (width, self.embed_dim))
        embedding = split_rows(jnp.dot(pooled, projection.astype(dtype), preferred_element_type=jnp.float32), mesh)
        if tower.projection_bias:
            bias_init = nn.with_logical_partitioning(zeros, ("joint",))
            embedding = embedding + self.param("projection_bias", bias_init, (self.embed_dim,))
        return embedding, tokens


def class_mask(text: Int[Array, "batch length"], shifted: bool) -> Bool[Array, "batch length+1"]:
    """True for the tokens that others see, where a class token follows the text: not for padding, whose id is 0.

    ``shifted``: as OpenCLIP computed it for its weights, where the entry of the class token comes first.
    """
    class_token = jnp.ones((len(text), 1), bool)
    parts = [class_token, text != 0] if shifted else [text != 0, class_token]
    return jnp.concatenate(parts, axis=1)


def _pool(
    tokens: Float[Array, "batch length width"], text: Int[Array, "batch length"], tower: TextTower
) -> Float[Array, "batch width"]:
    """The token that stands for the text. CLIP's end token has the highest id: the argmax is its (first) position."""
    if tower.pooling in ("first", "last", "class"):
        return tokens[:, 0 if tower.pooling == "first" else -1]
    end = jnp.argmax(text if tower.pooling == "argmax" else text == tower.eos_id, axis=-1)
    return jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
