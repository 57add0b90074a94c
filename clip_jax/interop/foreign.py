"""A foreign checkpoint -> a preset and parameters: finds the layout, reads its config, translates its names.

Only this module knows all layouts; each layout has modules of its own for its names and its config.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from clip_jax.data import tokenizers
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.devices import sharding
from clip_jax.errors import UserError
from clip_jax.interop import (
    big_vision,
    files,
    folders,
    huggingface,
    huggingface_config,
    open_clip,
    open_clip_config,
    preprocessing,
    table,
    tokenizer_files,
)
from clip_jax.interop.tensors import Tensors
from clip_jax.models.clip import CLIP, Architecture, Params
from clip_jax.models.resize import resize_positions
from clip_jax.presets import Preset


class Foreign(NamedTuple):
    """A checkpoint whose tensors are still in their file."""

    name: str
    preset: Preset
    tensors: Tensors
    layout: str
    folder: Path
    """The folder that may hold the files of the tokenizer."""
    clean: str = "none"
    """How the model's library cleans a text before a ``tokenizer.json`` reads it (``cleaning.CLEANERS``)."""

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers of which the file has any tensor; of one alone, half the methods of a model can be used."""
        if self.layout == "bigvision":
            return open_clip.TOWERS
        image, text = BEGINNINGS[self.layout]
        has_image, has_text = (any(name.startswith(names) for name in self.tensors) for names in (image, text))
        return open_clip.TOWERS if has_image == has_text else ("image",) if has_image else ("text",)


BEGINNINGS = {
    "huggingface": (("vision_model.",), ("text_model.",)),
    "openclip": (("visual.",), ("text.", "transformer.", "token_embedding.")),
}
"""How the names of each tower's tensors begin."""


def open_folder(folder: Path) -> Foreign:
    """A folder whose config says which model it is. Raises UserError."""
    found = folders.find(folder)
    if found.config is None:
        raise UserError(
            f"{found.weights}: does not say which model it is; give the name as well: "
            f'clip_jax.load("ViT-B/16-SigLIP", weights="{found.weights}")'
        )
    config = folders.read_json(found.config)
    if found.layout == "openclip":
        preset, clean = open_clip_config.to_preset(config, str(found.config)), open_clip_config.cleaner(config)
    else:
        preprocessor, origin = preprocessing.read_transformers(folder)
        preset, clean = huggingface_config.to_preset(config, preprocessor, str(found.config), origin), "none"
    if tokenizers.files.find(folder, "sentencepiece") is not None:  # in an export of a run
        preset = preset._replace(tokenizer="sentencepiece")
    return Foreign(folder.resolve().name, preset, files.read(found.weights), found.layout, folder, clean)


def open_weights(path: Path, name: str, preset: Preset) -> Foreign:
    """A file or folder of weights for a model that is known by name; a config next to them is not read."""
    weights = folders.find(path).weights if path.is_dir() else path
    tensors = files.read(weights)
    layout = folders.layout_of(list(tensors), str(weights))
    if layout == "bigvision":
        preset = preset._replace(architecture=big_vision.activations(preset.architecture))
    return Foreign(name, preset, tensors, layout, weights.parent, "whitespace" if layout == "openclip" else "none")


def read_params(
    foreign: Foreign, put: Callable[[str, np.ndarray], Any] = lambda path, leaf: leaf
) -> tuple[Params, Params]:
    """(params, batch_stats) in our tree, in float32; each tensor is read from the file once.

    ``put(path, leaf)`` moves each NumPy leaf, for example to the devices, before the next is read.
    """
    try:
        tensors, architecture = as_open_clip(foreign), foreign.preset.architecture
        params = open_clip.to_params(tensors, architecture, put, foreign.towers)
        return params, (open_clip.to_batch_stats(tensors, architecture) if "image" in params else {})
    except UserError as error:
        source = foreign.tensors.source
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from error


def as_open_clip(foreign: Foreign) -> Tensors:
    """The tensors under OpenCLIP's names."""
    if foreign.layout == "huggingface":
        return huggingface.to_open_clip(foreign.tensors, foreign.preset.architecture, foreign.towers)
    if foreign.layout == "bigvision":
        return big_vision.to_open_clip(foreign.tensors, foreign.preset.architecture)
    return foreign.tensors


def onto_devices(architecture: Architecture, mesh: Mesh | None = None) -> Callable[[str, np.ndarray], jax.Array]:
    """A function that puts a leaf, given its path, onto the devices of the mesh (without a mesh, the first device).

    It resizes position embeddings of another length than the architecture's, and logs that.
    """
    target = flatten_dict(shardings(architecture, mesh), sep="/")
    shapes = table.parameter_shapes(architecture)

    def put(path: str, leaf: np.ndarray) -> jax.Array:
        if leaf.shape != shapes[path]:
            folders.log.warning("%s: resized from %d to %d positions", path, len(leaf), shapes[path][0])
            leaf = resize_positions(leaf, shapes[path][0], image=path.startswith("image/"))
        # Waits, so that the copy on the host is freed before the next leaf is read.
        return jax.block_until_ready(jax.device_put(leaf, target[path]))

    return put


def resized(preset: Preset, image_size: int | None, context_length: int | None) -> Preset:
    """The preset for images and texts of other sizes. Raises UserError for a size that no patches fill."""
    image, text = preset.architecture.image, preset.architecture.text
    size, length = image_size or image.image_size, context_length or text.context_length
    if size < image.patch_size or (image_size and size % image.patch_size):
        raise UserError(f"image_size={size}: not a multiple of this model's patches of {image.patch_size} pixels")
    if length < 1:
        raise UserError(f"context_length={length}: must be at least 1")
    image, text = dataclasses.replace(image, image_size=size), dataclasses.replace(text, context_length=length)
    return preset._replace(architecture=dataclasses.replace(preset.architecture, image=image, text=text))


def shardings(architecture: Architecture, mesh: Mesh | None = None) -> Params:
    """The sharding of each leaf of the tree."""
    boxed = jax.eval_shape(CLIP(architecture).init, jax.random.key(0))
    if mesh is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: here, nn.meta.unbox(boxed))
    return sharding.parameter_shardings(boxed, mesh)


def open_tokenizer(foreign: Foreign, given: str | Path | Tokenizer | None = None) -> Tokenizer:
    """The given tokenizer (or the one in a file or folder), else the folder's own, else the published one of its kind.

    Raises UserError if its vocabulary or its end token is not the model's.
    """
    kind, tower = foreign.preset.tokenizer, foreign.preset.architecture.text
    if given is not None:
        return tokenizer_files.given(given, kind, tower, foreign.clean)
    found = tokenizer_files.open_tokenizer(foreign.folder, kind, tower, foreign.clean)
    if found is not None:
        return found
    names = ", ".join(tokenizers.files.FILES.get(kind, (tokenizers.files.JSON,)))
    reason = "give the tokenizer that it was trained with: load(..., tokenizer=PATH)"
    if kind in tokenizers.hub.REPOSITORIES:
        try:
            return tokenizer_files.published(kind, tower, foreign.clean)
        except UserError as error:
            reason = str(error)
    raise UserError(
        f"{foreign.folder}: has none of {names}, which the texts of this model need (images do not); {reason}"
    )
