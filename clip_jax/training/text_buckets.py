"""Text length buckets (``config.data.text_buckets``): a batch's texts are cut to the shortest one that holds them all.

A causal tower that pools at the end token never looks at the padding after it, so embeddings stay the same, and the
time for padding is saved. The length follows from the global batch alone, not from the part of a process: the compiled
program is the same everywhere, and a run that resumes on another number of hosts has the same lengths. Each length is
compiled when it first occurs.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int
from ml_collections import ConfigDict

from clip_jax.errors import UserError
from clip_jax.models.clip import Architecture
from clip_jax.models.text import TextTower
from clip_jax.objectives import OBJECTIVES


def cut(
    text: Int[np.ndarray, "rows length"], tower: TextTower, lengths: Sequence[int]
) -> Int[np.ndarray, "rows bucket"]:
    """A process's rows of the batch's texts, cut to the bucket of the global batch; all processes call it together.

    They exchange one number, the longest text of each, because none of them reads the captions of the others.
    """
    longest = longest_text(text, tower)
    if jax.process_count() > 1:
        longest = int(np.max(multihost_utils.process_allgather(np.int32(longest))))
    return text[:, : next(length for length in lengths if longest <= length)]


def longest_text(text: Int[np.ndarray, "rows length"], tower: TextTower) -> int:
    """The length of the longest text up to its end token, at which the tower pools."""
    ends = np.argmax(text if tower.pooling == "argmax" else text == tower.eos_id, axis=1)
    return int(ends.max()) + 1


def check(config: ConfigDict, architecture: Architecture) -> None:
    """Raises UserError for lengths that do not fit the model, and for a model or an objective that needs all tokens."""
    lengths, tower = config.data.text_buckets, architecture.text
    if not lengths:
        return
    where = f"config.data.text_buckets={tuple(lengths)}"
    if not tower.causal or tower.pooling not in ("argmax", "eos"):
        raise UserError(
            f"{where}: only for causal text towers that pool at the end token, for which padding means nothing; "
            f"{config.model.name} is not one: leave it out"
        )
    if lengths[-1] != tower.context_length:
        raise UserError(f"{where}: the last one must be the context length, {tower.context_length}")
    others = [n for n, spec in OBJECTIVES.items() if spec.needs_full_texts and config.objectives[n].weight > 0]
    if others or config.objectives.contrastive.negatives:
        what = f"objectives.{others[0]}" if others else "objectives.contrastive.negatives"
        raise UserError(f"{where}: not with {what}, which has texts of the full length; leave it out")
