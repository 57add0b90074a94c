"""What a run is: reading recipes and overrides, checking, resolving. The settings themselves are in ``settings.py``.

A recipe (``configs/*.py``) is a function ``get_config`` that starts from ``defaults()``. Everything is checked before
anything heavy starts, and every mistake is one line.
"""

import ast
import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clip_jax import presets
from clip_jax.errors import UserError, nearest
from clip_jax.models.resnet import ResNetTower
from clip_jax.settings import AT_LEAST, AUTO, CHOICES, ONLY_WITH, UNITS, defaults

__all__ = ["AUTO", "check", "defaults", "duration", "load", "override", "resolve_preset"]

PUBLISHED = ("clipa", "siglip", "siglip2")
"""Tokenizers with the vocabulary of another model, whose end token has a low id: their models pool the last place."""

MAY_CHANGE_ON_RESTART = ("micro_batch", "mesh", "eval", "checkpoint", "log")
HOW_IT_IS_COMPUTED = ("model.scan", "model.remat", "model.attention")
"""May change as well: other devices have other memory, and the numbers stay but for rounding."""


def load(recipe: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """``configs/name.py`` or ``configs/name.py:argument`` with ``key=value`` overrides, checked."""
    return override(_run_recipe(recipe), overrides or {}, recipe)


def _run_recipe(recipe: str) -> ConfigDict:
    file, _, argument = recipe.partition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"{file}: no such recipe{nearest(file, known)}; --config takes a local .py file")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:  # a recipe is the user's code: its own mistakes are told in one line like others
        raise UserError(f"{file}: {type(error).__name__}: {error}") from error
    check(config, file)
    return config


def override(config: ConfigDict, overrides: Mapping[str, str], place: str) -> ConfigDict:
    """A copy of the config with ``{"optimizer.learning_rate": "1e-3", ...}`` set, checked."""
    config = ConfigDict(config.to_dict(), type_safe=False)
    known = flatten(defaults())
    for key, text in overrides.items():
        if key not in known:
            raise UserError(f"--config.{key}={text}: {key} is not a setting{nearest(key, known)}")
        if _unit(key):  # of several durations the command line's wins
            for sibling, default in _siblings(key).items():
                _set(config, sibling, default)
        _set(config, key, _parse(key, text, known[key]))
    check(config, place)
    return config


def check(config: ConfigDict, place: str) -> None:
    """Raises UserError for the first thing wrong that can be known without data or devices."""
    known, given = flatten(defaults()), flatten(config)
    for key in given:
        if key not in known:
            raise UserError(f"{place}: {key} is not a setting{nearest(key, known)}")
    for key, default in known.items():
        if key not in given:
            raise UserError(f"{place}: {key} is missing; a recipe starts from config.defaults()")
        given[key] = _typed(place, key, given[key], default)
        _set(config, key, given[key])
    for key, choices in CHOICES.items():
        if given[key] not in choices:
            known_choices = ", ".join(c or '""' for c in choices)
            raise UserError(
                f"{place}: {key}={given[key]!r} is not one of {known_choices}{nearest(given[key], choices)}"
            )
    for key, bound in AT_LEAST.items():
        if given[key] < bound:
            raise UserError(f"{place}: {key}={given[key]} must be at least {bound}")
    if given["micro_batch"] != AUTO and given["micro_batch"] < 1:
        raise UserError(f"{place}: micro_batch={given['micro_batch']} must be at least 1, or -1 for the whole batch")
    if given["ema_decay"] >= 1:
        raise UserError(f"{place}: ema_decay={given['ema_decay']} must be below 1, as 0.9999; 0 keeps no average")
    for key in known:
        if _unit(key) and given[key] != AUTO:
            others = [k for k in _siblings(key) if k != key and given[k] != AUTO]
            if others:
                raise UserError(f"{place}: {key} and {others[0]} are both given; leave one of them at -1")
            lowest_allowed = 0 if "warmup" in key or "cooldown" in key else 1e-9
            if given[key] < lowest_allowed:
                raise UserError(f"{place}: {key}={given[key]} must be positive, or -1 for not given")
    if all(given[unit] == AUTO for unit in UNITS):
        raise UserError(f"{place}: how long to train? give one of steps, examples, epochs")
    preset = presets.preset(given["model.name"])
    resolved = given | {"tokenizer.kind": given["tokenizer.kind"] or preset.tokenizer}
    for key, needs, values in ONLY_WITH:
        if given[key] != known[key] and resolved[needs] not in values:
            way_out = f"leave it out or set {needs}={' or '.join(values)}"
            raise UserError(f"{place}: {key} has no effect with {needs}={resolved[needs]}; {way_out}")
    if given["optimizer.schedule"] == "cosine" and any(given[f"optimizer.cooldown_{unit}"] != AUTO for unit in UNITS):
        raise UserError(f"{place}: optimizer.cooldown: a cosine ends at zero by itself; use it with rsqrt or constant")
    if given["model.patch_dropout"] > 0 and isinstance(preset.architecture.image, ResNetTower):
        raise UserError(f"{place}: model.patch_dropout: {given['model.name']} is a ResNet and has no patches to drop")
    for key in ("model.mean", "model.std"):
        if len(given[key]) not in (0, 3):
            raise UserError(f"{place}: {key}={given[key]}: three numbers, or () for the preset's")
    for template in given["eval.templates"]:
        if "{}" not in str(template):
            raise UserError(f"{place}: eval.templates: {template!r} has no {{}} for the class name")
    low, high = (*given["data.crop_scale"], None, None)[:2]
    if low is None or high is None or not 0 < low <= high <= 1:
        raise UserError(f"{place}: data.crop_scale={given['data.crop_scale']}: two areas, 0 < smallest <= largest <= 1")


