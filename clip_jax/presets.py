"""A model's usual name -> architecture, preprocessing and tokenizer: the only place where the three meet.

``ViT-B/32`` and ``ViT-B-32`` are one name and mean exact GELU; the models of the CLIP paper were trained with
QuickGELU and are ``ViT-B/32-quickgelu``. The activation is part of the architecture.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from clip_jax.errors import UserError, nearest
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower


class Preprocess(NamedTuple):
    """How pixels reach the image tower."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str
    """``shortest`` (scale the shorter side, crop the centre) or ``squash`` (both sides), in evaluation."""
    interpolation: str

    def normalize(self, pixels: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch height width 3"]:
        """uint8 -> float32: ``(pixels / 255 - mean) / std``."""
        return (pixels.astype(jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)


class Preset(NamedTuple):
    """What a name stands for."""

    architecture: Architecture
    preprocess: Preprocess
    tokenizer: str
    """``clip`` (byte-pair encoding) or ``sentencepiece`` (trained on the run's own captions)."""


OPENAI = Preprocess(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resize="shortest",
    interpolation="bicubic",
)
HALF = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="shortest", interpolation="bicubic")


def _image(size: int, patch: int, width: int, layers: int, head_dim: int = 64) -> ImageTower:
    return ImageTower(size, patch, width, layers, width // head_dim, 4 * width)


def _text(width: int, layers: int, context: int = 77, vocab: int = 49408, head_dim: int = 64) -> TextTower:
    return TextTower(context, vocab, width, layers, width // head_dim, 4 * width)


def _quickgelu(preset: Preset) -> Preset:
    image, text = preset.architecture.image, preset.architecture.text
    architecture = dataclasses.replace(
        preset.architecture,
        image=dataclasses.replace(image, activation="quick_gelu"),
        text=dataclasses.replace(text, activation="quick_gelu"),
    )
    return preset._replace(architecture=architecture)


# Radford et al. 2021, table 20.
_CLIP = {
    "ViT-B/32": Preset(Architecture(_image(224, 32, 768, 12), _text(512, 12), 512), OPENAI, "clip"),
    "ViT-B/16": Preset(Architecture(_image(224, 16, 768, 12), _text(512, 12), 512), OPENAI, "clip"),
    "ViT-L/14": Preset(Architecture(_image(224, 14, 1024, 24), _text(768, 12), 768), OPENAI, "clip"),
}

# Small models that train in minutes on a CPU.
_SMALL = {
    "ViT-Emoji/16": Preset(Architecture(_image(128, 16, 256, 6), _text(256, 4, context=32), 256), HALF, "clip"),
    "ViT-Shapes/16": Preset(
        Architecture(
            _image(64, 16, 192, 4, head_dim=32), _text(128, 2, context=32, vocab=1024, head_dim=32), embed_dim=128
        ),
        HALF,
        "sentencepiece",
    ),
}

PRESETS = {**_CLIP, **{f"{name}-quickgelu": _quickgelu(preset) for name, preset in _CLIP.items()}, **_SMALL}


def list_models() -> list[str]:
    """The names that ``clip_jax.load`` and ``config.model.name`` know."""
    return list(PRESETS)


def preset(name: str) -> Preset:
    """The preset of a name, with ``-`` for ``/`` accepted; UserError for an unknown one."""
    by_dashes = {known.replace("/", "-"): known for known in PRESETS}
    known = by_dashes.get(name.replace("/", "-"))
    if known is None:
        raise UserError(f"{name}: not a model{nearest(name, PRESETS)}; clip_jax.list_models() lists them")
    return PRESETS[known]


def to_json(preset: Preset) -> dict[str, Any]:
    """A preset as plain values, as a run folder keeps it."""
    return {
        "architecture": dataclasses.asdict(preset.architecture),
        "preprocess": preset.preprocess._asdict(),
        "tokenizer": preset.tokenizer,
    }


def from_json(values: dict[str, Any]) -> Preset:
    """The preset that ``to_json`` wrote."""
    architecture = dict(values["architecture"])
    image, text = ImageTower(**architecture.pop("image")), TextTower(**architecture.pop("text"))
    preprocess = {k: tuple(v) if isinstance(v, list) else v for k, v in values["preprocess"].items()}
    return Preset(Architecture(image, text, **architecture), Preprocess(**preprocess), values["tokenizer"])
