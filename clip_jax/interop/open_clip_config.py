"""``open_clip_config.json`` <-> a preset: OpenCLIP's ``model_cfg`` and ``preprocess_cfg``.

A setting that we do not build is refused by name, unless it has the value that means "off".
"""

import math
from typing import Any

from clip_jax.errors import UserError
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import OPENAI, Preprocess, Preset

# OpenCLIP's defaults (open_clip/model.py: CLIPVisionCfg, CLIPTextCfg) of what we build.
VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0}

# What may be there without changing the model: training settings, and settings at their "off".
NEUTRAL = {
    "patch_dropout": None,
    "output_tokens": None,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "tokenizer_mode": None,
    "pad_id": None,
    "timm_drop": None,
    "timm_drop_path": None,
    "timm_model_pretrained": None,
    "pool_type": ("tok", "argmax"),
    "final_ln_after_pool": (False,),
    "no_ln_pre": (False,),
    "no_causal_mask": (False,),
    "proj_bias": (False,),
    "proj_type": ("linear",),
    "pos_embed_type": ("learnable",),
    "attentional_pool": (False,),
    "ls_init_value": (None,),
    "embed_cls": (False,),
}


def to_preset(config: dict[str, Any], place: str) -> Preset:
    """The preset of an ``open_clip_config.json``; ``place`` is its name in errors."""
    try:
        model, preprocess = config["model_cfg"], config.get("preprocess_cfg", {})
        image = _settings(model["vision_cfg"], VISION, f"{place}: model_cfg.vision_cfg")
        text = _settings(model["text_cfg"], TEXT, f"{place}: model_cfg.text_cfg")
        embed_dim = model["embed_dim"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not a configuration of OpenCLIP ({error!r} is missing)") from error
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return Preset(
        Architecture(
            ImageTower(
                image_size=image["image_size"],
                patch_size=image["patch_size"],
                width=image["width"],
                layers=image["layers"],
                heads=image["width"] // image["head_width"],
                mlp_width=int(image["width"] * image["mlp_ratio"]),
                activation=activation,
            ),
            TextTower(
                context_length=text["context_length"],
                vocab_size=text["vocab_size"],
                width=text["width"],
                layers=text["layers"],
                heads=text["heads"],
                mlp_width=int(text["width"] * text["mlp_ratio"]),
                activation=activation,
            ),
            embed_dim,
        ),
        Preprocess(
            mean=tuple(preprocess.get("mean", OPENAI.mean)),
            std=tuple(preprocess.get("std", OPENAI.std)),
            resize=preprocess.get("resize_mode", "shortest"),
            interpolation=preprocess.get("interpolation", "bicubic"),
        ),
        "clip",
    )


def from_preset(preset: Preset) -> dict[str, Any]:
    """``open_clip_config.json`` of a preset. Raises UserError for what OpenCLIP does not build."""
    image, text = preset.architecture.image, preset.architecture.text
    if image.activation != text.activation or image.activation not in ("gelu", "quick_gelu"):
        raise UserError(
            f"OpenCLIP has one activation for both towers, gelu or quick_gelu; this model has {image.activation} and "
            f"{text.activation}"
        )
    model = {
        "embed_dim": preset.architecture.embed_dim,
        "quick_gelu": image.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": image.image_size,
            "layers": image.layers,
            "width": image.width,
            "head_width": image.width // image.heads,
            "mlp_ratio": _ratio(image.mlp_width, image.width),
            "patch_size": image.patch_size,
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": _ratio(text.mlp_width, text.width),
        },
    }
    preprocess = {
        "mean": list(preset.preprocess.mean),
        "std": list(preset.preprocess.std),
        "interpolation": preset.preprocess.interpolation,
        "resize_mode": preset.preprocess.resize,
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def _settings(given: dict[str, Any], defaults: dict[str, Any], place: str) -> dict[str, Any]:
    for name, value in given.items():
        if name not in defaults and not (name in NEUTRAL and (NEUTRAL[name] is None or value in NEUTRAL[name])):
            raise UserError(f"{place}.{name}={value!r} is not supported")
    return {**defaults, **{name: value for name, value in given.items() if name in defaults}}


def _ratio(mlp_width: int, width: int) -> float:
    """What OpenCLIP multiplies the width with, and cuts off to whole numbers."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)
