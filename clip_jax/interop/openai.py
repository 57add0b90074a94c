"""OpenAI's archives: which model a state dict is, by its shapes, as OpenAI's own ``build_model`` finds it.

Their names are OpenCLIP's (``open_clip.py``), all their models use QuickGELU, and a head has 64 features.
"""

import dataclasses
import re

from clip_jax.errors import UserError
from clip_jax.interop.state import State
from clip_jax.models.clip import Architecture
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import OPENAI, Preset

HEAD_DIM = 64


def preset(state: State) -> Preset:
    """The preset of OpenAI's weights. Raises UserError where they are not CLIP's."""
    try:
        context_length, text_width = state.shape("positional_embedding")
        vocab_size, _ = state.shape("token_embedding.weight")
        _, embed_dim = state.shape("text_projection")
        text = TextTower(
            context_length,
            vocab_size,
            text_width,
            _layers(state, "transformer.resblocks"),
            text_width // HEAD_DIM,
            state.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
            activation="quick_gelu",
        )
        image = (_resnet if "visual.layer1.0.conv1.weight" in state else _vit)(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"{state.source}: not one of OpenAI's CLIP models ({error}); say which with --model") from error
    return Preset(Architecture(image, text, embed_dim), OPENAI, "clip")


def _vit(state: State) -> ImageTower:
    width, _, patch, _ = state.shape("visual.conv1.weight")
    tokens, _ = state.shape("visual.positional_embedding")
    return ImageTower(
        round((tokens - 1) ** 0.5) * patch,
        patch,
        width,
        _layers(state, "visual.transformer.resblocks"),
        width // HEAD_DIM,
        state.shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
        activation="quick_gelu",
    )


def _resnet(state: State) -> ResNetTower:
    width = state.shape("visual.layer1.0.conv1.weight")[0]
    tokens, features = state.shape("visual.attnpool.positional_embedding")
    stages = tuple(_layers(state, f"visual.layer{stage}") for stage in (1, 2, 3, 4))
    tower = ResNetTower(0, stages, width, features // HEAD_DIM)
    return dataclasses.replace(tower, image_size=round((tokens - 1) ** 0.5) * tower.patch_size)


def _layers(state: State, prefix: str) -> int:
    blocks = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return 1 + max((int(found[1]) for found in map(blocks.match, state) if found), default=-1)
