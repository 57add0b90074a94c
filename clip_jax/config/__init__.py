"""What a run is: reading recipes and overrides, checking, resolving. The settings themselves are in ``settings.py``.

recipes.py    recipes and overrides -> a checked config, and its form in run.json
checks.py     everything that can be known without data or devices
durations.py  lengths of time in steps, examples or epochs -> steps
resolve.py    the model that a config describes
phases.py     what changes in the middle of a run
renamed.py    settings of earlier versions
"""

from clip_jax.config.checks import check
from clip_jax.config.durations import check_lengths, duration
from clip_jax.config.flat import flatten
from clip_jax.config.phases import PhaseConfig, phases
from clip_jax.config.recipes import differences, from_json, later_settings, load, override, to_json
from clip_jax.config.resolve import resolve_preset
from clip_jax.settings import AUTO, defaults, evaluation

__all__ = [
    "AUTO",
    "PhaseConfig",
    "check",
    "check_lengths",
    "defaults",
    "differences",
    "duration",
    "evaluation",
    "flatten",
    "from_json",
    "later_settings",
    "load",
    "override",
    "phases",
    "resolve_preset",
    "to_json",
]
