"""Folders of weights as OpenCLIP and Transformers publish them, of a small model with random weights."""

import json
from functools import cache
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from clip_jax.interop import files, huggingface, huggingface_config, open_clip, open_clip_config
from clip_jax.interop.tensors import from_arrays
from clip_jax.models.clip import CLIP, Architecture, Params
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import OPENAI, Preset

PRESET = Preset(
    Architecture(
        ImageTower(32, 16, 64, 2, 2, 256, activation="quick_gelu"),
        TextTower(77, 49408, 32, 2, 4, 128, activation="quick_gelu"),
        24,
    ),
    OPENAI._replace(resize="squash", interpolation="bilinear"),
    "clip",
)


def parameters(preset: Preset = PRESET, seed: int = 0) -> Params:
    """Our tree as NumPy arrays; norms and biases are random too, so that no two leaves can be confused."""
    return jax.tree.map(lambda leaf: leaf, _parameters(preset, seed))  # a tree of its own for every test


@cache
def _parameters(preset: Preset, seed: int) -> Params:
    shapes = nn.meta.unbox(jax.eval_shape(CLIP(preset.architecture).init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)


def open_clip_folder(folder: Path, preset: Preset = PRESET, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = open_clip.from_params(parameters(preset, seed), preset.architecture)
    files.write_safetensors(folder / "open_clip_model.safetensors", state)
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config.from_preset(preset)))
    return folder


def hugging_face_folder(folder: Path, preset: Preset = PRESET, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = from_arrays("", open_clip.from_params(parameters(preset, seed), preset.architecture))
    files.write_safetensors(folder / "model.safetensors", huggingface.from_open_clip(state, preset.architecture))
    config, preprocessor = huggingface_config.from_preset(preset)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
