"""Paired bootstrap: is one model better than another on the same examples, or is it the choice of examples?

Both models answer the same examples, so the differences per example are resampled, not each model's results (Efron and
Tibshirani 1993, chapter 13). The interval is the percentile interval of the mean difference. Traps: it does not cover
the variation between training seeds, and among many tasks one in twenty is outside its 95 % interval by chance.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
BLOCK = 2_000_000
"""Resampled examples at one time: 16 MB."""


class Difference(NamedTuple):
    """b minus a."""

    mean: float
    low: float
    high: float
    better: int
    """Examples on which b is better, and on which it is worse."""
    worse: int


def difference(
    a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], *, level: float = 0.95, seed: int = 0
) -> Difference:
    """The mean difference of the same examples with its interval. Raises ValueError if they cannot be paired."""
    if len(a) != len(b) or not len(a):
        raise ValueError(f"{len(a)} and {len(b)} examples cannot be paired")
    delta = np.asarray(b, float) - np.asarray(a, float)
    rng, means = np.random.default_rng(seed), []
    step = max(1, BLOCK // len(delta))
    for start in range(0, RESAMPLES, step):
        drawn = rng.integers(0, len(delta), (min(step, RESAMPLES - start), len(delta)))
        means.append(delta[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(delta.mean()), float(low), float(high), int((delta > 0).sum()), int((delta < 0).sum()))
