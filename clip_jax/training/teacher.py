"""The weights of a teacher, a published model or another run, as constants of an objective."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from clip_jax.errors import UserError
from clip_jax.model import load
from clip_jax.models.clip import Params
from clip_jax.objectives.objective import Objective


def with_teacher(objective: Objective, where: str) -> Objective:
    """The objective with the function that loads its teachers, where it has any; ``where``: its settings."""
    if not objective.teachers:
        return objective
    return objective._replace(load_constants=partial(_load, objective, where))


def _load(objective: Objective, where: str, shardings: Any) -> Params:
    """Raises UserError for weights of another architecture."""
    wanted, found = nn.meta.unbox(objective.abstract_constants()), {}
    for number, (name, weights) in enumerate(objective.teachers):
        loaded = load(name, weights=weights) if Path(weights).is_file() else load(weights)
        params = constants(loaded.params, loaded.batch_stats, wanted[str(number)]["params"])
        shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (params, wanted[str(number)])]
        if shapes[0] != shapes[1]:
            raise UserError(f"{where}: {weights} has not the weights of a {name}")
        found[str(number)] = jax.device_put(params, shardings[str(number)])
    return found


def constants(params: Params, batch_stats: Params, names: Iterable[str]) -> Params:
    """A loaded model's parameters as an objective takes them: those that it names."""
    return {
        "params": {name: nn.meta.unbox(params[name]) for name in names if name in params},
        "batch_stats": batch_stats,
    }
