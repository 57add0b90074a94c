"""CLIP's text transformer: causal, pooled at the end-of-text token (Radford et al. 2021, section 2.4)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from clip_jax.models.transformer import LayerNorm, Remat, Stack, normal, text_block_init


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


class TextTransformer(nn.Module):
    """int32[B, L] -> float32[B, embed_dim], not normalised.

    The end-of-text token has the highest id of the vocabulary, so the argmax of a row is its (first) position.
    """

    tower: TextTower
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: Remat = "none"

    @nn.compact
    def __call__(self, text: Int[Array, "batch length"]) -> Float[Array, "batch embed"]:
        tower, width = self.tower, self.tower.width
        embedding_init = nn.with_logical_partitioning(normal(0.02), ("vocab", "embed"))
        embedding = self.param("token_embedding", embedding_init, (tower.vocab_size, width))
        position_init = nn.with_logical_partitioning(normal(0.01), (None, "embed"))
        positions = self.param("position_embedding", position_init, (tower.context_length, width))

        # Looked up before it is rounded: the gradient of a frequent token is a sum that must be taken in float32.
        tokens = jnp.take(embedding, text, axis=0).astype(self.dtype)
        tokens = tokens + positions[: text.shape[1]].astype(self.dtype)
        tokens = Stack(
            tower.layers,
            tower.heads,
            tower.mlp_width,
            tower.activation,
            text_block_init(width, tower.mlp_width, tower.layers),
            causal=True,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
            name="transformer",
        )(tokens)
        end = jnp.argmax(text, axis=-1)
        # Only the pooled row is normed: the norm works on one token at a time.
        pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        pooled = LayerNorm(self.dtype, name="norm_final")(pooled)
        projection_init = nn.with_logical_partitioning(normal(width**-0.5), ("embed", "joint"))
        projection = self.param("projection", projection_init, (width, self.embed_dim))
        return jnp.dot(pooled, projection.astype(self.dtype), preferred_element_type=jnp.float32)
