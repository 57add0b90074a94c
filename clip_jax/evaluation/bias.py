"""Bias metrics from predictions and rankings of labeled sources.

They describe a model on a source and its labels, no more: groups that the source does not label are not measured, a
gap of 0 does not say that a use is fair, and small groups have wide intervals: report the counts.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clip_jax.evaluation.ranking import TIE


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


class Association(NamedTuple):
    """How much nearer one group of images is to one set of texts than another group is."""

    effect: float
    """In standard deviations of all these images; 0: no difference."""
    low: float
    high: float
    """A 95 % bootstrap interval over the images."""


def association(
    a: Float[np.ndarray, "a dim"],
    b: Float[np.ndarray, "b dim"],
    texts_x: Float[np.ndarray, "x dim"],
    texts_y: Float[np.ndarray, "y dim"],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Association:
    """WEAT's effect size (Caliskan et al. 2017; for images Steed and Caliskan 2021) of unit embeddings.

    ``(mean_a s - mean_b s) / std s`` with ``s(image) = mean cos(image, x) - mean cos(image, y)``. The interval covers
    the choice of images, not that of texts. A constant model has 0. Raises ValueError for an empty group.
    """
    if not len(a) or not len(b):
        raise ValueError("association: a group without images")
    scores = [images.astype(np.float64) @ (texts_x.mean(axis=0) - texts_y.mean(axis=0)) for images in (a, b)]
    rng = np.random.default_rng(seed)
    drawn = [_effect(*(each[rng.integers(len(each), size=len(each))] for each in scores)) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Association(_effect(*scores), float(low), float(high))


def _effect(a: np.ndarray, b: np.ndarray) -> float:
    spread = np.concatenate([a, b]).std()
    return float((a.mean() - b.mean()) / spread) if spread > TIE else 0.0


def _distribution(desired: np.ndarray) -> np.ndarray:
    desired = np.asarray(desired, float)
    if np.any(desired < 0) or not np.isclose(desired.sum(), 1):
        raise ValueError("desired: shares that sum to 1")
    return desired