def duration(config: ConfigDict, key: str, samples: int) -> int | None:
    """A length of time in steps, or None where none of its three units is given.

    ``key`` is the prefix: ``""`` (the whole run), ``"optimizer.warmup_"``, ``"eval.every_"``, ``"checkpoint.every_"``.
    Epochs and examples are rounded down to whole steps (warm-up and intervals: at least one).
    """
    flat = flatten(config)
    batch = config.batch_size
    steps = {
        "steps": flat[f"{key}steps"],
        "examples": flat[f"{key}examples"] // batch if flat[f"{key}examples"] != AUTO else AUTO,
        # Rounded first: 12 epochs of 100 samples must not become 11.999... epochs.
        "epochs": math.floor(round(flat[f"{key}epochs"] * samples / batch, 6))
        if flat[f"{key}epochs"] != AUTO
        else AUTO,
    }
    given = [value for value in steps.values() if value != AUTO]
    if not given:
        return None
    return max(1, given[0]) if "every" in key else given[0]


def check_lengths(config: ConfigDict, steps: int, samples: int) -> None:
    """What can only be judged once the number of training samples is known."""
    warmup = duration(config, "optimizer.warmup_", samples) or 0
    cooldown = duration(config, "optimizer.cooldown_", samples) or 0
    if steps < 1:
        raise UserError(
            f"config: the run has no step: {samples} samples at batch_size={config.batch_size}; "
            "lower batch_size or raise steps, examples or epochs"
        )
    if warmup > steps:
        raise UserError(
            f"config.optimizer.warmup: {warmup} steps of warm-up in a run of {steps}; "
            "shorten the warm-up or lengthen the run"
        )
    if warmup + cooldown > steps:
        raise UserError(
            f"config.optimizer.cooldown: {warmup} steps of warm-up and {cooldown} of cool-down in a run of {steps}; "
            "shorten one of them or lengthen the run"
        )


def resolve_preset(config: ConfigDict, vocab_size: int | None = None) -> presets.Preset:
    """The named preset with the config's own sizes, activation and pixel statistics in place of the automatic ones.

    ``vocab_size`` is the tokenizer's, which the text tower takes; a given ``model.text.vocab_size`` wins.
    """
    named = presets.preset(config.model.name)
    architecture = named.architecture

    def tower(name, shape, given):
        sizes = {size: value for size, value in given.items() if value != AUTO}
        fields = {field.name for field in dataclasses.fields(shape)}
        for size in sizes:
            if size not in fields:
                known = ", ".join(sorted(fields))
                raise UserError(f"config.model.{name}.{size}: {config.model.name} has no such size; it has {known}")
        if config.model.activation and "activation" in fields:  # a ResNet has ReLU
            sizes["activation"] = config.model.activation
        return dataclasses.replace(shape, **sizes)

    text = tower("text", architecture.text, config.model.text)
    kind = config.tokenizer.kind or named.tokenizer
    if vocab_size is not None and config.model.text.vocab_size == AUTO:
        # A published model keeps the rows that its vocabulary leaves unused: CLIPA has 32,000 for BERT's 30,522.
        published = kind == named.tokenizer and kind in PUBLISHED
        text = dataclasses.replace(text, vocab_size=max(vocab_size, text.vocab_size) if published else vocab_size)
    if text.pooling == "argmax" and kind in PUBLISHED:
        raise UserError(
            f"config.tokenizer.kind={kind}: {config.model.name} pools a text at its highest token, which is not "
            "this tokenizer's end token; use clip or sentencepiece"
        )
    architecture = dataclasses.replace(
        architecture,
        image=tower("image", architecture.image, config.model.image),
        text=text,
        embed_dim=architecture.embed_dim if config.model.embed_dim == AUTO else config.model.embed_dim,
    )
    if config.loss.name == "sigmoid":  # Zhai et al. 2023, section 3.2: few of all logits are pairs
        architecture = dataclasses.replace(architecture, init_logit_scale=math.log(10.0), init_logit_bias=-10.0)
    preprocess = named.preprocess._replace(
        mean=config.model.mean or named.preprocess.mean, std=config.model.std or named.preprocess.std
    )
    check_architecture(architecture, named.architecture)
    if config.model.attention == "cudnn":
        check_heads(architecture)
    return presets.Preset(architecture, preprocess, kind)


