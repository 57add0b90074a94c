"""CLIP's vision transformer: patches, a class token, pre-norm blocks, a projection (Radford et al. 2021, 2.4)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.models.transformer import LayerNorm, Remat, Stack, image_block_init, normal, uniform


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

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class ViT(nn.Module):
    """float32[B, H, W, 3] (normalised) -> float32[B, embed_dim], not normalised."""

    tower: ImageTower
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: Remat = "none"

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"]) -> Float[Array, "batch embed"]:
        tower, width, patch = self.tower, self.tower.width, self.tower.patch_size
        batch = image.shape[0]
        rows, columns = image.shape[1] // patch, image.shape[2] // patch

        # A convolution whose stride is its size is a matrix product of unfolded patches, which every backend runs well.
        patches = image.reshape(batch, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(batch, rows * columns, patch * patch * 3).astype(self.dtype)
        fan_in = patch * patch * 3
        kernel_init = nn.with_logical_partitioning(uniform(fan_in**-0.5), (None, "embed"))
        kernel = self.param("patch_embedding", kernel_init, (fan_in, width))
        class_init = nn.with_logical_partitioning(normal(width**-0.5), ("embed",))
        class_embedding = self.param("class_embedding", class_init, (width,))
        position_init = nn.with_logical_partitioning(normal(width**-0.5), (None, "embed"))
        positions = self.param("position_embedding", position_init, (tower.tokens, width))

        tokens = patches @ kernel.astype(self.dtype)
        first = jnp.broadcast_to(class_embedding.astype(self.dtype), (batch, 1, width))
        tokens = jnp.concatenate([first, tokens], axis=1) + positions.astype(self.dtype)
        tokens = LayerNorm(self.dtype, name="norm_pre")(tokens)
        tokens = Stack(
            tower.layers,
            tower.heads,
            tower.mlp_width,
            tower.activation,
            image_block_init(width, tower.mlp_width),
            causal=False,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
            name="transformer",
        )(tokens)
        pooled = LayerNorm(self.dtype, name="norm_post")(tokens[:, 0])
        projection_init = nn.with_logical_partitioning(normal(width**-0.5), ("embed", "joint"))
        projection = self.param("projection", projection_init, (width, self.embed_dim))
        return jnp.dot(pooled, projection.astype(self.dtype), preferred_element_type=jnp.float32)
