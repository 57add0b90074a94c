"""What a folder or a file of weights holds: which layout, which files, which model.

run          run.json                                                 clip_jax's own; ``model.py`` reads it
openclip     open_clip_config.json, open_clip_model.safetensors       OpenCLIP; also OpenAI's weights under its names
huggingface  config.json, model.safetensors (or an index of shards)   Transformers' CLIPModel, SiglipModel
bigvision    *.npz                                                    big_vision

Several may lie in one folder (LAION publishes the first two of the foreign ones together): the order above decides,
and a line says so. OpenCLIP's wins over Transformers' because its files are the ones that were trained, and its
config alone says how images were resized.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax import buckets, run_folder
from clip_jax.errors import UserError
from clip_jax.interop import files

log = logging.getLogger("clip_jax")

HUB = "hf://"

WEIGHTS = {
    "openclip": ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    "huggingface": (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ),
    "bigvision": (),
}
CONFIGS = {"openclip": "open_clip_config.json", "huggingface": "config.json"}
TOKENIZERS = {
    "clip": ("merges.txt", "tokenizer.json", "bpe_simple_vocab_16e6.txt.gz"),
    "siglip": ("tokenizer.json", "spiece.model"),
    "siglip2": ("tokenizer.json", "tokenizer.model"),
    "clipa": ("vocab.txt", "tokenizer.json"),
}
"""By kind, the files that its tokenizer can be built from, the surest first."""


class Found(NamedTuple):
    """A layout in a folder: the file with the weights and, where the layout has one, its config."""

    layout: str
    weights: Path
    config: Path | None

    @property
    def folder(self) -> Path:
        return self.weights.parent


SMALL = ("*.json", "*.txt", "*.model")
OPEN_CLIPS = ("open_clip*.safetensors",)
"""Enough where its config is there: LAION's repositories have the same weights a second time, for Transformers."""
TENSORS, PICKLES = ("*.safetensors", "*.npz"), ("*.bin", "*.pt")


def local(source: str | Path, *, pickles: bool = False) -> Path:
    """A path as it is; ``hf://org/name`` downloaded (or found in the cache) by huggingface_hub, with its pickles only
    where they are asked for; a folder in a bucket copied, without its checkpoints."""
    text = str(source)
    if not text.startswith(HUB):
        folder = run_folder.Folder(source).path
        if buckets.is_bucket(source) and not any(folder.iterdir()):
            raise UserError(f"{source}: nothing is there; give the --workdir of a run, or a folder of weights")
        return folder
    # Imported here: half a second that a local path saves.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    def download(patterns: Sequence[str]) -> Path:
        return Path(snapshot_download(text.removeprefix(HUB).strip("/"), allow_patterns=list(patterns)))

    try:
        folder = download(SMALL)
        if run_folder.is_run(folder):
            return download("*")
        if not pickles and (folder / CONFIGS["openclip"]).is_file():
            folder = download(OPEN_CLIPS)
        if pickles or not any(folder.glob(OPEN_CLIPS[0])):
            folder = download(PICKLES if pickles else TENSORS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{text}: no such repository on the Hugging Face hub, or it is not public to you") from error
    except Exception as error:  # The hub's client has a dozen ways to say that there is no network.
        raise UserError(
            f"{text}: not in the Hugging Face cache, and cannot be downloaded ({type(error).__name__}); copy the "
            "folder here and give its path, or try again with a network"
        ) from error
    if not pickles and not any(path for pattern in TENSORS for path in folder.glob(pattern)):
        raise UserError(
            f"{text}: has neither safetensors nor npz, and its pickles are not downloaded; "
            f"`clip-jax import {text} --to=DIR` reads those"
        )
    return folder


def find(folder: Path) -> Found:
    """The layout of a folder that wins. UserError where there is none, or where its weights are a pickle."""
    every = _layouts(folder)
    if not every:
        raise UserError(
            f"{folder}: not a run folder, nor one of weights: it has neither {run_folder.RUN_FILE}, nor "
            f"{' or '.join(CONFIGS.values())} with its weights, nor one .npz"
        )
    first = every[0]
    if len(every) > 1:
        others = ", ".join(found.weights.name for found in every[1:])
        log.warning("%s: reading %s (%s); not read: %s", folder, first.weights.name, first.layout, others)
    if files.is_pickled(first.weights):
        raise UserError(
            f"{first.weights}: a pickle, which is never opened here; `clip-jax import {folder} --to=DIR` converts it"
        )
    return first


def _layouts(folder: Path) -> list[Found]:
    found = []
    for layout, config in CONFIGS.items():
        present = [folder / name for name in WEIGHTS[layout] if (folder / name).is_file()]
        if present and (folder / config).is_file():
            found.append(Found(layout, present[0], folder / config))
    arrays = sorted(folder.glob("*.npz"))
    if len(arrays) == 1:
        found.append(Found("bigvision", arrays[0], None))
    # A pickle is only what is read where nothing else is there.
    return sorted(found, key=lambda each: files.is_pickled(each.weights))


def layout_of(names: Sequence[str], place: str) -> str:
    """Whose names the tensors of a bare file have."""
    names = set(names)
    if any(name.startswith(("vision_model.", "text_model.")) for name in names):
        return "huggingface"
    if any(name.startswith("visual.") for name in names):
        return "openclip"
    if any(name.removeprefix("params/").startswith(("img/", "txt/")) for name in names):
        return "bigvision"
    raise UserError(f"{place}: its tensors have neither OpenCLIP's nor Transformers' nor big_vision's names")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError where it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values


def tokenizer_file(folder: Path, kind: str) -> Path | None:
    """The file of a folder that a tokenizer of this kind is built from."""
    return next((folder / name for name in TOKENIZERS[kind] if (folder / name).is_file()), None)
