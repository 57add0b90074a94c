"""Loaded parameters in the tree of another model: matching leaves are taken, position embeddings are resized, and every
other leaf is reported.

A run starts from published weights this way (``config.model.init_from``). Pure functions of trees.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.errors import UserError, nearest
from clip_jax.models.clip import Params
from clip_jax.models.resize import class_tokens, resize_positions
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
    "query_heads",
    "rotary_grid",
    "shifted_mask",
)
"""Settings that change what a tower computes, but no name and no shape of its tensors."""


class Report(NamedTuple):
    """The path of every tensor (``image/norm_post/scale``), grouped by what was done with it."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    initialized: tuple[str, ...]
    """In the model, but missing from the weights or of another shape: the model's own initial values."""
    ignored: tuple[str, ...]
    """In the weights, but not in the model."""
    differing: tuple[str, ...]
    """Settings that differ between the model and the weights (``differences``)."""

    def lines(self) -> list[str]:
        """For the user: the number of loaded tensors, and every other one by name."""
        return [f"{len(self.loaded)} tensors loaded", *(line for line in self.every() if not line.startswith("loaded"))]

    def every(self) -> list[str]:
        """One line per tensor."""
        return [f"{kind} {name}" for kind, names in self._asdict().items() for name in names]


def differences(target: Preset, loaded: Preset) -> dict[str, str]:
    """The settings that no shape shows and in which the weights differ from the model: name -> description."""
    ours, theirs = _unseen_settings(target), _unseen_settings(loaded)
    both = [name for name in ours if name in theirs]  # A ResNet has no activation, for example.
    return {
        name: f"{theirs[name]} in the weights, {ours[name]} in the model" for name in both if ours[name] != theirs[name]
    }


def _unseen_settings(preset: Preset) -> dict[str, Any]:
    """By name, as in ``image/activation``."""
    towers = {"image": preset.architecture.image, "text": preset.architecture.text}
    return {
        **{
            f"{name}/{field}": value
            for name, tower in towers.items()
            for field, value in dataclasses.asdict(tower).items()
            if field in UNSEEN
        },
        "preprocess/mean": list(preset.preprocess.mean),
        "preprocess/std": list(preset.preprocess.std),
        "tokenizer": preset.tokenizer,
    }


def merge(
    target: Params, loaded: Params, allow: Sequence[str] = (), differing: Mapping[str, str] = MappingProxyType({})
) -> tuple[Params, Report]:
    """``target`` (arrays, or their shapes) with the values of ``loaded``, wherever a leaf has the same path and shape.

    Position embeddings of another length are resized. Raises UserError for a leaf that is missing, left over or of
    another shape, and for a setting in ``differing`` (from ``differences``), unless a pattern in ``allow`` (``text/*``)
    matches its path; then the target's own leaf stays.
    """
    wanted, given = flatten_dict(target, sep="/"), flatten_dict(loaded, sep="/")
    result, kinds, refused = {}, {"loaded": [], "resized": [], "initialized": []}, []
    for name, leaf in wanted.items():
        value = given.get(name)
        if value is not None and value.shape == leaf.shape:
            kind = "loaded"
        elif value is not None and _resizable(name, value, leaf):
            value, kind = resize_positions(value, leaf.shape[0], image=name.startswith("image/")), "resized"
        else:
            if value is None:
                refused.append((name, "missing"))
            else:
                refused.append((name, f"{list(value.shape)} in the weights, {list(leaf.shape)} in the model"))
            value, kind = leaf, "initialized"
        result[name] = value
        kinds[kind].append(name)
    ignored = [name for name in given if name not in wanted]
    refused += [(name, "not in the model") for name in ignored]
    _check_allowed([*refused, *differing.items()], allow, [*wanted, *given, *differing, "tokenizer"])
    report = Report(**{k: tuple(v) for k, v in kinds.items()}, ignored=tuple(ignored), differing=tuple(differing))
    return unflatten_dict(result, sep="/"), report


def _check_allowed(refused: Sequence[tuple[str, str]], allow: Sequence[str], names: Sequence[str]) -> None:
    """UserError for names with their reasons that no pattern allows, or for a pattern that matches no name at all."""
    bad = [f"{name} ({why})" for name, why in refused if not any(fnmatchcase(name, pattern) for pattern in allow)]
    if bad:
        more = f", and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"weights that do not fit the model: {', '.join(bad[:3])}{more}; allow by name what may differ")
    if unknown := [pattern for pattern in allow if not any(fnmatchcase(name, pattern) for name in names)]:
        raise UserError(f"{unknown[0]}: allowed, but no tensor has that name{nearest(unknown[0], names)}")


def _resizable(name: str, value: Any, leaf: Any) -> bool:
    if not name.endswith(POSITIONS) or value.shape[1:] != leaf.shape[1:]:
        return False
    if name.startswith("text/"):
        return True
    lengths = len(value), leaf.shape[0]
    firsts = [class_tokens(length) for length in lengths]
    return firsts[0] == firsts[1] and all(
        math.isqrt(length - firsts[0]) ** 2 == length - firsts[0] for length in lengths
    )
