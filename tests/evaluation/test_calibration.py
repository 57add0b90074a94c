"""Temperature scaling: the scale that made the labels, an error on examples that it was not fitted on, any ensemble."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import softmax

from clip_jax.evaluation import calibration, runner
from clip_jax.evaluation.embed import Embedded
from tests.evaluation.test_every_protocol import task_of


def drawn(n, classes=5, scale=12.0):
    """Cosines, labels that follow their softmax, and which are nearest."""
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-0.3, 0.3, (n, classes))
    chances = np.cumsum(softmax(scale * cosines, axis=1), axis=1)
    labels = np.minimum((rng.random((n, 1)) > chances).sum(axis=1), classes - 1)
    return cosines, labels, (cosines.argmax(axis=1) == labels).astype(float)


def test_a_fitted_scale_removes_the_error_of_a_model_that_is_overconfident():
    cosines, labels, correct = drawn(4000)
    found = calibration.fitted(cosines, labels, correct)
    as_trained = calibration.expected_calibration_error(softmax(60 * cosines, axis=1).max(axis=1), correct)
    assert found.scale == pytest.approx(12, rel=0.05) and as_trained > 0.2 and found.calibration_error < 0.03


def test_the_error_of_each_half_is_that_of_the_scale_of_the_other():
    cosines, labels, correct = drawn(9)
    order = np.random.default_rng(0).permutation(9)
    confidence = np.zeros(9)
    for own, other in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        scales = np.geomspace(0.1, 1000, 4001)
        right = [softmax(s * cosines[other], axis=1)[np.arange(len(other)), labels[other]] for s in scales]
        best = scales[np.argmax(np.log(right).sum(axis=1))]
        confidence[own] = softmax(best * cosines[own], axis=1).max(axis=1)
    expected = calibration.expected_calibration_error(confidence, correct)
    found = calibration.fitted(cosines, labels, correct)
    assert found.calibration_error == pytest.approx(expected, abs=1e-2)
    assert calibration.fitted(cosines[:1], labels[:1], correct[:1]).calibration_error is None


def test_it_is_fitted_on_a_bounded_number_of_examples_and_measured_on_all(monkeypatch):
    sizes, fit = [], calibration.fit_scale
    monkeypatch.setattr(calibration, "FITTED_ON", 10)
    monkeypatch.setattr(calibration, "BLOCK", 3)
    monkeypatch.setattr(calibration, "fit_scale", lambda c, labels: sizes.append(len(labels)) or fit(c, labels))
    cosines, labels, correct = drawn(40)
    error = calibration.fitted(cosines, labels, correct).calibration_error
    assert sizes == [10, 5, 5]
    monkeypatch.setattr(calibration, "BLOCK", 2048)
    assert calibration.fitted(cosines, labels, correct).calibration_error == pytest.approx(error, abs=1e-12)


def test_a_result_has_the_fitted_scale_whatever_that_of_the_model_and_of_an_ensemble():
    cosines, labels, _ = drawn(4000)
    embedded = Embedded(cosines, cosines[:0], labels[:0], labels, (), np.arange(4000), collections.Counter())

    def model(scale):
        given = {"embed": lambda source, texts: embedded, "classifier": lambda prompts: np.eye(5)}
        return SimpleNamespace(scale=scale, tokenizer="", **given)

    found = [runner.run(task_of("zero_shot"), list(map(model, scales))).metrics for scales in ((60,), (3,), (60, 60))]
    assert [metrics["fitted_scale"] for metrics in found] == pytest.approx([12] * 3, rel=0.05)
    assert max(metrics["fitted_calibration_error"] for metrics in found) < 0.03
    assert min(metrics["calibration_error"] for metrics in found) > 0.1


def test_calibration_does_not_depend_on_the_order_of_examples():
    cosines, labels, correct = drawn(300)
    order, confidence = np.random.default_rng(1).permutation(300), softmax(12 * cosines, axis=1).max(axis=1)
    error = calibration.expected_calibration_error
    assert error(confidence[order], correct[order]) == pytest.approx(error(confidence, correct), abs=1e-12)
    one, other = calibration.fit_scale(cosines, labels), calibration.fit_scale(cosines[order], labels[order])
    assert one == pytest.approx(other, rel=1e-6)