def check_architecture(architecture: presets.Architecture, named: presets.Architecture) -> None:
    """Sizes that do not go together, of an architecture derived from a named one."""
    image, text = architecture.image, architecture.text
    published = (image.image_size, image.patch_size) == (named.image.image_size, named.image.patch_size)
    if image.image_size % image.patch_size and not published:  # SigLIP at 384 px cuts the last pixels off
        raise UserError(
            f"config.model.image: image_size={image.image_size} is not a multiple of patch_size={image.patch_size}"
        )
    for name, tower in (("image", image), ("text", text)):
        for size, value in dataclasses.asdict(tower).items():
            if type(value) is int and value < 1:
                raise UserError(f"config.model.{name}.{size}={value} must be at least 1")
        if tower.width % tower.heads:
            raise UserError(f"config.model.{name}: width={tower.width} does not divide into heads={tower.heads}")


def check_heads(architecture: presets.Architecture) -> None:
    """cuDNN's kernel takes heads of 8, 16, ... features."""
    for name, tower in (("image", architecture.image), ("text", architecture.text)):
        if not isinstance(tower, ResNetTower) and tower.width // tower.heads % 8:
            raise UserError(
                f"config.model.{name}: width={tower.width} and heads={tower.heads} make heads of "
                f"{tower.width // tower.heads} features; model.attention=cudnn takes multiples of 8"
            )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys that a restart may not change and that differ."""
    old, new = flatten(old), flatten(new)
    changed = [k for k in sorted(old.keys() | new.keys()) if _plain(old.get(k)) != _plain(new.get(k))]
    return [key for key in changed if key.split(".")[0] not in MAY_CHANGE_ON_RESTART and key not in HOW_IT_IS_COMPUTED]


def from_json(values: Mapping[str, Any], place: str) -> ConfigDict:
    """A config that ``to_json`` wrote, checked; no code runs. A setting that came later has its default."""
    config = defaults()
    config.update(dict(values))
    check(config, place)
    return config


def to_json(config: ConfigDict) -> dict[str, Any]:
    """As a nested dict of plain values; automatic sizes stay automatic."""
    return json.loads(json.dumps(config.to_dict()))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optimizer.learning_rate": 1e-3, ...}``"""
    flat = {}
    for key, value in config.items():
        flat |= (
            flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping | ConfigDict) else {f"{prefix}{key}": value}
        )
    return flat


def _unit(key: str) -> bool:
    """Whether a key gives a length of time in one of several units (``log.every_steps`` has no other units)."""
    return any(key.endswith(unit) for unit in UNITS) and len(_siblings(key)) == len(UNITS)


def _siblings(key: str) -> dict[str, Any]:
    known = flatten(defaults())
    for unit in UNITS:
        if key.endswith(unit):
            prefix = key.removesuffix(unit)
            return {f"{prefix}{u}": known[f"{prefix}{u}"] for u in UNITS if f"{prefix}{u}" in known}
    return {}


def _set(config: ConfigDict, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
    config[last] = value


def _parse(key: str, text: str, default: Any) -> Any:
    """The value of ``--config.key=text``, by the type of the default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # of the wrong type, which _typed says


def _typed(place: str, key: str, value: Any, default: Any) -> Any:
    """The value in the default's type, where nothing is lost; UserError otherwise."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float) and is_number:
        return float(value)
    if isinstance(default, int) and not isinstance(default, bool) and is_number and value == int(value):
        return int(value)
    if isinstance(default, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(value)
    if type(value) is type(default):
        return value
    kind: Callable | str = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}.get(
        type(default).__name__, "a tuple"
    )
    raise UserError(f"{place}: {key}={value!r} must be {kind} (default {default!r})")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
