"""Transformers' ``CLIPModel`` and ``SiglipModel``: names of tensors, ``config.json``, ``preprocessor_config.json``.

SigLIP 2's checkpoints of a fixed resolution are ``SiglipModel`` too.
"""

from typing import Any

from clip_jax.errors import UserError
from clip_jax.interop import rename
from clip_jax.interop.rename import TRANSPOSED, Rule, below, both, layers, same
from clip_jax.interop.state import State
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import OPENAI, Preprocess, Preset

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""


def ignored(name: str) -> bool:
    """Old versions saved the positions 0, 1, 2, ... beside the weights."""
    return name.endswith("embeddings.position_ids")


def to_open_clip(state: State, architecture: Architecture) -> State:
    """``CLIPModel``'s tensors under OpenCLIP's names."""
    return rename.to_open_clip(state, _rules(architecture), ignored)


def from_open_clip(state: State, architecture: Architecture) -> State:
    """OpenCLIP's tensors under ``CLIPModel``'s names."""
    return rename.from_open_clip(state, _rules(architecture))


def _qkv(open_clip: str) -> tuple[Rule, Rule]:
    return tuple(
        Rule(tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv"), (open_clip.format(kind),))
        for kind in ("weight", "bias")
    )


BLOCK = (
    *both("layer_norm1", "ln_1"),
    *_qkv("attn.in_proj_{}"),
    *both("self_attn.out_proj", "attn.out_proj"),
    *both("layer_norm2", "ln_2"),
    *both("mlp.fc1", "mlp.c_fc"),
    *both("mlp.fc2", "mlp.c_proj"),
)

CLIP_IMAGE = (
    same("embeddings.class_embedding", "class_embedding"),
    same("embeddings.patch_embedding.weight", "conv1.weight"),
    same("embeddings.position_embedding.weight", "positional_embedding"),
    *both("pre_layrnorm", "ln_pre"),  # their spelling
    *both("post_layernorm", "ln_post"),
)

TEXT = (
    same("embeddings.token_embedding.weight", "token_embedding.weight"),
    same("embeddings.position_embedding.weight", "positional_embedding"),
    *both("final_layer_norm", "ln_final"),
)


def _rules(architecture: Architecture) -> list[Rule]:
    return [
        *below("vision_model.", "visual.", CLIP_IMAGE),
        *layers(
            architecture.image.layers, "vision_model.encoder.layers.{}.", "visual.transformer.resblocks.{}.", BLOCK
        ),
        same("visual_projection.weight", "visual.proj", TRANSPOSED),
        *below("text_model.", "", TEXT),
        *layers(architecture.text.layers, "text_model.encoder.layers.{}.", "transformer.resblocks.{}.", BLOCK),
        same("text_projection.weight", "text_projection", TRANSPOSED),
        same("logit_scale", "logit_scale"),
    ]


# Transformers' defaults (CLIPTextConfig, CLIPVisionConfig): published configs often leave out what equals them.
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
IMAGE_DEFAULTS = {
    "image_size": 224,
    "patch_size": 32,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def to_preset(config: dict[str, Any], preprocessor: dict[str, Any] | None, place: str) -> Preset:
    """The preset of a ``config.json`` and a ``preprocessor_config.json``; ``place`` is the former's name in errors."""
    if config.get("model_type") != "clip":
        raise UserError(f"{place}: model_type {config.get('model_type')!r}: only CLIPModel (clip) is supported")
    # Old configs keep a second, complete dict, which wins in Transformers too.
    text = {**TEXT_DEFAULTS, **(config.get("text_config") or {}), **(config.get("text_config_dict") or {})}
    image = {**IMAGE_DEFAULTS, **(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    return Preset(
        Architecture(
            ImageTower(image["image_size"], image["patch_size"], **_tower(image, f"{place}: vision_config")),
            TextTower(text["max_position_embeddings"], text["vocab_size"], **_tower(text, f"{place}: text_config")),
            config.get("projection_dim", 512),
        ),
        _preprocess(preprocessor or {}, place),
        "clip",
    )


def from_preset(preset: Preset) -> tuple[dict[str, Any], dict[str, Any]]:
    """``config.json`` and ``preprocessor_config.json`` of a preset."""
    image, text = preset.architecture.image, preset.architecture.text
    embed_dim, size = preset.architecture.embed_dim, image.image_size
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "logit_scale_init_value": preset.architecture.init_logit_scale,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "projection_dim": embed_dim,
            # The two highest ids; Transformers pools the first end token, we the first highest id.
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": text.vocab_size - 1,
            **_tower_config(text),
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "projection_dim": embed_dim,
            **_tower_config(image),
        },
    }
    squash = preset.preprocess.resize == "squash"
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor" if squash else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
        "resample": {name: number for number, name in RESAMPLE.items()}[preset.preprocess.interpolation],
        "do_center_crop": not squash,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preset.preprocess.mean),
        "image_std": list(preset.preprocess.std),
    }
    return config, preprocessor


def _tower(config: dict[str, Any], place: str) -> dict[str, Any]:
    if config["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"{place}: hidden_act {config['hidden_act']!r} is none of {', '.join(ACTIVATIONS)}")
    if config["layer_norm_eps"] != 1e-5:
        raise UserError(f"{place}: layer_norm_eps {config['layer_norm_eps']} is not CLIP's 1e-05")
    return {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "activation": ACTIVATIONS[config["hidden_act"]],
    }


def _tower_config(tower: ImageTower | TextTower) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[tower.activation],
        "layer_norm_eps": 1e-5,
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
