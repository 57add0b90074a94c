"""Transformers' ``config.json`` and ``preprocessor_config.json`` <-> a preset: ``CLIPModel``, ``SiglipModel``."""

from typing import Any

from clip_jax.errors import UserError
from clip_jax.interop.huggingface import is_siglip
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import OPENAI, Preprocess, Preset, siglip_image

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""
GEMMA_VOCABULARY = 256_000
"""SigLIP 2's; its folders have the same ``model_type`` as SigLIP's."""

# Transformers' defaults (CLIPTextConfig, ...): published configs often leave out what equals them.
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
    ("clip", "text"): {**_CLIP, **_CLIP_TEXT, "vocab_size": 49408},
    ("clip", "vision"): {**_CLIP, **_CLIP_IMAGE, "image_size": 224},
    ("siglip", "text"): {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64},
    ("siglip", "vision"): {**_SIGLIP, "image_size": 224, "patch_size": 16, "vision_use_head": True},
}


def to_preset(config: dict[str, Any], preprocessor: dict[str, Any] | None, place: str) -> Preset:
    """The preset of a ``config.json`` and a ``preprocessor_config.json``; ``place`` is the former's name in errors."""
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise UserError(
            f"{place}: model_type {kind!r}: CLIPModel (clip) and SiglipModel (siglip) are what is supported"
        )
    # Old configs keep a second, complete dict, which wins in Transformers too.
    text, image = (
        {**DEFAULTS[kind, tower], **(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}
        for tower in ("text", "vision")
    )
    for name, tower in (("text", text), ("vision", image)):
        if tower["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"{place}: {name}_config.hidden_act {tower['hidden_act']!r} is none of {', '.join(ACTIVATIONS)}"
            )
        if tower["layer_norm_eps"] != DEFAULTS[kind, name]["layer_norm_eps"]:
            raise UserError(f"{place}: {name}_config.layer_norm_eps {tower['layer_norm_eps']} is not supported")
    preprocess = _preprocess(preprocessor or {}, place)
    return (_siglip if kind == "siglip" else _clip)(config, text, image, preprocess)


def _clip(config: dict[str, Any], text: dict[str, Any], image: dict[str, Any], preprocess: Preprocess) -> Preset:
    image_tower = ImageTower(image["image_size"], image["patch_size"], **_sizes(image))
    text_tower = TextTower(text["max_position_embeddings"], text["vocab_size"], **_sizes(text))
    return Preset(Architecture(image_tower, text_tower, config.get("projection_dim", 512)), preprocess, "clip")


def _siglip(config: dict[str, Any], text: dict[str, Any], image: dict[str, Any], preprocess: Preprocess) -> Preset:
    del config
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
    """``config.json`` and ``preprocessor_config.json`` of a preset. UserError for what Transformers does not build."""
    architecture = preset.architecture
    text, embed_dim = architecture.text, architecture.embed_dim
    siglip = is_siglip(architecture)
    kind = "siglip" if siglip else "clip"
    text_config = {
        "model_type": f"{kind}_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        **_config(text),
    }
    vision_config = {
        "model_type": f"{kind}_vision_model",
        "image_size": architecture.image.image_size,
        "patch_size": architecture.image.patch_size,
        **_config(architecture.image),
    }
    config = {
        "architectures": ["SiglipModel" if siglip else "CLIPModel"],
        "model_type": kind,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    if siglip:
        text_config["projection_size"] = embed_dim
    else:
        config |= {"projection_dim": embed_dim, "logit_scale_init_value": architecture.init_logit_scale}
        vision_config["projection_dim"] = embed_dim
        # The two highest ids; Transformers pools the first end token, we the first highest id.
        end = {"bos_token_id": text.vocab_size - 2, "eos_token_id": text.vocab_size - 1}
        text_config |= {"projection_dim": embed_dim, **end, "pad_token_id": text.vocab_size - 1}
    return config, _preprocessor(preset)


def _preprocessor(preset: Preset) -> dict[str, Any]:
    size, squash = preset.architecture.image.image_size, preset.preprocess.resize == "squash"
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": size},
        "resample": {name: number for number, name in RESAMPLE.items()}[preset.preprocess.interpolation],
        **({} if squash else {"do_center_crop": True, "crop_size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preset.preprocess.mean),
        "image_std": list(preset.preprocess.std),
    }


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What both towers have."""
    return {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "activation": ACTIVATIONS[config["hidden_act"]],
    }


def _config(tower: ImageTower | TextTower) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[tower.activation],
        "layer_norm_eps": tower.norm_epsilon,
    }


def _preprocess(config: dict[str, Any], place: str) -> Preprocess:
    size = config.get("size", {"shortest_edge": 224})
    resample = config.get("resample", 3)
    if resample not in RESAMPLE:
        raise UserError(f"{place}: preprocessor_config.json: resample {resample} is none of {RESAMPLE}")
    return Preprocess(
        mean=tuple(config.get("image_mean", OPENAI.mean)),
        std=tuple(config.get("image_std", OPENAI.std)),
        resize="squash" if isinstance(size, dict) and "height" in size else "shortest",
        interpolation=RESAMPLE[resample],
    )
