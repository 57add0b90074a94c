"""Transformers' ``config.json`` and ``preprocessor_config.json`` <-> a preset: ``CLIPModel``, ``SiglipModel``."""

from typing import Any

from clip_jax.errors import UserError
from clip_jax.interop import preprocessing
from clip_jax.interop.huggingface import is_siglip
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import Preprocess, Preset, siglip_image

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel"}
ONE_TOWER = {
    "clip_vision_model": ("clip", "vision", "CLIPVisionModelWithProjection"),
    "clip_text_model": ("clip", "text", "CLIPTextModelWithProjection"),
    "siglip_vision_model": ("siglip", "vision", "SiglipVisionModel"),
}
"""Classes with one tower, whose config describes only that tower; the defaults for the other are never used."""
GEMMA_VOCABULARY = 256_000
"""The vocabulary size of SigLIP 2, whose folders have the same ``model_type`` as SigLIP's."""

# Transformers' defaults (CLIPTextConfig, ...): published configs often omit values that equal them.
_TOWER = {"num_hidden_layers": 12}
_CLIP = {**_TOWER, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {
    **_TOWER,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_CLIP_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "max_position_embeddings": 77}
_CLIP_IMAGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32}
DEFAULTS = {
    ("clip", "text"): {**_CLIP, **_CLIP_TEXT, "vocab_size": 49408, "eos_token_id": 49407},
    ("clip", "vision"): {**_CLIP, **_CLIP_IMAGE, "image_size": 224},
    ("siglip", "text"): {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64},
    ("siglip", "vision"): {**_SIGLIP, "image_size": 224, "patch_size": 16, "vision_use_head": True},
}


