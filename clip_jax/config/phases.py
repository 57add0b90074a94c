"""The phases of a run: what changes in the middle of it.

``config.phases = ({"start": 5000, "model.image.image_size": 384},)`` trains on larger images after step 5000. A run
without it has one phase. Each phase keeps the settings of the one before it, except for its own.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from clip_jax.config.flat import flatten, set_value, typed
from clip_jax.errors import UserError, nearest

MAY_CHANGE = (
    "model.image.image_size",
    "model.text.context_length",
    "data.text_buckets",
    "model.patch_dropout",
    "model.frozen",
    "model.remat",
    "micro_batch",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.cooldown_steps",
    "optimizer.cooldown_examples",
    "optimizer.cooldown_epochs",
    "optimizer.cooldown_form",
    "optimizer.rate_factors",
)


class PhaseConfig(NamedTuple):
    """A part of a run with settings of its own."""

    start: int
    """The number of steps before it."""
    config: ConfigDict


def phases(config: ConfigDict) -> tuple[PhaseConfig, ...]:
    """The phases in order, the first of which starts at 0."""
    found = [PhaseConfig(0, config)]
    for overrides in config.phases:
        changed = ConfigDict(found[-1].config.to_dict(), type_safe=False)
        known = flatten(changed)
        for key, value in overrides.items():
            if key != "start":
                set_value(changed, key, typed("phases", key, value, known[key]))
        found.append(PhaseConfig(overrides["start"], changed))
    return tuple(found)


def may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.startswith("objectives.")


def check(config: ConfigDict, where: str) -> None:
    """Raises UserError for a phase that cannot be; its settings are checked like those of a run."""
    known, before = flatten(config), 0
    for number, phase in enumerate(config.phases):
        name = f"{where}: phases[{number}]"
        start = _start(phase, name)
        if start <= before:
            raise UserError(f"{name}: start={start} must be after the phase before it, which starts at {before}")
        before = start
        for key, value in phase.items():
            if key == "start":
                continue
            if key not in known:
                raise UserError(f"{name}: {key} is not a setting{nearest(key, known)}")
            if not may_change(key):
                raise UserError(
                    f"{name}: {key} cannot change in the middle of a run; {', '.join(MAY_CHANGE)} and objectives.* can"
                )
            typed(name, key, value, known[key])


def _start(phase: Any, name: str) -> int:
    if not isinstance(phase, dict) or type(phase.get("start")) is not int:
        raise UserError(f'{name}: a phase is {{"start": STEP, "some.setting": value, ...}}')
    return phase["start"]
