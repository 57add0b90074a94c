"""OpenCLIP's state dicts (and OpenAI's, which have the same names) <-> our parameter tree: pure functions of arrays.

Nothing is read from disk here. The tables below are the whole mapping; ``table.py`` runs them in both directions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax.interop import table
from clip_jax.interop.table import MATRIX, ROWS, SCALAR, VECTOR, Row, rows
from clip_jax.models.clip import Architecture, Params
from clip_jax.models.text import TextTower
from clip_jax.models.vit import ImageTower

# Buffers and sizes that older files carry beside the weights; OpenCLIP drops them too.
IGNORED = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size")


def to_params(state: Mapping[str, np.ndarray], architecture: Architecture) -> Params:
    """OpenCLIP's tensors by name -> our tree, in float32.

    The text tower's names may begin with ``text.``, as OpenCLIP's CustomTextCLIP has them, or not. Raises UserError
    for a tensor that is missing, unknown or of a wrong shape.
    """
    names = [name for name in state if name not in IGNORED]
    tensors = _Renamed(state, {_canonical(name, architecture): name for name in names})
    shapes = table.parameter_shapes(architecture)
    return table.read(tensors, _table(architecture), shapes, _sizes(architecture))


def from_params(params: Params, architecture: Architecture) -> dict[str, np.ndarray]:
    """Our tree -> OpenCLIP's tensors by name, the exact inverse of ``to_params``."""
    return table.write(params, _table(architecture), _sizes(architecture))


class _Renamed(Mapping):
    """A mapping under other names; nothing is read before it is asked for, so that a file may stay on disk."""

    def __init__(self, state: Mapping[str, Any], names: Mapping[str, str]):
        self._state, self._names = state, names

    def __getitem__(self, name: str) -> Any:
        return self._state[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sizes(architecture: Architecture) -> dict[str, int]:
    patch = architecture.image.patch_size
    return {"rgb": 3, "down": patch, "across": patch}


def _custom_text(architecture: Architecture) -> bool:
    """Whether OpenCLIP builds this model as CustomTextCLIP, whose text tensors are named below ``text.``."""
    return architecture.image.from_timm


def _canonical(name: str, architecture: Architecture) -> str:
    """The name that ``_table`` knows for one in a file."""
    if not _custom_text(architecture):
        return name.removeprefix("text.")
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    return f"text.{name}" if name.startswith(text) else name


def _norm(theirs: str, ours: str) -> tuple[tuple[str, str, str], ...]:
    return (f"{theirs}.weight", f"{ours}/scale", VECTOR), (f"{theirs}.bias", f"{ours}/bias", VECTOR)


BLOCK = (
    *_norm("ln_1", "norm_1"),
    ("attn.in_proj_weight", "attention/qkv", "(three heads dim) width -> width three heads dim"),
    ("attn.in_proj_bias", "attention/qkv_bias", "(three heads dim) -> three heads dim"),
    ("attn.out_proj.weight", "attention/out", "width (heads dim) -> heads dim width"),
    ("attn.out_proj.bias", "attention/out_bias", VECTOR),
    *_norm("ln_2", "norm_2"),
    ("mlp.c_fc.weight", "mlp/up", MATRIX),
    ("mlp.c_fc.bias", "mlp/up_bias", VECTOR),
    ("mlp.c_proj.weight", "mlp/down", MATRIX),
    ("mlp.c_proj.bias", "mlp/down_bias", VECTOR),
)

VIT = (
    ("conv1.weight", "patch_embedding", "width rgb down across -> (down across rgb) width"),
    ("class_embedding", "class_embedding", VECTOR),
    ("positional_embedding", "position_embedding", ROWS),
    *_norm("ln_post", "norm_post"),
    ("proj", "projection", ROWS),
)

TEXT = (
    ("token_embedding.weight", "token_embedding", ROWS),
    ("positional_embedding", "position_embedding", ROWS),
    *_norm("ln_final", "norm_final"),
)

PROJECTION = (("text_projection", "projection", ROWS),)
PROJECTION_WITH_BIAS = (
    ("text_projection.weight", "projection", MATRIX),
    ("text_projection.bias", "projection_bias", VECTOR),
)


def _table(architecture: Architecture) -> list[Row]:
    """Every tensor of an architecture."""
    return [
        *_image(architecture.image),
        *_text(architecture.text, "text." if _custom_text(architecture) else ""),
        Row("logit_scale", "logit_scale", SCALAR),
        *([] if architecture.init_logit_bias is None else [Row("logit_bias", "logit_bias", SCALAR)]),
    ]


def _image(tower: ImageTower) -> list[Row]:
    return [
        *rows("visual.", "image/", *VIT),
        *(rows("visual.", "image/", *_norm("ln_pre", "norm_pre")) if tower.norm_pre else ()),
        *rows("visual.transformer.resblocks.{layer}.", "image/transformer/blocks/", *BLOCK),
    ]


def _text(tower: TextTower, prefix: str) -> list[Row]:
    projection = PROJECTION_WITH_BIAS if tower.projection_bias else PROJECTION
    return [
        *rows(prefix, "text/", *TEXT),
        *(rows(prefix, "text/", *projection) if tower.projection else ()),
        *rows(f"{prefix}transformer.resblocks.{{layer}}.", "text/transformer/blocks/", *BLOCK),
    ]
