"""Loaded parameters into the tree of another model: what fits is taken, positions are resized, the rest is said.

A model is loaded at another image size or text length this way, and a run starts from published weights
(``config.model.init_from``). Pure functions of trees.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.errors import UserError, nearest
from clip_jax.models.clip import Params
from clip_jax.models.resize import bicubic, linear
from clip_jax.presets import Preset

POSITIONS = ("position_embedding", "spatial_embedding")
UNSEEN = (
    "activation",
    "causal",
    "eos_id",
    "norm_before_pooling",
    "norm_epsilon",
    "norm_last",
    "pooling",
    "rotary_grid",
)
"""What decides a tower's numbers, and shows in no tensor's name or shape."""


class Report(NamedTuple):
    """Every tensor by its path, ``image/norm_post/scale``, under what became of it."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    initialised: tuple[str, ...]
    """In the model and not in the weights, or in another shape: left as the model starts."""
    ignored: tuple[str, ...]
    """In the weights and not in the model."""
    differing: tuple[str, ...]
    """Settings that the weights were made with and the model does not have (``differences``)."""

    def lines(self) -> list[str]:
        """For people: how many were loaded, and each that was not."""
        return [f"{len(self.loaded)} tensors loaded", *(line for line in self.every() if not line.startswith("loaded"))]

    def every(self) -> list[str]:
        """A line for each tensor."""
        return [f"{kind} {name}" for kind, names in self._asdict().items() for name in names]


def differences(target: Preset, loaded: Preset) -> dict[str, str]:
    """By name, ``image/activation``, what the weights were made with and this model has otherwise, in words."""

    def settings(preset: Preset) -> dict[str, Any]:
        towers = {"image": preset.architecture.image, "text": preset.architecture.text}
        return {
            **{
                f"{name}/{key}": value
                for name, tower in towers.items()
                for key, value in dataclasses.asdict(tower).items()
                if key in UNSEEN
            },
            **{f"preprocess/{key}": list(getattr(preset.preprocess, key)) for key in ("mean", "std")},
            "tokenizer": preset.tokenizer,
        }

    ours, theirs = settings(target), settings(loaded)
    both = [name for name in ours if name in theirs]  # A ResNet has no activation to choose.
    return {
        name: f"{theirs[name]} in the weights, {ours[name]} in the model" for name in both if ours[name] != theirs[name]
    }


def merge(
    target: Params, loaded: Params, allow: Sequence[str] = (), differing: Mapping[str, str] = MappingProxyType({})
) -> tuple[Params, Report]:
    """``target`` (arrays, or their shapes) with the leaves of ``loaded`` in their places.

    Position embeddings of another length are resized as OpenCLIP does it. A leaf that is missing, left over or of
    another shape is a UserError unless a pattern in ``allow`` (``text/*``) matches its path; then the target's own leaf
    stays. So is a setting in ``differing`` (of ``differences``).
    """
    wanted, given = flatten_dict(target, sep="/"), flatten_dict(loaded, sep="/")
    result, kinds, refused = {}, {"loaded": [], "resized": [], "initialised": []}, []
    for name, leaf in wanted.items():
        value = given.get(name)
        kind = "loaded"
        if value is not None and value.shape != leaf.shape and _resizable(name, value, leaf):
            value, kind = resize_positions(value, leaf.shape[0], image=name.startswith("image/")), "resized"
        elif value is None or value.shape != leaf.shape:
            what = (
                "missing" if value is None else f"{list(value.shape)} in the weights, {list(leaf.shape)} in the model"
            )
            if not _allowed(name, allow):
                refused.append(f"{name} ({what})")
            value, kind = leaf, "initialised"
        result[name] = value
        kinds[kind].append(name)
    ignored = [name for name in given if name not in wanted]
    refused += [f"{name} (not in the model)" for name in ignored if not _allowed(name, allow)]
    refused += [f"{name} ({what})" for name, what in differing.items() if not _allowed(name, allow)]
    if refused:
        more = f", and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"weights that do not fit the model: {', '.join(refused[:3])}{more}; allow by name what may differ"
        )
    every = [*wanted, *given, *differing]
    if unknown := [pattern for pattern in allow if not any(fnmatchcase(name, pattern) for name in every)]:
        raise UserError(f"{unknown[0]}: allowed, but no tensor has that name{nearest(unknown[0], every)}")
    report = Report(**{k: tuple(v) for k, v in kinds.items()}, ignored=tuple(ignored), differing=tuple(differing))
    return unflatten_dict(result, sep="/"), report


def resize_positions(positions: Any, length: int, *, image: bool) -> np.ndarray:
    """Position embeddings [n, width] for another number of tokens, as OpenCLIP resizes them on loading.

    An image's are a square grid, resized bicubically with antialiasing; a class token before it stays as it is.
    A text's are a line, resized linearly.
    """
    positions = np.asarray(positions)
    width = positions.shape[1]
    if not image:
        return linear(len(positions), length) @ positions
    first = _class_tokens(len(positions))
    old, new = math.isqrt(len(positions) - first), math.isqrt(length - first)
    weights, grid = bicubic(old, new), positions[first:].reshape(old, old, width)
    grid = np.einsum("ai,bj,ijw->abw", weights, weights, grid, optimize=True).reshape(new * new, width)
    return np.concatenate([positions[:first], grid])


def _resizable(name: str, value: Any, leaf: Any) -> bool:
    if not name.endswith(POSITIONS) or value.shape[1:] != leaf.shape[1:]:
        return False
    lengths = len(value), leaf.shape[0]
    if name.startswith("text/"):
        return True
    firsts = [_class_tokens(length) for length in lengths]
    return firsts[0] == firsts[1] and all(math.isqrt(n - firsts[0]) ** 2 == n - firsts[0] for n in lengths)


def _class_tokens(length: int) -> int:
    """1 where the patches are one less than all tokens: no two squares differ by one."""
    return int(math.isqrt(length) ** 2 != length)


def _allowed(name: str, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in allow)
