"""Probes of frozen features: logistic regression, few-shot, and ridge; for features from any library.

The linear probe is the CLIP paper's (Radford et al. 2021, appendix A.3): multinomial logistic regression by L-BFGS, at
most 1,000 iterations, its L2 strength chosen on a validation split and then fitted again on training and validation
data together. The strength is C of scikit-learn's ``LogisticRegression``, which minimizes

    sum_i cross_entropy(x_i W + b, y_i) + |W|^2 / (2 C)

with a bias that is not penalized; ours is that minimum, by the same optimizer (SciPy's).

Traps. The paper takes features before the projection and as they are (appendix A.3; ``CLIP.pool_image``);
CLIP_benchmark takes normalized embeddings and AdamW, and its numbers differ. C depends on the scale of the features and
on their number. Few-shot numbers of one seed vary by points: report the mean and the spread.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from threadpoolctl import threadpool_limits

from clip_jax.errors import UserError
from clip_jax.evaluation.ranking import check_finite
from clip_jax.storage import atomic

SWEEP = np.logspace(-6, 6, 97)
"""Eight values of C per decade (the paper: 96 between 1e-6 and 1e6)."""
FIRST_SWEEP, FIRST_STEP = range(0, 97, 16), 8
"""The search begins at seven of them, two decades apart, and halves its step around the best."""


class Linear(NamedTuple):
    """A linear classifier of features."""

    weights: Float[np.ndarray, "features classes"]
    bias: Float[np.ndarray, " classes"]
    loss: float
    """The minimum, divided by the number of examples."""

    def logits(self, features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n classes"]:
        return features @ self.weights + self.bias

    def accuracy(self, features: Float[np.ndarray, "n features"], labels: Int[np.ndarray, " n"]) -> float:
        """Top-1. A constant head is right for one class alone: never above the share of the largest class."""
        check_finite(features=features)
        return float(np.mean(self.logits(features).argmax(axis=1) == labels))

    def log_likelihood(self, features: Float[np.ndarray, "n features"], labels: Int[np.ndarray, " n"]) -> float:
        """The mean logarithm of the probability of the right class."""
        return float(np.mean(log_softmax(self.logits(features), axis=1)[np.arange(len(labels)), labels]))


def logistic_regression(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    c: float,
    *,
    start: Linear | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Linear:
    """The minimum above. ``tolerance`` bounds the gradient of the objective divided by the number of examples."""
    check_finite(features=features)
    features, count = features.astype(np.float64), len(features)
    width = features.shape[1]
    target = np.zeros((count, classes))
    target[np.arange(count), labels] = 1

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: width * classes].reshape(width, classes), flat[width * classes :]
        logits = features @ weights + bias
        normalizer = logsumexp(logits, axis=1, keepdims=True)
        loss = np.sum(normalizer) - np.sum(logits * target) + np.sum(weights**2) / (2 * c)
        error = np.exp(logits - normalizer) - target
        gradient = np.concatenate([(features.T @ error + weights / c).ravel(), error.sum(axis=0)])
        return loss / count, gradient / count

    first = np.zeros((width + 1) * classes)
    if start is not None:
        first = np.concatenate([start.weights.ravel(), start.bias])
    options = {"maxiter": iterations, "gtol": tolerance, "ftol": 64 * np.finfo(float).eps, "maxls": 50}
    # Its vectors are short: with two threads on two cores an iteration took fifty times as long.
    with threadpool_limits(1, user_api="blas"):
        found = minimize(objective, first, jac=True, method="L-BFGS-B", options=options)
    weights, bias = found.x[: width * classes].reshape(width, classes), found.x[width * classes :]
    return Linear(weights, bias, float(found.fun))


class Probe(NamedTuple):
    """A fitted probe, and the results of the sweep."""

    head: Linear
    c: float
    validation: dict[float, float]
    """C -> accuracy on the validation split, in ascending order."""


def linear_probe(
    train: tuple[Float[np.ndarray, "n features"], Int[np.ndarray, " n"]],
    validation: tuple[Float[np.ndarray, "m features"], Int[np.ndarray, " m"]],
    classes: int,
    *,
    iterations: int = 1000,
) -> Probe:
    """Sweeps C on the validation split as the paper does, then fits on both splits with the best.

    Of values with the same accuracy the most likely is taken: on a small split that is easy to separate, the smallest C
    would be a head whose probabilities are all alike.
    """
    tried: dict[int, tuple[float, float]] = {}
    heads: dict[int, Linear] = {}

    def score(index: int) -> tuple[float, float]:
        if index not in tried:
            # The minimum does not depend on the start; from that of the nearest C it is reached in fewer iterations.
            start = heads[min(heads, key=lambda other: abs(other - index))] if heads else None
            head = logistic_regression(*train, classes, SWEEP[index], start=start, iterations=iterations)
            heads[index] = head
            tried[index] = head.accuracy(*validation), head.log_likelihood(*validation)
        return tried[index]

    best, step = max(FIRST_SWEEP, key=score), FIRST_STEP
    while step:
        around = [i for i in (best - step, best, best + step) if 0 <= i < len(SWEEP)]
        best, step = max(around, key=score), step // 2
    both = tuple(np.concatenate(parts) for parts in zip(train, validation, strict=True))
    head = logistic_regression(*both, classes, SWEEP[best], iterations=iterations)
    return Probe(head, float(SWEEP[best]), {float(SWEEP[i]): tried[i][0] for i in sorted(tried)})


def linear_probe_of(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    *,
    iterations: int = 1000,
) -> Probe:
    """``linear_probe`` of data without a validation split: it is a third of the examples, always the same ones."""
    order, cut = np.random.default_rng(0).permutation(len(labels)), len(labels) * 2 // 3
    train, validation = ((features[rows], labels[rows]) for rows in (order[:cut], order[cut:]))
    return linear_probe(train, validation, classes, iterations=iterations)


def ridge(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, " n"],
    classes: int,
    strength: float = 2.0**10,
) -> Linear:
    """Least squares to +-1 targets in closed form, cheap enough for every evaluation of a run.

    After big_vision's ``fewshot_lsr``: features are whitened (mean 0, variance 1, each) and get a constant feature of
    100, which leaves the bias nearly free; ``strength`` is its L2 penalty. Solved in the smaller of n and features.
    """
    check_finite(features=features)
    mean, deviation = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    # A feature that is constant up to rounding says nothing; divided by its noise it would say anything.
    informative = deviation > 1e-6 * np.maximum(1e-6, np.abs(mean).max())
    scale = np.where(informative, 1 / np.where(informative, deviation, 1), 0)
    x = np.concatenate([(features - mean) * scale, np.full((len(features), 1), 100.0)], axis=1)
    y = np.full((len(features), classes), -1.0)
    y[np.arange(len(features)), labels] = 1
    if len(x) < x.shape[1]:
        solved = x.T @ cho_solve(cho_factor(x @ x.T + strength * np.eye(len(x))), y)
    else:
        solved = cho_solve(cho_factor(x.T @ x + strength * np.eye(x.shape[1])), x.T @ y)
    weights = solved[:-1] * scale[:, None]
    bias = 100 * solved[-1] - mean @ weights
    return Linear(weights, bias, float(np.mean((x @ solved - y) ** 2)))


def draw_shots(labels: Int[np.ndarray, " n"], shots: int, seed: int) -> Int[np.ndarray, " examples"]:
    """Indices of ``shots`` examples of each class, in the order of the classes; more shots contain fewer ones.

    Raises UserError if a class has fewer.
    """
    rng, chosen = np.random.default_rng(seed), []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise UserError(
                f"{shots} shots: class {label} has only {len(members)} examples; ask for {len(members)} or fewer"
            )
        chosen.append(rng.permutation(members)[:shots])
    return np.concatenate(chosen)


Fit = Callable[[np.ndarray, np.ndarray, int], Linear]


def few_shot(
    train: tuple[Float[np.ndarray, "n features"], Int[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m features"], Int[np.ndarray, " m"]],
    classes: int,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    *,
    seeds: int = 3,
    fit: Fit = lambda x, y, classes: logistic_regression(x, y, classes, c=1.0),
) -> dict[int, list[float]]:
    """Test accuracy of a probe of ``shots`` examples per class, one for each seed. Raises UserError as above."""
    features, labels = train
    curve: dict[int, list[float]] = {}
    for count in shots:
        drawn = [draw_shots(labels, count, seed) for seed in range(seeds)]
        curve[count] = [fit(features[rows], labels[rows], classes).accuracy(*test) for rows in drawn]
    return curve


def shots_that_equal(curve: Mapping[float, Sequence[float]], zero_shot: float) -> float | None:
    """The shots at which a few-shot probe equals zero-shot accuracy, interpolated between the logarithms of shots.

    None where no number of shots of the curve reaches it (Radford et al. 2021, figure 7).
    """
    means = sorted((count, float(np.mean(values))) for count, values in curve.items())
    for i, (count, mean) in enumerate(means):
        if mean >= zero_shot:
            if i == 0:
                return float(count)
            before, low = means[i - 1]
            share = (zero_shot - low) / (mean - low)
            return float(np.exp(np.log(before) + share * (np.log(count) - np.log(before))))
    return None


class Head(NamedTuple):
    """A linear classifier with the names of its classes, as ``clip-jax fewshot --head`` writes it."""

    linear: Linear
    class_names: tuple[str, ...]
    model: str
    """The fingerprint of the model whose unit embeddings it was fitted on."""

    def probabilities(self, features: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n classes"]:
        check_finite(features=features)
        return softmax(self.linear.logits(features), axis=1)


def write_head(path: Path, head: Head) -> None:
    with atomic.replacing(path) as temporary:
        weights, bias = head.linear.weights.astype(np.float32), head.linear.bias.astype(np.float32)
        np.savez(temporary, weights=weights, bias=bias, class_names=np.array(head.class_names), model=head.model)


def read_head(path: Path, features: int) -> Head:
    """A head for embeddings of this many features. Raises UserError for a file that is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            weights, bias = file["weights"], file["bias"]
            names, model = tuple(map(str, file["class_names"])), str(file["model"])
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or "not a head"
        raise UserError(f"{path}: {reason}; clip-jax fewshot --head={path} writes one") from error
    if weights.shape != (features, len(names)) or bias.shape != (len(names),):
        raise UserError(
            f"{path}: of {weights.shape[0]} features, but this model has {features}; fit it again with this model"
        )
    return Head(Linear(weights, bias, 0.0), names, model)
