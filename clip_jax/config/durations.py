"""Lengths of time: steps, examples or epochs, converted to steps in one place."""

import math

from ml_collections import ConfigDict

from clip_jax.config.flat import flatten
from clip_jax.errors import UserError
from clip_jax.settings import AUTO


def duration(config: ConfigDict, key: str, samples: int) -> int | None:
    """A length of time in steps, or None where none of its three units is given.

    ``key`` is the prefix: ``""`` (the whole run), ``"optimizer.warmup_"``, ``"eval.<name>.every_"``,
    ``"checkpoint.every_"``.
    Epochs and examples are rounded down to whole steps; intervals (``every_``) are at least one step.
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
    """Checks that need the number of training examples."""
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
