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
from clip_jax.models.decoder import CaptionDecoder
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower


class Preprocess(NamedTuple):
    """How an image becomes the input of the image tower."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str
    """In evaluation: ``shortest`` (scale the shorter side, crop the center) or ``squash`` (scale both sides)."""
    interpolation: str
    exif: bool = False
    """Whether images are turned as their EXIF orientation says. OpenCLIP and Transformers do not turn them."""

    def normalize(self, pixels: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch height width 3"]:
        """uint8 -> float32: ``(pixels / 255 - mean) / std``."""
        return (pixels.astype(jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)


class Preset(NamedTuple):
    """Everything that a model's name decides."""

    architecture: Architecture
    preprocess: Preprocess
    tokenizer: str
    """``clip`` (byte-pair encoding), ``clipa`` (WordPiece), ``siglip``, ``siglip2``, or ``sentencepiece`` (trained on
    the run's own captions); for a foreign model with any other tokenizer, the repository that holds it."""


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5)

OPENAI = Preprocess(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resize="shortest",
    interpolation="bicubic",
)
HALF = Preprocess(HALVES, HALVES, resize="shortest", interpolation="bicubic")
SIGLIP = Preprocess(HALVES, HALVES, resize="squash", interpolation="bicubic")
CLIPA = Preprocess(IMAGENET_MEAN, IMAGENET_STD, resize="squash", interpolation="bilinear")

# OpenCLIP preprocesses images for SigLIP 2 as for SigLIP.
PREPROCESS = {"openai": OPENAI, "siglip": SIGLIP, "siglip2": SIGLIP, "clipa": CLIPA}


