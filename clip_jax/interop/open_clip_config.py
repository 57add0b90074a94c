"""``open_clip_config.json`` <-> a preset: OpenCLIP's ``model_cfg`` and ``preprocess_cfg``.

A setting that clip_jax does not implement is refused by name, unless its value turns it off.
"""

import dataclasses
import math
from typing import Any

from clip_jax.data.tokenizers import cleaning
from clip_jax.errors import UserError
from clip_jax.interop import preprocessing
from clip_jax.interop.open_clip import has_text_prefix, is_timm
from clip_jax.models.clip import Architecture
from clip_jax.models.decoder import CaptionDecoder
from clip_jax.models.resnet import ResNetTower
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower
from clip_jax.presets import PRESETS, Preset

# OpenCLIP's defaults (open_clip/model.py: CLIPVisionCfg, CLIPTextCfg) of the settings that clip_jax implements.
VISION = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "no_ln_pre": False,
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "timm_model_name": None,
    "ls_init_value": None,
    "attentional_pool": False,
    "attn_pooler_queries": 256,
    "attn_pooler_heads": 8,
}
TEXT = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "eos_id": 2,
    "proj_type": "linear",
    "proj_bias": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "hf_tokenizer_name": None,
    "tokenizer_kwargs": None,
    "embed_cls": False,
    "correct_cls_mask": False,
}
# OpenCLIP's decoder is as wide as the text tower, and has its context and vocabulary (coca_model.py).
DECODER = {"width": 512, "heads": 8, "layers": 12, "context_length": 77, "mlp_ratio": 4.0}
# Settings of multimodal_cfg that OpenCLIP does not read: the pooling belongs to vision_cfg.
UNREAD = ("vocab_size", "dim_head", "n_queries", "attn_pooler_heads")
# Keys of a model_cfg that are read below; and custom_text, cast_dtype and output_dict, which change no result.
MODEL = ("embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")
MODEL += ("custom_text", "cast_dtype", "output_dict")
POOLING = {"tok": "class", "avg": "average"}

ANY = None
# Settings that do not change the model: those of training, and those that are turned off.
NEUTRAL = {
    "patch_dropout": ANY,
    "output_tokens": ANY,
    "tokenizer_mode": ANY,
    "pad_id": ANY,
    "timm_drop": ANY,
    "timm_drop_path": ANY,
    "timm_model_pretrained": ANY,
    "timm_proj_bias": ANY,
    "timm_pool": ("map", "token"),  # decided by the names below
    "timm_proj": ("none", "", None),
    "final_ln_after_pool": ANY,  # of a text: pooling selects one token, and the norm applies to each alone
    "pos_embed_type": ("learnable",),
    "ls_init_value": (None,),
}
_SIGLIP_SIZES = {768: "base", 1024: "large", 1152: "so400m", 1536: "giantopt"}
_EVA_SIZES = {768: "base", 1024: "large", 1792: "enormous"}


def _timm_name(tower: ImageTower) -> str:
    sizes, family = (_SIGLIP_SIZES, "siglip") if tower.pooling == "attention" else (_EVA_SIZES, "clip")
    start = "vit" if family == "siglip" else "eva02"
    return f"{start}_{sizes.get(tower.width)}_patch{tower.patch_size}_{family}_{tower.image_size}"


TIMM = {
    _timm_name(preset.architecture.image): preset.architecture.image
    for preset in PRESETS.values()
    if is_timm(preset.architecture.image)
}
"""The towers of timm that OpenCLIP uses for SigLIP and EVA-02, fully described by their names."""


