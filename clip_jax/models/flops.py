"""How many floating-point operations a model needs: matrix products only, a multiply-add counted as two."""

from clip_jax.models.clip import Architecture
from clip_jax.models.resnet import EXPANSION, ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower


def _blocks(tokens: int, tower: ImageTower | TextTower) -> int:
    """Forward FLOPs of all blocks of a tower for one sample."""
    layers_of_mlp = 3 if tower.block.swiglu else 2
    projections = 2 * tokens * tower.width * (4 * tower.width + layers_of_mlp * tower.mlp_width)
    attention = 2 * 2 * tokens * tokens * tower.width  # logits and their mix of values, unmasked as they are computed
    return tower.layers * (projections + attention)


def _vit(tower: ImageTower) -> int:
    patch_embedding = 2 * tower.grid**2 * tower.patch_size**2 * 3 * tower.width
    pooling = 0
    if tower.pooling == "attention":  # keys and values of all tokens; the rest for one
        pooling = 2 * tower.width * (2 * tower.tokens * tower.width + 2 * tower.width + 2 * tower.mlp_width)
    return patch_embedding + _blocks(tower.tokens, tower) + pooling


def _resnet(tower: ResNetTower) -> int:
    width, side = tower.width, tower.image_size // 2
    half = width // 2
    flops = 2 * side**2 * 9 * (3 * half + half * half + half * width)
    side, channels = side // 2, width
    for number, blocks in enumerate(tower.stages):
        inner, outer = width * 2**number, EXPANSION * width * 2**number
        for block in range(blocks):
            flops += 2 * side**2 * (channels * inner + 9 * inner * inner)
            if block == 0:
                side = side if number == 0 else side // 2
                flops += 2 * side**2 * channels * outer
            flops += 2 * side**2 * inner * outer
            channels = outer
    tokens = side**2 + 1
    return flops + 2 * channels * (2 * tokens * channels + channels)


def _output(tower: ImageTower | TextTower | ResNetTower, width: int, embed_dim: int) -> int:
    return 0 if not isinstance(tower, ResNetTower) and not tower.projection else 2 * width * embed_dim


def forward(architecture: Architecture) -> dict[str, int]:
    """FLOPs of one forward pass for one pair, by tower, without the loss."""
    image, text, embed_dim = architecture.image, architecture.text, architecture.embed_dim
    image_tower, width = (_resnet, image.features) if isinstance(image, ResNetTower) else (_vit, image.width)
    return {
        "image": image_tower(image) + _output(image, width, embed_dim),
        "text": _blocks(text.context_length, text) + _output(text, text.width, embed_dim),
    }


def training(architecture: Architecture) -> int:
    """FLOPs of one training pair, forward and backward (three forward passes), without what remat repeats."""
    return 3 * sum(forward(architecture).values())
