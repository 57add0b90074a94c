"""Checks of a config: everything that can be known without data or devices."""

import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from clip_jax import presets
from clip_jax.config import phases
from clip_jax.config.flat import expand_home, flatten, known_settings, set_value, siblings, typed
from clip_jax.data import templates
from clip_jax.errors import UserError, nearest
from clip_jax.objectives import OBJECTIVES
from clip_jax.settings import (
    AUTO,
    EVALUATION_CHOICES,
    EVALUATION_RANGES,
    ONLY_WITH,
    UNITS,
    choices,
    ranges,
)


def check(config: ConfigDict, where: str) -> None:
    """Raises UserError for the first mistake; ``where`` is the recipe or the folder that the config comes from."""
    given = _check_names_and_types(config, where)
    evaluations = tuple(config.eval)
    _check_choices(given, where, evaluations)
    _check_ranges(given, where, evaluations)
    _check_lengths_of_time(given, where, known_settings(evaluations))
    _check_combinations(given, where)
    _check_tuples(given, where, evaluations)
    _check_probes(given, where, evaluations)
    phases.check(config, where)
    for number, phase in enumerate(phases.phases(config)[1:]):
        alone = ConfigDict(phase.config.to_dict(), type_safe=False)
        alone.phases = ()
        check(alone, f"{where}: phases[{number}]")


def _check_names_and_types(config: ConfigDict, where: str) -> dict[str, Any]:
    for name, fields in config.eval.items():
        if not isinstance(fields, Mapping | ConfigDict):
            raise UserError(
                f"{where}: eval.{name} is a section: config.eval.{name} = evaluation(source={fields!r}, ...)"
            )
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"{where}: eval.{name}: a name is letters, digits, _ and -; it names metrics")
    known, given = known_settings(tuple(config.eval)), flatten(config)
    for key in given:
        if key not in known:
            raise UserError(f"{where}: {key} is not a setting{nearest(key, known)}")
    for key, default in known.items():
        if key not in given:
            raise UserError(
                f"{where}: {key} is missing; a recipe starts from config.defaults(), an evaluation from evaluation()"
            )
        given[key] = expand_home(key, typed(where, key, given[key], default))
        set_value(config, key, given[key])
    return given


def _check_choices(given: Mapping[str, Any], where: str, evaluations: tuple[str, ...]) -> None:
    named = {f"eval.{name}.{key}": v for name in evaluations for key, v in EVALUATION_CHOICES.items()}
    for key, allowed in (choices() | named).items():
        if given[key] not in allowed:
            shown = ", ".join(c or '""' for c in allowed)
            raise UserError(f"{where}: {key}={given[key]!r} is not one of {shown}{nearest(given[key], allowed)}")


def _check_ranges(given: Mapping[str, Any], where: str, evaluations: tuple[str, ...]) -> None:
    named = {f"eval.{name}.{key}": v for name in evaluations for key, v in EVALUATION_RANGES.items()}
    for key, allowed in (ranges() | named).items():
        if given[key] not in allowed:
            raise UserError(f"{where}: {key}={given[key]} must be {allowed}")


def _check_lengths_of_time(given: Mapping[str, Any], where: str, known: Mapping[str, Any]) -> None:
    for key in known:
        units = siblings(key, known)
        if not units or given[key] == AUTO:
            continue
        others = [k for k in units if k != key and given[k] != AUTO]
        if others:
            raise UserError(f"{where}: {key} and {others[0]} are both given; leave one of them at -1")
        lowest = 0 if key.startswith(("optimizer.warmup_", "optimizer.cooldown_")) else 1e-9
        if given[key] < lowest:
            raise UserError(f"{where}: {key}={given[key]} must be positive, or -1 for not given")
    if all(given[unit] == AUTO for unit in UNITS):
        raise UserError(f"{where}: how long to train? give one of steps, examples, epochs")


def _check_combinations(given: Mapping[str, Any], where: str) -> None:
    """A setting that another setting leaves without effect is a mistake."""
    preset = presets.preset(given["model.name"])
    known = known_settings()
    resolved = dict(given) | {"tokenizer.kind": given["tokenizer.kind"] or preset.tokenizer}
    for key, needs, values in ONLY_WITH:
        if given[key] != known[key] and resolved[needs] not in values:
            way_out = f"leave it out or set {needs}={' or '.join(values)}"
            raise UserError(f"{where}: {key} has no effect with {needs}={resolved[needs]}; {way_out}")
    if given["model.attention"] == "cudnn" and given["model.dtype"] != "bfloat16":
        way_out = "leave it out or set model.dtype=bfloat16"
        raise UserError(
            f"{where}: model.attention=cudnn has no effect with model.dtype={given['model.dtype']}; {way_out}"
        )
    if given["optimizer.schedule"] == "cosine" and any(given[f"optimizer.cooldown_{unit}"] != AUTO for unit in UNITS):
        raise UserError(f"{where}: optimizer.cooldown: a cosine ends at zero by itself; use it with wsd or rsqrt")
    if given["optimizer.schedule"] == "wsd" and all(given[f"optimizer.cooldown_{unit}"] == AUTO for unit in UNITS):
        raise UserError(f"{where}: optimizer.schedule=wsd decays in a cooldown: give optimizer.cooldown_steps")
    if given["optimizer.layer_decay"] != 1 and preset.architecture.image.block is None:
        raise UserError(f"{where}: optimizer.layer_decay: {given['model.name']} is a ResNet, which has no blocks")
    if given["model.patch_dropout"] > 0 and preset.architecture.image.block is None:
        raise UserError(f"{where}: model.patch_dropout: {given['model.name']} is a ResNet and has no patches to drop")
    weights = {key: value for key, value in given.items() if re.fullmatch(r"objectives\.[^.]+\.weight", key)}
    if not any(weights.values()):
        raise UserError(f"{where}: nothing to train: give one of {', '.join(weights)} a weight above 0")
    compares = any(spec.compares and given[f"objectives.{name}.weight"] > 0 for name, spec in OBJECTIVES.items())
    if given["batch_size"] == 1 and compares:
        raise UserError(f"{where}: batch_size=1: a pair is contrasted with the others of its batch; take 2 or more")