def to_preset(
    config: dict[str, Any],
    preprocessor: dict[str, Any] | None,
    origin: str,
    preprocessor_origin: str = "preprocessor_config.json",
) -> Preset:
    """The preset of a ``config.json`` and the settings of an image processor; each origin is a name in errors."""
    kind = config.get("model_type")
    if kind in ONE_TOWER:
        kind, tower, name = ONE_TOWER[kind]
        if config.get("architectures", [name]) != [name]:
            raise UserError(f"{origin}: {config['architectures'][0]} has no projection to embeddings; {name} has")
        preprocessor = preprocessor if tower == "vision" else None  # That of a whole model may lie beside its texts'.
        config = {"model_type": kind, f"{tower}_config": config, "projection_dim": config.get("projection_dim", 512)}
    if kind not in ("clip", "siglip"):
        raise UserError(
            f"{origin}: model_type {kind!r} is not supported; CLIPModel (clip) and SiglipModel (siglip) are"
        )
    classes = config.get("architectures") or [CLASSES[kind]]
    if classes[0] != CLASSES[kind]:
        raise UserError(
            f"{origin}: {classes[0]} is not {CLASSES[kind]}: it lacks a tower, or has other parts, so that it cannot "
            "compare images with texts; give the model that it was made from"
        )
    # Old configs have a second, complete dict, which takes precedence in Transformers too.
    text, image = (
        {**DEFAULTS[kind, tower], **(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}
        for tower in ("text", "vision")
    )
    for name, tower in (("text", text), ("vision", image)):
        if tower["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"{origin}: {name}_config.hidden_act {tower['hidden_act']!r} is none of {', '.join(ACTIVATIONS)}"
            )
        if tower["layer_norm_eps"] != DEFAULTS[kind, name]["layer_norm_eps"]:
            raise UserError(f"{origin}: {name}_config.layer_norm_eps {tower['layer_norm_eps']} is not supported")
    for setting, supported in (("num_channels", 3), ("vision_use_head", True)):
        if image.get(setting, supported) != supported:
            raise UserError(f"{origin}: vision_config.{setting} {image[setting]} is not supported")
    family = {"clip": "CLIP", "siglip": "Siglip"}[kind]
    preprocess = preprocessing.from_transformers(preprocessor, family, image["image_size"], preprocessor_origin)
    if kind == "siglip":
        return _siglip(text, image, preprocess)
    return _clip(config, text, image, preprocess, origin)


def _clip(
    config: dict[str, Any], text: dict[str, Any], image: dict[str, Any], preprocess: Preprocess, origin: str
) -> Preset:
    image_tower = ImageTower(image["image_size"], image["patch_size"], **_sizes(image))
    pooling = _end_token(text, origin)
    text_tower = TextTower(text["max_position_embeddings"], text["vocab_size"], **_sizes(text), **pooling)
    return Preset(Architecture(image_tower, text_tower, config.get("projection_dim", 512)), preprocess, "clip")


def _end_token(text: dict[str, Any], origin: str) -> dict[str, Any]:
    """How the text is pooled: at the first end token, which Transformers names by its id.

    The id 2 was a mistake in the configs of OpenAI's models, and means the highest id there too.
    """
    end, vocab_size = text["eos_token_id"], text["vocab_size"]
    if end in (2, vocab_size - 1):
        return {"pooling": "argmax"}
    if not isinstance(end, int) or not 0 <= end < vocab_size:
        raise UserError(
            f"{origin}: text_config.eos_token_id {end!r}, where a text is pooled, is not one of the {vocab_size} ids "
            "of the tower; set it to the end token of the model's tokenizer"
        )
    return {"pooling": "eos", "eos_id": end}


def _siglip(text: dict[str, Any], image: dict[str, Any], preprocess: Preprocess) -> Preset:
    image_tower = siglip_image(image["image_size"], image["patch_size"], **_sizes(image))
    text_tower = TextTower(
        text["max_position_embeddings"],
        text["vocab_size"],
        **_sizes(text),
        causal=False,
        pooling="last",
        norm_epsilon=1e-6,
        projection_bias=True,
    )
    tokenizer = "siglip2" if text["vocab_size"] == GEMMA_VOCABULARY else "siglip"
    embed_dim = text.get("projection_size", image["hidden_size"])
    return Preset(Architecture(image_tower, text_tower, embed_dim, init_logit_bias=-10.0), preprocess, tokenizer)


def from_preset(preset: Preset) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of a preset.

    Raises UserError for a model that Transformers does not implement.
    """
    architecture = preset.architecture
    config = _siglip_config(architecture) if is_siglip(architecture) else _clip_config(architecture)
    return config, _preprocessor(preset)


def _clip_config(architecture: Architecture) -> dict[str, Any]:
    text, projection = architecture.text, {"projection_dim": architecture.embed_dim}
    # Transformers pools the first end token; where clip_jax pools the first highest id, the end token is that one.
    end = text.vocab_size - 1 if text.pooling == "argmax" else text.eos_id
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "text_config": {"model_type": "clip_text_model", **_text_config(text), **projection, **ids},
        "vision_config": {"model_type": "clip_vision_model", **_image_config(architecture.image), **projection},
        **projection,
        "logit_scale_init_value": architecture.init_logit_scale,
    }


def _siglip_config(architecture: Architecture) -> dict[str, Any]:
    projection = {"projection_size": architecture.embed_dim}
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **_text_config(architecture.text), **projection},
        "vision_config": {"model_type": "siglip_vision_model", **_image_config(architecture.image)},
    }


def _preprocessor(preset: Preset) -> dict[str, Any]:
    size, squash = preset.architecture.image.image_size, preset.preprocess.resize == "squash"
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": {name: number for number, name in preprocessing.RESAMPLE.items()}[preset.preprocess.interpolation],
        **({} if squash else {"do_center_crop": True, "crop_size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preset.preprocess.mean),
        "image_std": list(preset.preprocess.std),
    }


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that both towers have."""
    return {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "activation": ACTIVATIONS[config["hidden_act"]],
    }


def _text_config(tower: TextTower) -> dict[str, Any]:
    return {"vocab_size": tower.vocab_size, "max_position_embeddings": tower.context_length, **_tower_config(tower)}


def _image_config(tower: ImageTower) -> dict[str, Any]:
    return {"image_size": tower.image_size, "patch_size": tower.patch_size, **_tower_config(tower)}


def _tower_config(tower: ImageTower | TextTower) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[tower.activation],
        "layer_norm_eps": tower.norm_epsilon,
    }
