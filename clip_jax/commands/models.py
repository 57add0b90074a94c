"""``clip-jax models [PATTERN ...]``: the names that ``load`` and ``--config.model.name`` take."""

import argparse
import dataclasses
import fnmatch
import functools
import json
from typing import Any

from clip_jax.errors import UserError, nearest

HELP = "List the models by name, with their sizes, tokenizers and where public weights are."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="*", help="names to list, such as 'ViT-B*' or 'SigLIP2'; default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object per model")


def run(arguments: argparse.Namespace) -> None:
    from clip_jax import presets  # after parsing: JAX takes a second to import

    names = [name for name in presets.list_models() if _wanted(name, arguments.pattern)]
    if not names:
        given = arguments.pattern[0]
        raise UserError(f"{given}: no model has such a name{nearest(given, presets.list_models())}")
    if not arguments.json:
        print(
            f"{'name':<31} {'image':>6} {'text':>6} {'pixels':>6} {'tokens':>6} {'dim':>5}  {'tokenizer':<14} weights"
        )
    for name in names:
        row = _row(name)
        print(json.dumps(row) if arguments.json else _line(row), flush=True)


def _row(name: str) -> dict[str, Any]:
    from clip_jax import presets, published

    preset = presets.preset(name)
    architecture = preset.architecture
    return {
        "name": name,
        "image_parameters": _parameters("image", architecture.image, architecture.embed_dim),
        "text_parameters": _parameters("text", architecture.text, architecture.embed_dim),
        "image_size": architecture.image.image_size,
        "context_length": architecture.text.context_length,
        "embed_dim": architecture.embed_dim,
        "tokenizer": preset.tokenizer,
        "weights": published.WEIGHTS.get(name, ""),
    }


def _line(row: dict[str, Any]) -> str:
    from clip_jax.reports import formats

    sizes = f"{formats.count(row['image_parameters']):>6} {formats.count(row['text_parameters']):>6}"
    shape = f"{row['image_size']:>6} {row['context_length']:>6} {row['embed_dim']:>5}"
    return f"{row['name']:<31} {sizes} {shape}  {row['tokenizer']:<14} {row['weights']}".rstrip()


def _parameters(which: str, tower: Any, embed_dim: int) -> int:
    """Parameters of a tower with its projection; no activation has any."""
    plain = dataclasses.replace(tower, activation="gelu") if hasattr(tower, "activation") else tower
    return _counted(which, plain, embed_dim)


@functools.cache  # most models share a tower with another
def _counted(which: str, tower: Any, embed_dim: int) -> int:
    import jax

    from clip_jax.models.clip import CLIP, Architecture, parameter_counts
    from clip_jax.models.compute import Compute
    from clip_jax.models.text import TextTower
    from clip_jax.models.vit import ImageTower

    # The other tower is minimal: only shapes are traced, but tracing a tower takes a tenth of a second.
    image = tower if which == "image" else ImageTower(32, 32, 32, 1, 1, 32)
    text = tower if which == "text" else TextTower(2, 2, 32, 1, 1, 32)
    model = CLIP(Architecture(image, text, embed_dim), Compute())
    return parameter_counts(jax.eval_shape(model.init, jax.random.key(0)))[which]


def _wanted(name: str, patterns: list[str]) -> bool:
    """Whether a pattern matches the name or a part of it. Case is ignored only for patterns without capital letters."""
    spelled = name.replace("/", "-")
    for pattern in (pattern.replace("/", "-") for pattern in patterns):
        text = spelled.lower() if pattern == pattern.lower() else spelled
        if pattern in text or fnmatch.fnmatchcase(text, pattern):
            return True
    return not patterns
