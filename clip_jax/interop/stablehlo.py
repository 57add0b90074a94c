"""Both towers as StableHLO with their weights beside them: for programs that have JAX, or another runtime of StableHLO,
but not clip_jax.

``jax.export`` serializes them for CPUs, GPUs and TPUs, with a symbolic batch size (it needs the package flatbuffers:
the extra ``stablehlo``). Weights are arguments: constants of that size take a compiler very long.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, UInt8

from clip_jax.errors import UserError
from clip_jax.interop.files import write_json, write_safetensors
from clip_jax.models.clip import CLIP, Params, unit
from clip_jax.presets import Preset

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

USE = """from flax.traverse_util import unflatten_dict
import jax.export, numpy as np, safetensors.numpy

weights = unflatten_dict(safetensors.numpy.load_file("weights.safetensors"), sep="/")
encode_image = jax.export.deserialize(open("image.stablehlo", "rb").read()).call
encode_text = jax.export.deserialize(open("text.stablehlo", "rb").read()).call
images = encode_image(weights["image"], pixels)  # uint8[n, height, width, 3] -> float32[n, dim], of unit length
texts = encode_text(weights["text"], tokens)  # int32[n, length] -> float32[n, dim], of unit length
probabilities = jax.nn.softmax(np.exp(weights["logit_scale"]) * images @ texts.T)
"""


def write(to: Path, preset: Preset, params: Params, batch_stats: Params) -> list[str]:
    """Writes ``image.stablehlo``, ``text.stablehlo``, ``weights.safetensors`` and ``config.json``; returns lines.

    Raises UserError if flatbuffers is not installed.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("--format=stablehlo needs flatbuffers: pip install 'clip-jax-tpu[stablehlo]'")
    clip, size = CLIP(preset.architecture), preset.architecture.image.image_size

    def encode_image(weights: Params, pixels: UInt8[Array, "n height width 3"]) -> Float[Array, "n dim"]:
        stats = {"image": weights["batch_stats"]} if batch_stats else None
        tower = {name: tree for name, tree in weights.items() if name != "batch_stats"}
        return unit(clip.encode_image({"image": tower}, preset.preprocess.normalize(pixels), stats))

    def encode_text(weights: Params, tokens: Int[Array, "n length"]) -> Float[Array, "n dim"]:
        return unit(clip.encode_text({"text": weights}, tokens))

    image = params["image"] | ({"batch_stats": batch_stats["image"]} if batch_stats else {})
    weights = {name: tree for name, tree in params.items() if name.startswith("logit_")}
    weights |= {"image": image, "text": params["text"]}
    (batch,) = jax.export.symbolic_shape("batch")
    for name, function, shape, dtype in (
        ("image", encode_image, (batch, size, size, 3), jnp.uint8),
        ("text", encode_text, (batch, preset.architecture.text.context_length), jnp.int32),
    ):
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights[name])
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(
            abstract, jax.ShapeDtypeStruct(shape, dtype)
        )
        (to / f"{name}.stablehlo").write_bytes(exported.serialize())
    leaves = flatten_dict(weights, sep="/")
    write_safetensors(to / "weights.safetensors", {name: np.asarray(leaf) for name, leaf in leaves.items()})
    write_json(to / "config.json", _config(preset))
    (to / "use.py").write_text(USE, encoding="utf-8")
    return ["jax.export.deserialize reads image.stablehlo and text.stablehlo, any number of rows at once; see use.py"]


def _config(preset: Preset) -> dict[str, Any]:
    """What happens to an image and a text before the programs; the images are normalized inside."""
    return {
        "image_size": preset.architecture.image.image_size,
        "exif_orientation": preset.preprocess.exif,
        "resize": preset.preprocess.resize,
        "interpolation": preset.preprocess.interpolation,
        "context_length": preset.architecture.text.context_length,
        "tokenizer": preset.tokenizer,
    }
