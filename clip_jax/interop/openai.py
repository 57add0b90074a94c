"""OpenAI's archives: infers the model from the shapes of its tensors, as OpenAI's own ``build_model`` does.

The tensors have OpenCLIP's names (``open_clip.py``), all models use QuickGELU, and every head has 64 features.
"""

import dataclasses
import re

from clip_jax.errors import UserError
from clip_jax.interop.tensors import Tensors
from clip_jax.models.clip import Architecture
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import OPENAI, Preset

HEAD_DIM = 64


def preset(tensors: Tensors) -> Preset:
    """The preset of OpenAI's weights. Raises UserError for any others."""
    try:
        context_length, text_width = tensors.shape("positional_embedding")
        vocab_size, _ = tensors.shape("token_embedding.weight")
        _, embed_dim = tensors.shape("text_projection")
        text = TextTower(
            context_length,
            vocab_size,
            text_width,
            _layers(tensors, "transformer.resblocks"),
            text_width // HEAD_DIM,
            tensors.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
            activation="quick_gelu",
        )
        image = (_resnet if "visual.layer1.0.conv1.weight" in tensors else _vit)(tensors)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{tensors.source}: not one of OpenAI's CLIP models ({error}); name the model with --model"
        ) from error
    return Preset(Architecture(image, text, embed_dim), OPENAI, "clip")


def _vit(tensors: Tensors) -> ImageTower:
    width, _, patch, _ = tensors.shape("visual.conv1.weight")
    tokens, _ = tensors.shape("visual.positional_embedding")
    return ImageTower(
        round((tokens - 1) ** 0.5) * patch,
        patch,
        width,
        _layers(tensors, "visual.transformer.resblocks"),
        width // HEAD_DIM,
        tensors.shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
        activation="quick_gelu",
    )


def _resnet(tensors: Tensors) -> ResNetTower:
    width = tensors.shape("visual.layer1.0.conv1.weight")[0]
    tokens, features = tensors.shape("visual.attnpool.positional_embedding")
    stages = tuple(_layers(tensors, f"visual.layer{stage}") for stage in (1, 2, 3, 4))
    tower = ResNetTower(0, stages, width, features // HEAD_DIM)
    return dataclasses.replace(tower, image_size=round((tokens - 1) ** 0.5) * tower.patch_size)


def _layers(tensors: Tensors, prefix: str) -> int:
    blocks = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for found in map(blocks.match, tensors) if found), default=-1)
