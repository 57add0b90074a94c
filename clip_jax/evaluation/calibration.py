"""Calibration: whether a confidence of 0.8 is right eight times out of ten (Guo et al. 2017).

The expected calibration error is the mean, over bins of equal width and weighted by their examples, of the distance
between accuracy and mean confidence. Traps: it depends on the number of bins (15 here, as in the paper), and a model
that always answers with the classes' frequencies has none at all: read it beside accuracy. Under ties an image that is
equally near to ten classes is a tenth right, so that a constant model with probabilities 1/C is calibrated at chance.

A model that ranks the classes well may still be overconfident, for its scale (the inverse temperature) is that of
training. ``fitted`` has the error that remains after temperature scaling (section 4.2 of the paper).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar

BINS = 15
FITTED_ON = 5000
"""Examples on which a scale is fitted, so that ``fitted`` takes less than a second for 50,000 of 1,000 classes."""
BLOCK = 2048
"""Examples whose probabilities exist at one time."""


class Bin(NamedTuple):
    """Examples whose confidence is in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float
    """Their mean; 0 if there are none, as the accuracy."""
    accuracy: float


def reliability(
    confidence: Float[np.ndarray, " n"], correct: Float[np.ndarray, " n"], bins: int = BINS
) -> tuple[Bin, ...]:
    """The reliability curve; ``correct`` is 0 or 1, or the probability under ties. Raises ValueError for NaN."""
    if not (np.isfinite(confidence).all() and confidence.min() >= 0 and confidence.max() <= 1 + 1e-6):
        raise ValueError("confidences are not all within 0 and 1")
    edges = np.linspace(0, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    mean = [np.bincount(which, x, minlength=bins) / np.maximum(count, 1) for x in (confidence, correct)]
    return tuple(map(Bin, edges[:-1].tolist(), edges[1:].tolist(), count.tolist(), *(m.tolist() for m in mean)))


def expected_calibration_error(
    confidence: Float[np.ndarray, " n"], correct: Float[np.ndarray, " n"], bins: int = BINS
) -> float:
    """In 0..1."""
    curve = reliability(confidence, correct, bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in curve) / len(confidence)


def fit_scale(
    cosines: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"], low: float = 0.1, high: float = 1000.0
) -> float:
    """The factor of cosines (the inverse temperature) with the least cross-entropy; fit it on other data than you test.

    The cross-entropy is convex in the factor, hence unimodal in its logarithm.
    """
    if not np.isfinite(cosines).all():
        raise ValueError("cosines are not finite")
    cosines = cosines - cosines.max(axis=1, keepdims=True).astype(np.float64)
    right = cosines[np.arange(len(labels)), labels]

    def loss(log_scale: float) -> float:
        scale = np.exp(log_scale)
        return float(np.mean(np.log(np.exp(scale * cosines).sum(axis=1)) - scale * right))

    found = minimize_scalar(loss, bounds=(np.log(low), np.log(high)), method="bounded", options={"xatol": 1e-5})
    return float(np.exp(found.x))


class Fitted(NamedTuple):
    """What temperature scaling makes of a model."""

    scale: float
    """Fitted on all examples, at most ``FITTED_ON`` of them."""
    calibration_error: float | None
    """The error on each half under the scale that was fitted on the other half; None for a single example."""


def fitted(
    cosines: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"], correct: Float[np.ndarray, " n"]
) -> Fitted:
    """The scale with the least cross-entropy, and the expected calibration error on data that it was not fitted on.

    ``correct`` as in ``reliability``: no scale changes which class is nearest. What is drawn, and in which half an
    example is, depends on its index alone.
    """
    order = np.random.default_rng(0).permutation(len(labels))

    def fit(rows: np.ndarray) -> float:
        return fit_scale(cosines[rows], labels[rows])

    scale = fit(order[:FITTED_ON])
    if len(labels) < 2:
        return Fitted(scale, None)
    halves, confidence = (order[::2], order[1::2]), np.zeros(len(labels))
    for half, other in (halves, halves[::-1]):
        fitted_on_other = fit(other[: FITTED_ON // 2])
        for start in range(0, len(half), BLOCK):
            rows = half[start : start + BLOCK]
            below = cosines[rows] - cosines[rows].max(axis=1, keepdims=True)
            confidence[rows] = 1 / np.exp(fitted_on_other * below).sum(axis=1)
    return Fitted(scale, expected_calibration_error(confidence, correct))