def _check_tuples(given: Mapping[str, Any], where: str, evaluations: tuple[str, ...]) -> None:
    for key in ("model.mean", "model.std"):
        if given[key] and not _are_numbers(given[key], 3, above=0 if key == "model.std" else -math.inf):
            raise UserError(f"{where}: {key}={given[key]}: three numbers (of std: above 0), or () for the preset's")
    for key in ("model.frozen", "model.init_from_allow"):
        if not all(isinstance(pattern, str) for pattern in given[key]):
            raise UserError(f"{where}: {key}={given[key]}: patterns of parameters' names, such as ('image/*',)")
    for factors in given["optimizer.rate_factors"]:
        if not isinstance(factors, Mapping) or not _are_numbers(tuple(factors.values()), len(factors), above=-1e-9):
            example = '({"image/*": 0.1},)'
            raise UserError(f"{where}: optimizer.rate_factors: {factors} is not patterns with factors, as in {example}")
    _check_mixture(given, where)
    lengths = given["data.text_buckets"]
    if not all(type(length) is int and length > 1 for length in lengths) or sorted(set(lengths)) != list(lengths):
        raise UserError(f"{where}: data.text_buckets={lengths}: lengths in tokens from the shortest up: (16, 32, 77)")
    jitter = given["data.augment.jitter"]
    if jitter and not (_are_numbers(jitter, 4, above=-1e-9) and jitter[3] <= 0.5):
        meaning = "brightness, contrast, saturation and hue, at least 0 and the hue at most 0.5; or ()"
        raise UserError(f"{where}: data.augment.jitter={jitter}: {meaning}")
    for key in ("data.image_embeddings", "objectives.distillation.stored"):
        if given[key] and (jitter or given["data.augment.flip"] or given["data.augment.gray"]):
            raise UserError(f"{where}: data.augment has no effect with {key}, which is for known images; leave it out")
    if given["data.augment.where"] == "device":
        if not (jitter or given["data.augment.flip"] or given["data.augment.gray"]):
            raise UserError(f"{where}: data.augment.where=device has no effect without flip, jitter or gray")
        if given["data.augment.flip"] and given["objectives.grounding.weight"]:
            raise UserError(
                f"{where}: data.augment.where=device: the texts of objectives.grounding are made by the workers, which "
                "do not know of a mirrored image; leave it at host"
            )
    if not jitter and given["data.augment.jitter_probability"] != 1:
        raise UserError(f"{where}: data.augment.jitter_probability has no effect without data.augment.jitter")
    for name in evaluations:
        templates.check(f"{where}: eval.{name}.templates", given[f"eval.{name}.templates"])
    for key, highest, meaning in (
        ("crop_scale", 1, "two areas, 0 < smallest <= largest <= 1"),
        ("crop_ratio", math.inf, "two aspect ratios, 0 < smallest <= largest"),
    ):
        values = given[f"data.{key}"]
        if not _are_numbers(values, 2, above=0) or not values[0] <= values[1] <= highest:
            raise UserError(f"{where}: data.{key}={values}: {meaning}")


def _check_probes(given: Mapping[str, Any], where: str, evaluations: tuple[str, ...]) -> None:
    for name in evaluations:
        protocol, source, train = (given[f"eval.{name}.{field}"] for field in ("protocol", "source", "train"))
        if train and protocol != "probe":
            raise UserError(f"{where}: eval.{name}.train has no effect with protocol={protocol}; it is for probe")
        if protocol == "probe" and source and not train:
            raise UserError(f"{where}: eval.{name}.train is missing: the source that the probe is fitted on")


def _check_mixture(given: Mapping[str, Any], where: str) -> None:
    train = given["data.train"]
    if isinstance(train, str):
        if given["data.mixture"] != "weight":
            raise UserError(f"{where}: data.mixture has no effect with a single source in data.train")
        return
    for entry in train:
        source, weight, *caption = entry if isinstance(entry, tuple) and len(entry) in (2, 3) else (None, None)
        if not isinstance(source, str) or not _are_numbers((weight,), 1, above=0) or not math.isfinite(weight):
            way_out = '(("tar:a", 1.0), ("tar:b", 4.0, "captions.de")), with weights above 0'
            raise UserError(f"{where}: data.train: {entry!r} is not a source with a weight, as in {way_out}")
        if caption and not isinstance(caption[0], str):
            raise UserError(f"{where}: data.train: {caption[0]!r} of {source} is not a caption setting")
    if not train:
        raise UserError(f"{where}: data.train is empty")


def _are_numbers(values: tuple, count: int, above: float) -> bool:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and above < v]
    return len(values) == len(numbers) == count
