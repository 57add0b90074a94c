"""The weights of a teacher, a published model or another run, as constants of an objective."""

from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from clip_jax.errors import UserError
from clip_jax.model import load
from clip_jax.models.clip import Params
from clip_jax.objectives import distillation
from clip_jax.objectives.objective import Objective


def with_teacher(objective: Objective) -> Objective:
    """The objective with the function that loads its teacher, where it has one."""
    if not objective.teachers:
        return objective
    fingerprint = "; ".join(" ".join(teacher) for teacher in objective.teachers)
    return objective._replace(load_constants=partial(_load, objective), constants_fingerprint=fingerprint)


def _load(objective: Objective, shardings: Any) -> Params:
    """Raises UserError for weights of another architecture."""
    wanted, constants = nn.meta.unbox(objective.abstract_constants()), {}
    for number, (name, weights) in enumerate(objective.teachers):
        loaded = load(name, weights=weights) if Path(weights).is_file() else load(weights)
        found = distillation.constants(loaded.params, loaded.batch_stats)
        shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (found, wanted[str(number)])]
        if shapes[0] != shapes[1]:
            raise UserError(f"config.objectives.distillation.teacher_weights={weights}: not the weights of a {name}")
        constants[str(number)] = jax.device_put(found, shardings[str(number)])
    return constants
