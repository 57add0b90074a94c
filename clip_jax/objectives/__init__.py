"""Training objectives: the terms of a step's loss, one file each.

``OBJECTIVES`` is the one list of them. A new objective is a file with a ``SPEC`` and an entry here; its settings,
checks, state, micro-batches and its part of the plan follow from the entry.
"""

from clip_jax.objectives import captioning, contrastive, distillation, grounding, selection, self_distillation
from clip_jax.objectives.objective import ObjectiveSpec

OBJECTIVES: dict[str, ObjectiveSpec] = {
    "contrastive": contrastive.SPEC,
    "captioning": captioning.SPEC,
    "grounding": grounding.SPEC,
    "distillation": distillation.SPEC,
    "self_distillation": self_distillation.SPEC,
    "selection": selection.SPEC,
}