def to_preset(config: dict[str, Any], origin: str) -> Preset:
    """The preset of an ``open_clip_config.json``; ``origin`` is its name in error messages."""
    try:
        model = config["model_cfg"]
        _check_towers(model["vision_cfg"], model["text_cfg"], origin)
        vision = _settings(model["vision_cfg"], VISION, f"{origin}: model_cfg.vision_cfg")
        text = _settings(model["text_cfg"], TEXT, f"{origin}: model_cfg.text_cfg")
        embed_dim = model["embed_dim"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{origin}: not a configuration of OpenCLIP ({error!r} is missing)") from error
    for name, value in model.items():
        if name not in MODEL and value not in (None, False):
            raise UserError(f"{origin}: model_cfg.{name}={value!r:.60} is not supported")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    architecture = Architecture(
        _image(vision, activation, f"{origin}: model_cfg.vision_cfg"),
        _text(text, activation, f"{origin}: model_cfg.text_cfg"),
        embed_dim,
        model.get("init_logit_scale", math.log(1 / 0.07)),
        model.get("init_logit_bias"),
    )
    if "multimodal_cfg" in model:
        decoder = _decoder(model["multimodal_cfg"], architecture, activation, f"{origin}: model_cfg.multimodal_cfg")
        architecture = dataclasses.replace(architecture, decoder=decoder)
    tokenizer = _tokenizer(text, f"{origin}: model_cfg.text_cfg")
    pixels = preprocessing.from_open_clip(config.get("preprocess_cfg"), tokenizer, f"{origin}: preprocess_cfg")
    return Preset(architecture, pixels, tokenizer)


def _check_towers(vision: dict[str, Any], text: dict[str, Any], origin: str) -> None:
    """Raises UserError for a tower of another library, before an error about one of its many other settings."""
    timm, transformers = vision.get("timm_model_name"), text.get("hf_model_name")
    if timm and timm not in TIMM:
        raise UserError(
            f"{origin}: the image tower is timm's {timm}, which is not supported; of timm's, SigLIP's and EVA-02's "
            "ViTs are (clip_jax.list_models())"
        )
    if transformers:
        raise UserError(f"{origin}: the text tower is Transformers' {transformers}, which is not supported")


def _image(vision: dict[str, Any], activation: str, origin: str) -> ImageTower | ResNetTower:
    if name := vision["timm_model_name"]:
        return dataclasses.replace(TIMM[name], image_size=vision["image_size"])
    width = vision["width"]
    if isinstance(vision["layers"], list):
        return ResNetTower(vision["image_size"], tuple(vision["layers"]), width, 32 * width // vision["head_width"])
    for name, known in (("pool_type", POOLING), ("attentional_pool", (False, True))):
        if vision[name] not in known:
            raise UserError(f"{origin}.{name}={vision[name]!r} is not supported")
    pooling = "queries" if vision["attentional_pool"] else POOLING[vision["pool_type"]]
    return ImageTower(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        width=width,
        layers=vision["layers"],
        heads=width // vision["head_width"],
        mlp_width=int(width * vision["mlp_ratio"]),
        activation=_activation(vision, activation, origin),
        norm_pre=not vision["no_ln_pre"],
        norm_epsilon=_epsilon(vision, origin),
        pooling=pooling,
        norm_before_pooling=pooling == "average" and not vision["final_ln_after_pool"],
        layer_scale=vision["ls_init_value"],
        queries=vision["attn_pooler_queries"],
        query_heads=vision["attn_pooler_heads"],
    )


def _decoder(given: dict[str, Any], architecture: Architecture, activation: str, origin: str) -> CaptionDecoder:
    given = {name: value for name, value in given.items() if name not in UNREAD}
    decoder, text = _settings(given, DECODER, origin), architecture.text
    if text.pooling != "class" or not text.causal or decoder["width"] != text.width:
        raise UserError(f"{origin}: a decoder needs a causal text tower of its width with embed_cls=true")
    if architecture.memory_shape[1] != text.width:
        raise UserError(f"{origin}.width={text.width}: the image tower's tokens have {architecture.memory_shape[1]}")
    return CaptionDecoder(
        form="coca",
        length=text.context_length - 1,
        vocab_size=text.vocab_size,
        width=decoder["width"],
        layers=decoder["layers"],
        heads=decoder["heads"],
        mlp_width=4 * decoder["width"],  # whatever mlp_ratio says
        activation=activation,
    )


def _text(text: dict[str, Any], activation: str, origin: str) -> TextTower:
    if text["pool_type"] not in ("argmax", "eos", "first", "last") or text["proj_type"] not in ("linear", "none"):
        raise UserError(f"{origin}: pool_type={text['pool_type']!r}, proj_type={text['proj_type']!r} is not supported")
    projection = text["proj_type"] == "linear"
    return TextTower(
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        width=text["width"],
        layers=text["layers"],
        heads=text["heads"],
        mlp_width=int(text["width"] * text["mlp_ratio"]),
        activation=_activation(text, activation, origin),
        causal=not text["no_causal_mask"],
        pooling="class" if text["embed_cls"] else text["pool_type"],
        eos_id=text["eos_id"] if text["pool_type"] == "eos" and not text["embed_cls"] else None,
        norm_epsilon=_epsilon(text, origin),
        projection=projection,
        projection_bias=projection and text["proj_bias"],
        shifted_mask=text["embed_cls"] and not text["correct_cls_mask"],
    )


def _tokenizer(text: dict[str, Any], origin: str) -> str:
    """The kind of tokenizer, or for a kind that clip_jax does not implement, the repository that OpenCLIP names."""
    name, arguments = text["hf_tokenizer_name"], text["tokenizer_kwargs"] or {}
    if unknown := sorted(arguments.keys() - {"clean", "strip_sep_token"}):
        raise UserError(f"{origin}.tokenizer_kwargs.{unknown[0]}={arguments[unknown[0]]!r:.60} is not supported")
    if not name:
        if arguments:  # Cleaned in another way than CLIP's.
            raise UserError(f"{origin}.tokenizer_kwargs={arguments!r:.60} is not supported")
        return "clip"
    if arguments.get("strip_sep_token"):
        return "clipa"
    if arguments.get("clean", "whitespace") not in cleaning.CLEANERS:
        raise UserError(f"{origin}.tokenizer_kwargs.clean={arguments['clean']!r:.60} is not supported")
    if "SigLIP" not in name and name != "google/mt5-base":  # the vocabulary of the multilingual SigLIP
        return name
    return "siglip2" if text["vocab_size"] == 256_000 or "SigLIP2" in name else "siglip"


def cleaner(config: dict[str, Any]) -> str:
    """How OpenCLIP cleans a text before the tokenizer in the folder reads it: a name of ``cleaning.CLEANERS``."""
    return (config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}).get("clean", "whitespace")


def _activation(settings: dict[str, Any], activation: str, origin: str) -> str:
    arguments = settings["act_kwargs"]
    if arguments not in (None, {}, {"approximate": "none"}, {"approximate": "tanh"}):
        raise UserError(f"{origin}.act_kwargs={arguments!r} is not supported")
    return "gelu_tanh" if arguments == {"approximate": "tanh"} else activation


def _epsilon(settings: dict[str, Any], origin: str) -> float:
    arguments = dict(settings["norm_kwargs"] or {})
    epsilon = arguments.pop("eps", 1e-5)
    if arguments:
        raise UserError(f"{origin}.norm_kwargs={settings['norm_kwargs']!r} is not supported")
    return epsilon


def _settings(given: dict[str, Any], defaults: dict[str, Any], origin: str) -> dict[str, Any]:
    for name, value in given.items():
        if name not in defaults and not (name in NEUTRAL and (NEUTRAL[name] is ANY or value in NEUTRAL[name])):
            raise UserError(f"{origin}.{name}={value!r} is not supported")
    return {**defaults, **{name: value for name, value in given.items() if name in defaults}}


def from_preset(preset: Preset) -> dict[str, Any]:
    """The ``open_clip_config.json`` of a preset. Raises UserError for a model that OpenCLIP does not implement."""
    architecture = preset.architecture
    image, text = architecture.image, architecture.text
    activations = {text.activation} | ({image.activation} if _has_gelu(image) else set())
    if "quick_gelu" in activations and len(activations) > 1:
        raise UserError("OpenCLIP has QuickGELU in both towers or in neither; this model has it in one")
    model = {
        "embed_dim": architecture.embed_dim,
        "quick_gelu": "quick_gelu" in activations,
        "vision_cfg": _vision_config(image),
        "text_cfg": _text_config(text, preset.tokenizer),
    }
    if architecture.init_logit_bias is not None:
        model["init_logit_bias"] = architecture.init_logit_bias
    if has_text_prefix(architecture):
        model["custom_text"] = True
    if (decoder := architecture.decoder) is not None:
        model["vision_cfg"]["output_tokens"] = model["text_cfg"]["output_tokens"] = True
        model["multimodal_cfg"] = {
            "context_length": text.context_length,
            "vocab_size": decoder.vocab_size,
            "width": decoder.width,
            "heads": decoder.heads,
            "layers": decoder.layers,
        }
    preprocess = {
        "mean": list(preset.preprocess.mean),
        "std": list(preset.preprocess.std),
        "interpolation": preset.preprocess.interpolation,
        "resize_mode": preset.preprocess.resize,
    }
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def has_decoder(architecture: Architecture) -> bool:
    """Whether OpenCLIP's CoCa has the decoder of an architecture, which must have one."""
    decoder, text = architecture.decoder, architecture.text
    tower = isinstance(architecture.image, ImageTower) and architecture.image.pooling in ("class", "queries")
    widths = {decoder.width, text.width, architecture.memory_shape[1]}
    return tower and text.pooling == "class" and len(widths) == 1 and decoder.mlp_width == 4 * decoder.width


def _has_gelu(image: ImageTower | ResNetTower) -> bool:
    """Whether the image tower takes its activation from ``quick_gelu``: ResNets have ReLU, timm's towers their own."""
    return isinstance(image, ImageTower) and not is_timm(image)


def _vision_config(image: ImageTower | ResNetTower) -> dict[str, Any]:
    if isinstance(image, ResNetTower):
        head_width = 32 * image.width // image.heads
        return {
            "image_size": image.image_size, "layers": list(image.stages), "width": image.width, "head_width": head_width
        }  # fmt: skip
    if is_timm(image):
        name = _timm_name(image)
        if TIMM.get(name) != image:
            known = f"its {name} differs" if name in TIMM else "it takes such towers from timm, by name"
            raise UserError(f"OpenCLIP has no image tower of these sizes and activation ({known})")
        pool = "map" if image.pooling == "attention" else "token"
        projection = "none" if image.pooling == "attention" else None
        return {"image_size": image.image_size, "timm_model_name": name, "timm_pool": pool, "timm_proj": projection}
    config = {
        "image_size": image.image_size,
        "layers": image.layers,
        "width": image.width,
        "head_width": image.width // image.heads,
        "mlp_ratio": _ratio(image.mlp_width, image.width),
        "patch_size": image.patch_size,
        **_act_and_norm(image),
    }
    if image.layer_scale is not None:
        config["ls_init_value"] = image.layer_scale
    if not image.norm_pre:
        config["no_ln_pre"] = True
    if image.pooling == "queries":
        config |= {"attentional_pool": True, "attn_pooler_queries": image.queries}
        config["attn_pooler_heads"] = image.query_heads
    if image.pooling == "average":
        config |= {"pool_type": "avg", "final_ln_after_pool": not image.norm_before_pooling}
    return config


def _text_config(text: TextTower, tokenizer: str) -> dict[str, Any]:
    config = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": _ratio(text.mlp_width, text.width),
        **_act_and_norm(text),
        **TOKENIZER_CONFIGS.get(tokenizer, {"hf_tokenizer_name": tokenizer}),
    }
    if not text.causal:
        config["no_causal_mask"] = True
    if text.pooling == "class":
        config["embed_cls"] = True
        if not text.shifted_mask:  # OpenCLIP 3.3 has it as an attribute only: it refuses the setting
            config["correct_cls_mask"] = True
    elif text.pooling != "argmax":
        config["pool_type"] = text.pooling
    if text.pooling == "eos":
        config["eos_id"] = text.eos_id
    if not text.projection:
        config["proj_type"] = "none"
    if text.projection_bias:
        config["proj_bias"] = True
    return config


TOKENIZER_CONFIGS = {
    "clip": {},
    # A name that means the folder's own: OpenCLIP reads a local folder's files whatever the name.
    "sentencepiece": {"hf_tokenizer_name": "sentencepiece", "tokenizer_kwargs": {"clean": "lower"}},
    "clipa": {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}},
    "siglip": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}},
    "siglip2": {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2", "tokenizer_kwargs": {"clean": "canonicalize"}},
}


def _act_and_norm(tower: ImageTower | TextTower) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if tower.activation == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    if tower.norm_epsilon != 1e-5:
        config["norm_kwargs"] = {"eps": tower.norm_epsilon}
    return config


def _ratio(mlp_width: int, width: int) -> float:
    """The factor by which OpenCLIP multiplies the width before it rounds down to an integer."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)
