"""Configs as flat dictionaries, ``{"optimizer.learning_rate": 1e-3, ...}``, and the settings that a config may have."""

import ast
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from clip_jax.errors import UserError
from clip_jax.settings import SEVERAL, UNITS, defaults, evaluation

PATHS = ("data.train", "data.tfds_dir", "data.links_to", "tokenizer.vocab", "model.init_from")


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """``{"optimizer.learning_rate": 1e-3, ...}``"""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def known_settings(evaluations: Sequence[str] = ()) -> dict[str, Any]:
    """Every setting with its default, those of the named evaluations included."""
    named = {f"eval.{name}.{field}": value for name in evaluations for field, value in evaluation().items()}
    return flatten(defaults()) | named


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    config[last] = value


def parse(key: str, text: str, default: Any) -> Any:
    """The value of ``--config.key=text``, by the type of the default."""
    if isinstance(default, str) and not (key in SEVERAL and text.lstrip().startswith(("(", "["))):
        return text
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # of the wrong type, which ``typed`` reports


def typed(where: str, key: str, value: Any, default: Any) -> Any:
    """The value in the default's type, where nothing is lost; UserError otherwise."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) and is_number:
        return float(value)
    if (
        isinstance(default, int)
        and not isinstance(default, bool)
        and is_number
        and math.isfinite(value)
        and value == int(value)
    ):
        return int(value)
    if isinstance(default, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    if type(value) is type(default):
        return value
    if key in SEVERAL and isinstance(value, tuple | list):
        return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
    kinds: dict[str, str | Callable] = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a text",
    }
    raise UserError(
        f"{where}: {key}={value!r} must be {kinds.get(type(default).__name__, 'a tuple')} (default {default!r})"
    )


def siblings(key: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The same length of time in all of its units, with their defaults; empty for what has no other units."""
    for unit in UNITS:
        if key.endswith(unit):
            prefix = key.removesuffix(unit)
            found = {f"{prefix}{u}": known[f"{prefix}{u}"] for u in UNITS if f"{prefix}{u}" in known}
            return found if len(found) == len(UNITS) else {}  # log.every_steps has no other units
    return {}


def expand_home(key: str, value: Any) -> Any:
    """A setting with the user's home in place of ``~``, where the setting is a path or a source (``tar:~/shards``)."""
    if key not in PATHS and not re.fullmatch(r"eval\.[^.]+\.(source|train)", key):
        return value
    if isinstance(value, tuple | list):  # a mixture: sources with their weights
        return type(value)(expand_home(key, part) for part in value)
    if not isinstance(value, str):
        return value
    return re.sub(r"(^|[:,=+])~(?=/|$)", lambda found: found[1] + os.path.expanduser("~"), value)
