"""Bias metrics from predictions and rankings of labeled sources.

They describe a model on a source and its labels, no more: groups that the source does not label are not measured, a
gap of 0 does not say that a use is fair, and small groups have wide intervals: report the counts.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int


def group_accuracy(correct: Float[np.ndarray, " n"], groups: Sequence[Hashable]) -> dict[str, Any]:
    """``{"groups": {group: (accuracy, count)}, "worst": ..., "worst_group": ..., "gap": ...}``.

    Groups are any labels; for intersections, tuples such as ``("female", "30-39")``. The gap is best minus worst.
    """
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(np.asarray(correct, float).tolist(), groups, strict=True):
        members.setdefault(group, []).append(value)
    if not members:
        raise ValueError("no examples")
    found = {group: (float(np.mean(values)), len(values)) for group, values in sorted(members.items(), key=repr)}
    worst = min(found, key=lambda group: found[group][0])
    gap = max(accuracy for accuracy, _ in found.values()) - found[worst][0]
    return {"groups": found, "worst": found[worst][0], "worst_group": worst, "gap": gap}


def max_skew(ranked: Int[np.ndarray, " n"], desired: Float[np.ndarray, " groups"], k: int) -> float:
    """MaxSkew@k of a ranking (Geyik et al. 2019): the log of the largest ratio of a group's share of the first k to the
    share it should have. 0: no group is over-represented. ``ranked`` is the group of each hit, best first.

    k beyond the ranking takes all of it. A group that should have nothing is left out.
    """
    desired = _distribution(desired)
    top = ranked[:k]
    share = np.bincount(top, minlength=len(desired)) / len(top)
    wanted = desired > 0
    with np.errstate(divide="ignore"):  # a group that does not occur has minus infinity, and is never the largest
        return float(np.max(np.log(share[wanted] / desired[wanted])))


def ndkl(ranked: Int[np.ndarray, " n"], desired: Float[np.ndarray, " groups"]) -> float:
    """Normalized discounted KL divergence of a ranking from the desired shares (Geyik et al. 2019); 0 is best.

    The mean of KL(shares of the first i hits, desired) over all i, weighted by 1 / log2(i + 1).
    """
    desired = _distribution(desired)
    if np.any(desired[ranked] == 0):
        raise ValueError("a group that occurs has a desired share of 0: the divergence is infinite")
    counts = np.cumsum(np.eye(len(desired))[ranked], axis=0)
    share = counts / np.arange(1, len(ranked) + 1)[:, None]
    ratio = np.divide(share, desired, out=np.ones_like(share), where=share > 0)
    divergence = np.sum(share * np.log(ratio), axis=1)
    weight = 1 / np.log2(np.arange(2, len(ranked) + 2))
    return float(np.sum(weight * divergence) / np.sum(weight))


def _distribution(desired: np.ndarray) -> np.ndarray:
    desired = np.asarray(desired, float)
    if np.any(desired < 0) or not np.isclose(desired.sum(), 1):
        raise ValueError("desired: shares that sum to 1")
    return desired