def _image(size: int, patch: int, width: int, layers: int, head_dim: int = 64, mlp_ratio: float = 4.0) -> ImageTower:
    return ImageTower(size, patch, width, layers, width // head_dim, int(mlp_ratio * width))


def _text(
    width: int, layers: int, context: int = 77, vocab: int = 49408, head_dim: int = 64, mlp_ratio: float = 4.0
) -> TextTower:
    return TextTower(context, vocab, width, layers, width // head_dim, int(mlp_ratio * width))


def siglip_image(
    size: int, patch: int, width: int, layers: int, heads: int, mlp_width: int, activation: str
) -> ImageTower:
    """SigLIP's image tower (Zhai et al. 2023): no class token, attention pooling, no projection."""
    return ImageTower(
        size,
        patch,
        width,
        layers,
        heads,
        mlp_width,
        activation,
        class_token=False,
        patch_bias=True,
        norm_pre=False,
        norm_epsilon=1e-6,
        pooling="attention",
        norm_before_pooling=True,
        projection=False,
        init="timm",
    )


def eva_image(
    size: int, patch: int, width: int, layers: int, heads: int, mlp_width: int, *, enormous: bool = False
) -> ImageTower:
    """EVA-02-CLIP's image tower (Sun et al. 2023): rotary embeddings, SwiGLU and inner norms.

    The ``enormous`` one (E) has none of these, but norms after attention and MLP.
    """
    return ImageTower(
        size,
        patch,
        width,
        layers,
        heads,
        mlp_width,
        patch_bias=True,
        norm_pre=False,
        norm_epsilon=1e-6,
        projection_bias=True,
        norm_last=enormous,
        swiglu=not enormous,
        key_bias=False,
        rotary_grid=None if enormous else 16,
        init="eva",
    )


def _clip(image: ImageTower | ResNetTower, text: TextTower) -> Preset:
    """A preset whose embeddings are as wide as the text tower, as in most models."""
    return Preset(Architecture(image, text, text.width), OPENAI, "clip")


def _clipa(preset: Preset, size: int) -> Preset:
    """CLIPA (Li et al. 2023): averaged patches; short texts without a causal mask, pooled at the last position."""
    architecture = preset.architecture
    image = dataclasses.replace(architecture.image, image_size=size, norm_pre=False, pooling="average")
    text = dataclasses.replace(architecture.text, context_length=32, vocab_size=32000, causal=False, pooling="last")
    return Preset(Architecture(image, text, architecture.embed_dim), CLIPA, "clipa")


def _siglip(
    image: tuple[int, ...],
    text: tuple[int, ...],
    *,
    version: int = 1,
    context: int = 64,
    vocab: int | None = None,
    image_activation: str = "gelu",
    projection: bool = True,
) -> Preset:
    """``image``: size, patch, width, layers, heads, MLP width; ``text``: width, layers, heads, MLP width.

    The activations are OpenCLIP's. The original models were trained with the tanh approximation throughout, which a
    recipe sets by ``model.activation``.
    """
    width, layers, heads, mlp_width = text
    tower = TextTower(
        context,
        vocab or (32_000 if version == 1 else 256_000),
        width,
        layers,
        heads,
        mlp_width,
        "gelu" if version == 1 else "gelu_tanh",
        causal=False,
        pooling="last",
        norm_epsilon=1e-6,
        projection=projection,
        projection_bias=projection,
    )
    architecture = Architecture(siglip_image(*image, image_activation), tower, image[2], init_logit_bias=-10.0)
    return Preset(architecture, SIGLIP, "siglip" if version == 1 else "siglip2")


def _quickgelu(preset: Preset) -> Preset:
    image, text = preset.architecture.image, preset.architecture.text
    if isinstance(image, ImageTower):  # a ResNet has ReLU in any case
        image = dataclasses.replace(image, activation="quick_gelu")
    text = dataclasses.replace(text, activation="quick_gelu")
    return preset._replace(architecture=dataclasses.replace(preset.architecture, image=image, text=text))


def _resnet(size: int, stages: tuple[int, int, int, int], width: int, text: TextTower, embed_dim: int) -> Preset:
    return Preset(Architecture(ResNetTower(size, stages, width, width // 2), text, embed_dim), OPENAI, "clip")


_TEXT_B, _TEXT_L, _TEXT_H = _text(512, 12), _text(768, 12), _text(1024, 24)
_TEXT_G, _TEXT_E = _text(1280, 32), _text(1280, 36)
_BIG_G = {"head_dim": 104, "mlp_ratio": 4.9231}

# Radford et al. 2021, tables 19 and 20, and OpenCLIP's configurations of the same names.
_CLIP = {
    "RN50": _resnet(224, (3, 4, 6, 3), 64, _TEXT_B, 1024),
    "RN101": _resnet(224, (3, 4, 23, 3), 64, _TEXT_B, 512),
    "RN50x4": _resnet(288, (4, 6, 10, 6), 80, _text(640, 12), 640),
    "RN50x16": _resnet(384, (6, 8, 18, 8), 96, _TEXT_L, 768),
    "RN50x64": _resnet(448, (3, 15, 36, 10), 128, _text(1024, 12), 1024),
    "ViT-B/32": _clip(_image(224, 32, 768, 12), _TEXT_B),
    "ViT-B/32-256": _clip(_image(256, 32, 768, 12), _TEXT_B),
    "ViT-B/16": _clip(_image(224, 16, 768, 12), _TEXT_B),
    "ViT-B/16-plus-240": _clip(_image(240, 16, 896, 12), _text(640, 12)),
    "ViT-L/16": _clip(_image(224, 16, 1024, 24), _TEXT_L),
    "ViT-L/14": _clip(_image(224, 14, 1024, 24), _TEXT_L),
    "ViT-L/14-280": _clip(_image(280, 14, 1024, 24), _TEXT_L),
    "ViT-L/14-336": _clip(_image(336, 14, 1024, 24), _TEXT_L),
    "ViT-H/14": _clip(_image(224, 14, 1280, 32, head_dim=80), _TEXT_H),
    "ViT-H/14-378": _clip(_image(378, 14, 1280, 32, head_dim=80), _TEXT_H),
    "ViT-g/14": _clip(_image(224, 14, 1408, 40, head_dim=88, mlp_ratio=4.3637), _TEXT_H),
    "ViT-bigG/14": _clip(_image(224, 14, 1664, 48, **_BIG_G), _TEXT_G),
}

# OpenCLIP's models without a QuickGELU variant.
_OPEN_CLIP = {
    "ViT-S/32": _clip(_image(224, 32, 384, 12), _text(384, 12)),
    "ViT-S/32-alt": _clip(_image(224, 32, 384, 12), _text(256, 10)),
    "ViT-S/16": _clip(_image(224, 16, 384, 12), _text(384, 12)),
    "ViT-S/16-alt": _clip(_image(224, 16, 384, 12), _text(256, 10)),
    "ViT-M/32": _clip(_image(224, 32, 512, 12), _TEXT_B),
    "ViT-M/16": _clip(_image(224, 16, 512, 12), _TEXT_B),
    "ViT-M/32-alt": _clip(_image(224, 32, 512, 12), _text(384, 12)),
    "ViT-M/16-alt": _clip(dataclasses.replace(_image(224, 16, 512, 12), layer_scale=1e-4), _text(384, 12)),
    "ViT-e/14": _clip(_image(224, 14, 1792, 56, head_dim=112, mlp_ratio=8.5715), _TEXT_E),
}

_CLIPA = {
    f"{name}-CLIPA{suffix}": _clipa(_CLIP[name], size)
    for name in ("ViT-L/14", "ViT-H/14", "ViT-bigG/14")
    for suffix, size in (("", 224), ("-336", 336))
} | {"ViT-L/16-CLIPA": _clipa(_CLIP["ViT-L/16"], 224)}

_B, _L, _SO400M = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)
_TANH = {"image_activation": "gelu_tanh"}

# Zhai et al. 2023 and Tschannen et al. 2025, as OpenCLIP configures them.
_SIGLIP = {
    "ViT-B/16-SigLIP": _siglip((224, 16, *_B), _B),
    "ViT-B/16-SigLIP-256": _siglip((256, 16, *_B), _B),
    "ViT-B/16-SigLIP-384": _siglip((384, 16, *_B), _B),
    "ViT-B/16-SigLIP-512": _siglip((512, 16, *_B), _B),
    "ViT-B/16-SigLIP-i18n-256": _siglip((256, 16, *_B), _B, vocab=250_000),
    "ViT-L/16-SigLIP-256": _siglip((256, 16, *_L), _L),
    "ViT-L/16-SigLIP-384": _siglip((384, 16, *_L), _L),
    "ViT-SO400M/14-SigLIP": _siglip((224, 14, *_SO400M), _SO400M, context=16),
    "ViT-SO400M/14-SigLIP-378": _siglip((378, 14, *_SO400M), _SO400M),
    "ViT-SO400M/14-SigLIP-384": _siglip((384, 14, *_SO400M), _SO400M),
    "ViT-SO400M/16-SigLIP-i18n-256": _siglip((256, 16, *_SO400M), _SO400M, vocab=250_000, projection=False, **_TANH),
    "ViT-B/32-SigLIP2-256": _siglip((256, 32, *_B), _B, version=2, **_TANH),
    "ViT-B/16-SigLIP2": _siglip((224, 16, *_B), _B, version=2),
    "ViT-B/16-SigLIP2-256": _siglip((256, 16, *_B), _B, version=2),
    "ViT-B/16-SigLIP2-384": _siglip((384, 16, *_B), _B, version=2),
    "ViT-B/16-SigLIP2-512": _siglip((512, 16, *_B), _B, version=2),
    "ViT-L/16-SigLIP2-256": _siglip((256, 16, *_L), _L, version=2),
    "ViT-L/16-SigLIP2-384": _siglip((384, 16, *_L), _L, version=2),
    "ViT-L/16-SigLIP2-512": _siglip((512, 16, *_L), _L, version=2, **_TANH),
    "ViT-SO400M/14-SigLIP2": _siglip((224, 14, *_SO400M), _SO400M, version=2),
    "ViT-SO400M/14-SigLIP2-378": _siglip((378, 14, *_SO400M), _SO400M, version=2),
    "ViT-SO400M/16-SigLIP2-256": _siglip((256, 16, *_SO400M), _SO400M, version=2, **_TANH),
    "ViT-SO400M/16-SigLIP2-384": _siglip((384, 16, *_SO400M), _SO400M, version=2, **_TANH),
    "ViT-SO400M/16-SigLIP2-512": _siglip((512, 16, *_SO400M), _SO400M, version=2, **_TANH),
    "ViT-gopt/16-SigLIP2-256": _siglip((256, 16, 1536, 40, 16, 6144), _SO400M, version=2, **_TANH),
    "ViT-gopt/16-SigLIP2-384": _siglip((384, 16, 1536, 40, 16, 6144), _SO400M, version=2, **_TANH),
}


def _eva(image: ImageTower, text: TextTower, embed_dim: int) -> Preset:
    return Preset(Architecture(image, text, embed_dim), OPENAI, "clip")


_EVA_E = eva_image(224, 14, 1792, 64, 16, 15360, enormous=True)

_EVA = {
    "EVA02-B/16": _eva(eva_image(224, 16, 768, 12, 12, 2048), _TEXT_B, 512),
    "EVA02-L/14": _eva(eva_image(224, 14, 1024, 24, 16, 2730), _TEXT_L, 768),
    "EVA02-L/14-336": _eva(eva_image(336, 14, 1024, 24, 16, 2730), _TEXT_L, 768),
    "EVA02-E/14": _eva(_EVA_E, _TEXT_H, 1024),
    "EVA02-E/14-plus": _eva(_EVA_E, _TEXT_G, 1024),
}


def _coca(image: ImageTower, text: TextTower, embed_dim: int) -> Preset:
    """A model with a decoder of the text tower's sizes, and with the mask of OpenCLIP's published weights."""
    text = dataclasses.replace(text, pooling="class", shifted_mask=True)
    decoder = CaptionDecoder(
        form="coca",
        length=text.context_length - 1,
        vocab_size=text.vocab_size,
        width=text.width,
        layers=text.layers,
        heads=text.heads,
        mlp_width=text.mlp_width,
        activation=text.activation,
    )
    return Preset(Architecture(image, text, embed_dim, decoder=decoder), OPENAI, "clip")


# Yu et al. 2022, as OpenCLIP configures it.
_COCA = {
    "coca_ViT-B/32": _coca(
        dataclasses.replace(_image(224, 32, 768, 12), pooling="queries"), _text(512, 12, context=76), 512
    ),
    "coca_ViT-L/14": _coca(
        dataclasses.replace(_image(224, 14, 1024, 24), pooling="queries"), _text(768, 12, context=76), 768
    ),
    "coca_base": _coca(_image(288, 18, 768, 12), _text(768, 12, context=76, vocab=64_000), 512),
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

PRESETS = {
    **_CLIP,
    **{f"{name}-quickgelu": _quickgelu(preset) for name, preset in _CLIP.items()},
    **_OPEN_CLIP,
    **_CLIPA,
    **_SIGLIP,
    **_EVA,
    **_COCA,
    **_SMALL,
}


def list_models() -> list[str]:
    """The names that ``clip_jax.load`` and ``config.model.name`` accept."""
    return list(PRESETS)


def preset(name: str) -> Preset:
    """The preset of a name; accepts ``-`` for ``/`` and OpenAI's ``@336px``. Raises UserError for an unknown name."""
    by_dashes = {known.replace("/", "-"): known for known in PRESETS}
    known = by_dashes.get(name.replace("/", "-").replace("@336px", "-336"))
    if known is None:
        raise UserError(f"{name}: not a model{nearest(name, PRESETS)}; clip_jax.list_models() lists them")
    return PRESETS[known]


def to_json(preset: Preset) -> dict[str, Any]:
    """A preset as plain values, as ``run.json`` stores it."""
    return {
        "architecture": dataclasses.asdict(preset.architecture),
        "preprocess": preset.preprocess._asdict(),
        "tokenizer": preset.tokenizer,
    }


def from_json(values: dict[str, Any]) -> Preset:
    """The preset that ``to_json`` wrote."""
    architecture = dict(values["architecture"])
    image, text = architecture.pop("image"), TextTower(**architecture.pop("text"))
    if "stages" in image:
        image = ResNetTower(**image | {"stages": tuple(image["stages"])})
    else:
        image = ImageTower(**{"init": _unsaved_init(image)} | image)
    if architecture.get("decoder") is not None:
        architecture["decoder"] = CaptionDecoder(**architecture["decoder"])
    preprocess = {k: tuple(v) if isinstance(v, list) else v for k, v in values["preprocess"].items()}
    return Preset(Architecture(image, text, **architecture), Preprocess(**preprocess), values["tokenizer"])


def _unsaved_init(image: dict[str, Any]) -> str:
    """``ImageTower.init`` of a run folder from before that field, when the shape of the tower decided it."""
    if not image.get("key_bias", True):
        return "eva"
    return "clip" if image.get("class_token", True) else "timm"
