"""Finds the layout and the files of the weights in a folder.

run          run.json                                                 clip_jax's own; ``model.py`` reads it
openclip     open_clip_config.json, open_clip_model.safetensors       OpenCLIP; also OpenAI's weights under its names
huggingface  config.json, model.safetensors (or an index of shards)   Transformers' CLIPModel, SiglipModel
bigvision    *.npz                                                    big_vision

A folder may have several (LAION publishes OpenCLIP's and Transformers' together): the first in the order above is read,
and the choice is logged. OpenCLIP's takes precedence over Transformers' because its files are the original ones, and
only its config says how images were resized.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax.errors import UserError
from clip_jax.interop import files
from clip_jax.storage import buckets, run_folder

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
"""Sufficient next to OpenCLIP's config: LAION's repositories hold the same weights a second time, for Transformers."""
TENSORS, PICKLES = ("*.safetensors", "*.npz"), ("*.bin", "*.pt")


def local(source: str | Path, *, pickles: bool = False) -> Path:
    """The local folder (or file) of a source.

    A path is returned unchanged; ``hf://org/name`` is downloaded, or found in the cache, by huggingface_hub, with its
    pickles only if ``pickles``; a folder in a bucket is copied, without its checkpoints. Raises UserError.
    """
    text = str(source)
    if not text.startswith(HUB):
        folder = run_folder.Folder(source if buckets.is_bucket(source) else Path(source).expanduser()).path
        if buckets.is_bucket(source) and not any(folder.iterdir()):
            raise UserError(f"{source}: empty or missing; give the --workdir of a run, or a folder of weights")
        return folder
    # Imported here: the import takes half a second, which a local path does not need.
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
    except Exception as error:  # Without a network, the hub's client raises a dozen kinds of errors.
        raise UserError(
            f"{text}: not in the Hugging Face cache, and cannot be downloaded ({type(error).__name__}); copy the "
            "folder to this machine and give its path, or try again with a network connection"
        ) from error
    if not pickles and not any(path for pattern in TENSORS for path in folder.glob(pattern)):
        raise UserError(
            f"{text}: has neither safetensors nor npz, and pickles are not downloaded; "
            f"`clip-jax import {text} --to=DIR` converts those"
        )
    return folder


def find(folder: Path) -> Found:
    """The layout of a folder that is read. Raises UserError if there is none, or if its weights are a pickle."""
    every = _layouts(folder)
    if not every:
        raise UserError(f"{folder}: {_what_it_is(folder)}")
    first = every[0]
    if len(every) > 1:
        others = ", ".join(found.weights.name for found in every[1:])
        log.warning("%s: reading %s (%s); not read: %s", folder, first.weights.name, first.layout, others)
    if files.is_pickled(first.weights):
        raise UserError(
            f"{first.weights}: a pickle, which is never opened here; `clip-jax import {folder} --to=DIR` converts it"
        )
    return first


def _what_it_is(folder: Path) -> str:
    """A message for the user: why a folder cannot be read as a model, and what to do."""
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"a LoRA adapter{f' for {base}' if base else ''}, not a model; with peft, merge_and_unload() and "
            "save_pretrained() write the whole model"
        )
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            "a distributed checkpoint of PyTorch; `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder} model.pt` makes a file that `clip-jax import` converts"
        )
    if "model_index.json" in names:
        return "a pipeline of diffusers, whose parts are folders; give that of a CLIP model"
    for file, library in (("flax_model.msgpack", "Flax"), ("tf_model.h5", "TensorFlow")):
        if file in names:
            return f"has weights for {library} alone ({file}); save them with Transformers as model.safetensors"
    present = sorted(name for name in names if name.endswith((".safetensors", ".npz", *files.PICKLED)))
    if present:
        config = " or ".join(CONFIGS.values())
        return (
            f"holds {', '.join(present[:3])}, but no {config} beside weights of the usual name; give the file and the "
            f'model\'s name: clip_jax.load("ViT-B/32", weights="{folder / present[0]}")'
        )
    return (
        f"neither a run folder nor one of weights: it has no {run_folder.RUN_FILE}, nor "
        f"{' or '.join(CONFIGS.values())} with its weights, nor one .npz"
    )


def _layouts(folder: Path) -> list[Found]:
    found = []
    for layout, config in CONFIGS.items():
        present = [folder / name for name in WEIGHTS[layout] if (folder / name).is_file()]
        variants = sorted(folder.glob("model.*.safetensors"))  # model.fp16.safetensors
        if layout == "huggingface" and not present and len(variants) == 1:
            present = variants
        if present and (folder / config).is_file():
            found.append(Found(layout, present[0], folder / config))
    arrays = sorted(folder.glob("*.npz"))
    if len(arrays) == 1:
        found.append(Found("bigvision", arrays[0], None))
    # A pickle comes last: it is chosen only where there is nothing else.
    return sorted(found, key=lambda each: files.is_pickled(each.weights))


def layout_of(names: Sequence[str], origin: str) -> str:
    """The layout of a file without a config, by the names of its tensors; ``origin`` is its name in errors."""
    names = set(names)
    if any(name.startswith(("vision_model.", "text_model.")) for name in names):
        return "huggingface"
    if any(name.startswith("visual.") for name in names):
        return "openclip"
    if any(name.removeprefix("params/").startswith(("img/", "txt/")) for name in names):
        return "bigvision"
    found = ", ".join(sorted(names)[:3])
    raise UserError(
        f"{origin}: its tensors have neither OpenCLIP's nor Transformers' nor big_vision's names; the first of "
        f"{len(names)}: {found}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError for any other content."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object")
    return values
