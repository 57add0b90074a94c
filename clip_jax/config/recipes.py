"""Recipes (``configs/*.py``, or the shipped ones by name) and overrides -> a config, and its form in a run folder.

A recipe is a function ``get_config`` that starts from ``defaults()``. Everything is checked before anything heavy
starts, and every mistake is one line.
"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from clip_jax.config.checks import check
from clip_jax.config.flat import flatten, known_settings, parse, set_value, siblings
from clip_jax.config.renamed import RENAMED, upgrade
from clip_jax.errors import UserError, nearest
from clip_jax.settings import AUTO, UNITS, defaults, evaluation

MAY_CHANGE_ON_RESTART = ("micro_batch", "mesh", "eval", "checkpoint", "log")
COMPUTE_ONLY = ("model.scan", "model.remat", "model.attention")
"""May change as well: other devices have other amounts of memory, and results change only by rounding."""
SAME_BATCHES = (
    "max_bad_share",
    "changed",
    "workers",
    "prefetch",
    "train",
    "tfds_dir",
    "truncated",
    "samples",
    "links_to",
)
"""Settings of ``data`` for the location of the data and how it is read; its fingerprint shows that it is the same."""


def load(recipe: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """``configs/name.py``, or ``name`` for a shipped recipe, or either ``:argument``, with overrides, checked."""
    return override(_run_recipe(recipe), overrides or {}, recipe)


def _run_recipe(recipe: str) -> ConfigDict:
    file, _, argument = os.path.expanduser(recipe).partition(":")
    path = _recipe_file(file)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:  # a recipe is the user's code: its mistakes are reported in one line like all others
        sections = {old.partition(".")[0]: new.rpartition(".")[0] for old, new in RENAMED.items()}
        section = str(error).strip("'\"")
        moved = sections.get(section) if isinstance(error, AttributeError | KeyError) else None
        hint = f"; config.{section} is config.{moved} now" if moved else ""
        raise UserError(f"{file}: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{file}: get_config() returns {type(config).__name__}, not a config; end it with return config"
        )
    check(config, file)
    return config


def _recipe_file(file: str) -> Path:
    """A file of the user's, or the shipped recipe of that name. A name never means a file of the current folder."""
    shipped = shipped_recipes()
    if file in shipped:
        return shipped[file]
    path = Path(file).expanduser()
    if path.suffix == ".py" and path.is_file():
        return path
    here = sorted(str(p) for p in path.parent.glob("*.py")) if path.suffix and path.parent.is_dir() else []
    by_name = f", or a name of {', '.join(shipped)}" if shipped else ""
    raise UserError(f"{file}: no such recipe{nearest(file, [*here, *shipped])}; --config takes a .py file{by_name}")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file. ``configs/`` lies beside the package in a checkout, and in it when installed (see ``setup.py``)."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def override(config: ConfigDict, overrides: Mapping[str, str], where: str) -> ConfigDict:
    """A copy of the config with ``{"optimizer.learning_rate": "1e-3", ...}`` set, checked.

    ``eval.<name>.<field>`` creates an evaluation of a new name.
    """
    config = ConfigDict(config.to_dict(), type_safe=False)
    for given, text in overrides.items():
        key = RENAMED.get(given, given)
        if key.startswith("eval."):
            _, name, *field = key.split(".")
            if not field:
                way_out = f"eval.NAME.{name}" if name in evaluation() else f"{key}.source"
                raise UserError(
                    f"--config.{key}={text}: an evaluation has a name and fields: --config.{way_out}={text}"
                )
            if name not in config.eval and field[0] in evaluation():
                config.eval[name] = evaluation()
        known = known_settings(tuple(config.eval))
        if key not in known:
            raise UserError(f"--config.{key}={text}: {key} is not a setting{nearest(key, known)}")
        value = parse(key, text, known[key])
        if value != AUTO:  # a duration on the command line replaces the recipe's in other units; -1 is not one
            for sibling, default in siblings(key, known).items():
                if sibling not in overrides:  # two on the command line are a mistake, which check() finds
                    set_value(config, sibling, default)
        set_value(config, key, value)
    check(config, where)
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys that differ and that a restart may not change; lengths are checked later (``training/restart.py``)."""
    old, new = (flatten(dict(values) | {"phases": _without_computation(values["phases"])}) for values in (old, new))
    changed = [k for k in sorted(old.keys() | new.keys()) if _plain(old.get(k)) != _plain(new.get(k))]
    free = {*COMPUTE_ONLY, *UNITS, *(f"data.{name}" for name in SAME_BATCHES)}
    return [key for key in changed if key.split(".")[0] not in MAY_CHANGE_ON_RESTART and key not in free]


def _without_computation(phases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The phases without how they are computed, and only those that change something else."""
    free = (*MAY_CHANGE_ON_RESTART, *COMPUTE_ONLY)
    left = [{key: value for key, value in phase.items() if key not in free} for phase in phases]
    return [phase for phase in left if phase.keys() > {"start"}]


def from_json(values: Mapping[str, Any], where: str) -> ConfigDict:
    """A config that ``to_json`` wrote, checked; no code runs. A setting that came later has its default."""
    values, config = upgrade(values), defaults()
    for name, fields in values.pop("eval").items():  # evaluations have names that the defaults do not have
        config.eval[name] = evaluation(**fields)
    config.update(values)
    check(config, where)
    return config


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as a nested dictionary of plain values; automatic sizes stay automatic."""
    return json.loads(json.dumps(config.to_dict()))


def later_settings(values: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """The settings of a config that the older code which wrote ``values`` did not have."""
    had = flatten(upgrade(values))
    return sorted(key for key in flatten(to_json(config)) if key not in had and not key.startswith("eval."))


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value
