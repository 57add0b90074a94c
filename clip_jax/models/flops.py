"""How many floating-point operations a model needs: matrix products only, a multiply-add counted as two."""

from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower


def _blocks(tokens: int, tower: ImageTower | TextTower) -> int:
    """Forward FLOPs of all blocks of a tower for one sample."""
    projections = 2 * tokens * tower.width * (4 * tower.width + 2 * tower.mlp_width)
    attention = 2 * 2 * tokens * tokens * tower.width  # logits and their mix of values, unmasked as they are computed
    return tower.layers * (projections + attention)


def forward(architecture: Architecture) -> dict[str, int]:
    """FLOPs of one forward pass for one pair, by tower, without the loss."""
    image, text = architecture.image, architecture.text
    patches = (image.image_size // image.patch_size) ** 2
    patch_embedding = 2 * patches * image.patch_size**2 * 3 * image.width
    return {
        "image": patch_embedding + _blocks(image.tokens, image) + 2 * image.width * architecture.embed_dim,
        "text": _blocks(text.context_length, text) + 2 * text.width * architecture.embed_dim,
    }


def training(architecture: Architecture) -> int:
    """FLOPs of one training pair, forward and backward (three forward passes), without what remat repeats."""
    return 3 * sum(forward(architecture).values())
