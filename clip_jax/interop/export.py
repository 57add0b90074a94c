"""Writes a model as a folder that OpenCLIP, Transformers, big_vision or any runtime of StableHLO loads.

``export`` returns lines for the user: what was written, and which part of the model the format cannot hold.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from clip_jax import __version__
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.errors import UserError
from clip_jax.interop import (
    big_vision,
    export_tokenizer,
    files,
    huggingface,
    huggingface_config,
    open_clip,
    open_clip_config,
    stablehlo,
    tokenizer_files,
)
from clip_jax.interop.files import write_json
from clip_jax.interop.tensors import Tensors, from_arrays
from clip_jax.models.clip import Params, parameter_counts
from clip_jax.models.resnet import ResNetTower
from clip_jax.presets import Preset


def export(
    to: Path,
    layout: str,
    *,
    name: str,
    preset: Preset,
    params: Params,
    batch_stats: Params,
    tokenizer: Tokenizer | None,
    source: Path,
) -> list[str]:
    """Writes the folder ``to``; ``source`` is the folder that the model was loaded from. Raises UserError."""
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to}: not empty; give a new folder")
    if missing := {"image", "text"} - params.keys():
        raise UserError(f"{name}: has no {missing.pop()} tower; a model of both is exported")
    to.mkdir(parents=True, exist_ok=True)
    preset, params, left_out = _without_decoder(layout, preset, params)
    try:
        if layout == "stablehlo":
            lines = stablehlo.write(to, preset, params, batch_stats)
        else:
            arrays = open_clip.from_params(jax.tree.map(np.asarray, params), preset.architecture, batch_stats)
            tensors = from_arrays(name, arrays)
            if layout == "openclip":
                lines = _open_clip(to, preset, tensors, tokenizer)
            else:
                lines = {"huggingface": _hugging_face, "bigvision": _big_vision}[layout](to, preset, tensors)
    except UserError:
        to.rmdir()  # Nothing was written: each format refuses a model before it writes.
        raise
    lines += left_out
    if preset.preprocess.exif and layout != "stablehlo":
        lines.append(
            "exif_orientation: left out, no other library turns photos; turn them before (ImageOps.exif_transpose)"
        )
    if preset.tokenizer == "siglip2" and layout == "openclip" and tokenizer is None:
        lines.append("texts: OpenCLIP drops the punctuation of every text of a SigLIP 2; encode_text here keeps it")
    lines += export_tokenizer.write(to, layout, preset.tokenizer, tokenizer, source)
    (to / "README.md").write_text(model_card(name, layout, preset, params), encoding="utf-8")
    return lines


def _without_decoder(layout: str, preset: Preset, params: Params) -> tuple[Preset, Params, list[str]]:
    """The model without a decoder that the layout cannot hold, and a line that says so."""
    architecture = preset.architecture
    if architecture.decoder is None or (layout == "openclip" and open_clip_config.has_decoder(architecture)):
        return preset, params, []
    preset = preset._replace(architecture=dataclasses.replace(architecture, decoder=None))
    params = {name: tree for name, tree in params.items() if name != "decoder"}
    return preset, params, ["decoder: left out, only OpenCLIP has one, of CoCa's architecture"]


def _open_clip(to: Path, preset: Preset, tensors: Tensors, tokenizer: Tokenizer | None) -> list[str]:
    config = open_clip_config.from_preset(preset)
    if tokenizer is not None and preset.tokenizer in tokenizer_files.VERSIONS:
        # As this model's texts were: SigLIP 2 keeps punctuation in Transformers, and drops it in OpenCLIP's own config.
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": tokenizer.codec.clean}
    files.write_safetensors(to / "open_clip_model.safetensors", tensors)
    write_json(to / "open_clip_config.json", config)
    if config["model_cfg"]["text_cfg"].get("correct_cls_mask"):
        return [
            "correct_cls_mask: OpenCLIP 3.3 has no such setting; remove it from open_clip_config.json, load the model, "
            "and set model.text.correct_cls_mask = True"
        ]
    return [f"open_clip.create_model_from_pretrained('local-dir:{to.resolve()}') loads it"]


def _hugging_face(to: Path, preset: Preset, tensors: Tensors) -> list[str]:
    config, preprocessor = huggingface_config.from_preset(preset)
    renamed = huggingface.from_open_clip(tensors, preset.architecture)
    files.write_safetensors(to / "model.safetensors", renamed)
    write_json(to / "config.json", config)
    write_json(to / "preprocessor_config.json", preprocessor)
    return [f"transformers.AutoModel.from_pretrained('{to.resolve()}') loads it"]


def _big_vision(to: Path, preset: Preset, tensors: Tensors) -> list[str]:
    files.write_npz(to / "model.npz", big_vision.from_open_clip(tensors, preset.architecture))
    lines = ["config: left out, the format has none; the sizes must be in big_vision's own config"]
    if big_vision.activations(preset.architecture) != preset.architecture:
        lines.append("activation: big_vision computes GELU by its tanh approximation, unlike this model")
    return lines


def model_card(name: str, layout: str, preset: Preset, params: Params) -> str:
    """README.md: the model and its preprocessing, with blank sections for what only its authors know."""
    image, text, pixels = preset.architecture.image, preset.architecture.text, preset.preprocess
    if isinstance(image, ResNetTower):
        shape, activation = f"{image.width}, {list(image.stages)}, {image.heads}", "relu"
    else:
        shape, activation = f"{image.width}, {image.layers}, {image.heads}", image.activation
    turned = "turned by their EXIF orientation, " if pixels.exif else ""
    millions = {tower: f"{count / 1e6:.1f} M" for tower, count in parameter_counts(params).items()}
    libraries = {"openclip": "open_clip", "huggingface": "transformers", "bigvision": "big_vision", "stablehlo": "jax"}
    return f"""---
library_name: {libraries[layout]}
pipeline_tag: zero-shot-image-classification
tags: [clip, jax]
---

# {name}

A CLIP model of {millions["total"]} parameters, exported by clip_jax {__version__}.

| | image tower | text tower |
|---|---|---|
| input | {image.image_size} x {image.image_size} pixels | {text.context_length} tokens of {text.vocab_size} |
| width, layers, heads | {shape} | {text.width}, {text.layers}, {text.heads} |
| activation | {activation} | {text.activation} |
| parameters | {millions["image"]} | {millions["text"]} |

Both towers give {preset.architecture.embed_dim} features. Pixels: {turned}resized
({pixels.resize}, {pixels.interpolation}), divided by 255, mean {list(pixels.mean)}, standard deviation
{list(pixels.std)}. Tokenizer: {preset.tokenizer}.

## Training data, evaluation, intended use

To be completed by the publisher of the model. A CLIP model reproduces the associations of its training pairs,
including stereotypes: evaluate it on the task and the people it is meant for.
"""
