"""Probes against gradients, normal equations and hand-computed cases; scikit-learn's are in tests/parity."""

import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.evaluation import calibration, probe


def blobs(n, classes=4, width=6, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centers = np.random.default_rng(9).normal(size=(classes, width))
    return (centers[labels] + noise * rng.normal(size=(n, width))).astype(np.float32), labels


@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_logistic_regression_is_at_a_minimum(c):
    x, y = blobs(80)
    head = probe.logistic_regression(x, y, 4, c, tolerance=1e-9)
    logits = head.logits(x.astype(np.float64))
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = p / p.sum(1, keepdims=True) - np.eye(4)[y]
    assert np.abs(x.T @ error + head.weights / c).max() < 1e-4 and np.abs(error.sum(0)).max() < 1e-4
    expected = np.sum(-np.log((p / p.sum(1, keepdims=True))[np.arange(80), y])) + np.sum(head.weights**2) / (2 * c)
    assert head.loss == pytest.approx(expected / 80, rel=1e-9)


def test_the_probe_does_not_depend_on_the_order_of_examples():
    x, y = blobs(60)
    order = np.random.default_rng(1).permutation(60)
    a, b = (probe.logistic_regression(*data, 4, 1.0, tolerance=1e-9) for data in ((x, y), (x[order], y[order])))
    np.testing.assert_allclose(a.weights, b.weights, atol=1e-5)


def test_the_sweep_finds_the_best_value_of_all_and_fits_on_both_splits():
    train, validation = blobs(24, noise=2.0), blobs(60, noise=2.0, seed=1)
    found = probe.linear_probe(train, validation, 4, iterations=20)
    assert set(np.round(np.log10(list(found.validation)), 3)) >= {-6, -4, -2, 0, 2, 4, 6}
    assert found.validation[found.c] == max(found.validation.values())
    both = [np.concatenate(parts) for parts in zip(train, validation, strict=True)]
    assert found.head.loss == pytest.approx(probe.logistic_regression(*both, 4, found.c, iterations=20).loss)
    assert len(found.validation) < 20


def test_of_equal_accuracies_the_most_likely_is_taken():
    """Where every strength is right, the smallest C would give all classes the same probability."""
    train, validation = blobs(24, noise=0.01), blobs(60, noise=0.01, seed=1)
    found = probe.linear_probe(train, validation, 4)
    assert set(found.validation.values()) == {1.0}
    assert found.head.log_likelihood(*validation) > np.log(0.9)


def test_without_a_validation_split_a_third_chooses_the_strength_and_all_examples_fit_the_head():
    x, y = blobs(60, noise=2.0)
    found = probe.linear_probe_of(x, y, 4, iterations=20)
    assert all(accuracy * 20 == pytest.approx(round(accuracy * 20)) for accuracy in found.validation.values())
    assert found.head.loss == pytest.approx(probe.logistic_regression(x, y, 4, found.c, iterations=20).loss)


@pytest.mark.parametrize("n", [5, 200])
def test_ridge_solves_the_normal_equations_with_fewer_and_more_examples_than_features(n):
    x, y = blobs(n)
    head = probe.ridge(x, y, 4, strength=3.0)
    white = np.concatenate([(x - x.mean(0)) / x.std(0), np.full((n, 1), 100.0)], axis=1)
    target = 2 * np.eye(4)[y] - 1
    solution = np.linalg.solve(white.T @ white + 3 * np.eye(7), white.T @ target)
    np.testing.assert_allclose(head.logits(x), white @ solution, atol=1e-3)


def test_constant_features_never_score_above_chance():
    same = np.full((40, 6), 0.3, np.float32)
    labels = np.arange(40) % 4
    for head in (probe.ridge(same, labels, 4), probe.logistic_regression(same, labels, 4, 1.0)):
        assert head.accuracy(same, labels) <= 1 / 4


def test_shots_are_balanced_nested_and_refused_beyond_what_there_is():
    labels = np.array([0] * 5 + [1] * 3 + [2] * 9)
    two, three = probe.draw_shots(labels, 2, seed=0), probe.draw_shots(labels, 3, seed=0)
    assert np.bincount(labels[three]).tolist() == [3, 3, 3] and set(two) < set(three)
    assert set(probe.draw_shots(labels, 3, seed=1)) != set(three)
    with pytest.raises(UserError, match="class 1 has only 3 examples"):
        probe.draw_shots(labels, 4, seed=0)


def test_more_shots_are_better_and_zero_shot_is_placed_among_them():
    curve = probe.few_shot(blobs(200), blobs(200, seed=2), 4, (1, 4, 32), seeds=4, fit=probe.ridge)
    means = [np.mean(curve[k]) for k in (1, 4, 32)]
    assert means == sorted(means) and all(len(values) == 4 for values in curve.values())
    assert probe.shots_that_equal({1: [0.2], 4: [0.4]}, 0.3) == pytest.approx(2)
    assert probe.shots_that_equal({1: [0.2]}, 0.1) == 1 and probe.shots_that_equal({1: [0.2]}, 0.3) is None


def test_features_that_are_not_finite_are_refused():
    x, y = blobs(20)
    x[3, 1] = np.nan
    for fit in (lambda: probe.ridge(x, y, 4), lambda: probe.logistic_regression(x, y, 4, 1.0)):
        with pytest.raises(ValueError, match="1 of 20 embeddings are not finite"):
            fit()


def test_calibration_by_hand():
    confidence, correct = np.array([0.95, 0.95, 0.65, 0.65]), np.array([1, 0, 1, 1])
    curve = calibration.reliability(confidence, correct, bins=10)
    assert [(b.count, b.accuracy) for b in curve if b.count] == [(2, 1.0), (2, 0.5)]
    assert calibration.expected_calibration_error(confidence, correct, bins=10) == pytest.approx((0.35 + 0.45) / 2)
    assert sum(b.count for b in calibration.reliability(np.array([0.0, 1.0, 0.5]), np.ones(3), bins=4)) == 3
    with pytest.raises(ValueError, match="within 0 and 1"):
        calibration.reliability(np.array([0.5, np.nan]), np.ones(2))


def test_a_constant_model_is_calibrated_at_chance():
    assert calibration.expected_calibration_error(np.full(40, 1 / 4), np.full(40, 1 / 4)) == pytest.approx(0)


def test_the_fitted_scale_is_the_one_that_made_the_labels():
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-0.3, 0.3, (20_000, 5))
    p = np.exp(12 * cosines)
    labels = (rng.random((20_000, 1)) > np.cumsum(p / p.sum(1, keepdims=True), axis=1)).sum(axis=1)
    assert calibration.fit_scale(cosines, labels) == pytest.approx(12, rel=0.03)
