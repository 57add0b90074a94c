"""Weights out: a model as a folder that OpenCLIP, Transformers or big_vision loads.

``export`` returns lines for the user: what was written, and which part of the model the format has no place for.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax import __version__, run_folder
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.errors import UserError
from clip_jax.interop import big_vision, files, folders, huggingface, huggingface_config, open_clip, open_clip_config
from clip_jax.interop.state import State, from_arrays
from clip_jax.models.clip import Params, parameter_counts
from clip_jax.models.resnet import ResNetTower
from clip_jax.presets import Preset

FORMATS = ("openclip", "huggingface", "bigvision")


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
    """Writes the folder ``to``; ``source`` is the folder that the model came from. Raises UserError."""
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to}: not empty; give a new folder")
    state = from_arrays(name, open_clip.from_params(jax.tree.map(np.asarray, params), preset.architecture, batch_stats))
    write = {"openclip": _open_clip, "huggingface": _hugging_face, "bigvision": _big_vision}[layout]
    to.mkdir(parents=True, exist_ok=True)
    try:
        lines = write(to, preset, state)
    except UserError:
        to.rmdir()  # Nothing was written: the formats refuse before they write.
        raise
    lines += _tokenizer(to, layout, preset, tokenizer, source)
    (to / "README.md").write_text(model_card(name, layout, preset, params), encoding="utf-8")
    return lines


def _open_clip(to: Path, preset: Preset, state: State) -> list[str]:
    config = open_clip_config.from_preset(preset)
    files.write_safetensors(to / "open_clip_model.safetensors", state)
    write_json(to / "open_clip_config.json", config)
    return [f"open_clip.create_model_from_pretrained('local-dir:{to.resolve()}') loads it"]


def _hugging_face(to: Path, preset: Preset, state: State) -> list[str]:
    config, preprocessor = huggingface_config.from_preset(preset)
    renamed = huggingface.from_open_clip(state, preset.architecture)
    files.write_safetensors(to / "model.safetensors", renamed)
    write_json(to / "config.json", config)
    write_json(to / "preprocessor_config.json", preprocessor)
    return [f"transformers.AutoModel.from_pretrained('{to.resolve()}') loads it"]


def _big_vision(to: Path, preset: Preset, state: State) -> list[str]:
    files.write_npz(to / "model.npz", big_vision.from_open_clip(state, preset.architecture))
    lines = ["config: left out, the format has no place for it; big_vision's has to say the sizes"]
    if big_vision.activations(preset.architecture) != preset.architecture:
        lines.append("activation: big_vision computes GELU by its tanh approximation, this model does not everywhere")
    return lines


def _tokenizer(to: Path, layout: str, preset: Preset, tokenizer: Tokenizer | None, source: Path) -> list[str]:
    kind = preset.tokenizer
    if kind == "sentencepiece":
        return [
            f"tokenizer: left out, {layout} has no place for one trained by clip_jax; its texts need the tokenizer/ "
            f"of {source}"
        ]
    if layout == "bigvision":
        return ["tokenizer: left out, big_vision reads its tokenizers from places of its own"]
    if kind == "clip":
        if tokenizer is None:
            return ["tokenizer: CLIP's, which was not found here; OpenCLIP brings its own"]
        _write_clip_tokenizer(to, tokenizer)
        return ["tokenizer: CLIP's (vocab.json, merges.txt)"]
    place = source / "tokenizer" if run_folder.is_run(source) else source
    copied = [path for path in place.iterdir() if path.name in _COPIED | set(folders.TOKENIZERS.get(kind, ()))]
    for path in copied:
        shutil.copyfile(path, to / path.name)
    names = ", ".join(sorted(path.name for path in copied))
    return [f"tokenizer: {names}" if copied else f"tokenizer: left out, {source} has none"]


_COPIED = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}


def _write_clip_tokenizer(to: Path, tokenizer: Tokenizer) -> None:
    """As Transformers keeps it; its special tokens have other spellings than OpenCLIP's, and the same ids."""
    codec, start, end = tokenizer.codec, "<|startoftext|>", "<|endoftext|>"
    symbols = [*codec.symbols[:-2], start, end]
    write_json(to / "vocab.json", {symbol: i for i, symbol in enumerate(symbols)}, indent=None)
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in codec.merges)])
    (to / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "do_lower_case": True,
        "model_max_length": tokenizer.context_length,
    }
    write_json(to / "tokenizer_config.json", config)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """UTF-8, with a line's end at the end."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(name: str, layout: str, preset: Preset, params: Params) -> str:
    """README.md: what the model is and how it wants its input; what only its maker knows is left to fill in."""
    image, text, pixels = preset.architecture.image, preset.architecture.text, preset.preprocess
    if isinstance(image, ResNetTower):
        shape, activation = f"{image.width}, {list(image.stages)}, {image.heads}", "relu"
    else:
        shape, activation = f"{image.width}, {image.layers}, {image.heads}", image.activation
    millions = {tower: f"{count / 1e6:.1f} M" for tower, count in parameter_counts(params).items()}
    library = {"openclip": "open_clip", "huggingface": "transformers", "bigvision": "big_vision"}[layout]
    return f"""---
library_name: {library}
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

Both towers give {preset.architecture.embed_dim} features. Pixels: resized ({pixels.resize}, {pixels.interpolation}),
divided by 255, mean {list(pixels.mean)}, standard deviation {list(pixels.std)}. Tokenizer: {preset.tokenizer}.

## Training data, evaluation, intended use

To be filled in by whoever publishes the model. A CLIP model repeats the associations of the pairs it was trained on,
stereotypes among them: evaluate it on the task and the people it is meant for.
"""
