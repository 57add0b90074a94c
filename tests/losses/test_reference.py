"""The definitions equal float64 arithmetic and cases by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses import reference
from tests.losses import cases


@pytest.mark.parametrize("aligned", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_softmax_and_its_gradients_are_those_of_float64(scale, aligned):
    image, text = cases.embeddings(32, 16, aligned)
    found = cases.value_and_gradients(reference.softmax, image, text, scale)
    cases.assert_close(found, cases.softmax(image, text, scale), 1e-4 if aligned else 1e-5)


def test_sigmoid_and_its_gradients_are_those_of_float64():
    image, text = cases.embeddings(32, 16)
    found = cases.value_and_gradients(reference.sigmoid, image, text, 10.0, -10.0)
    cases.assert_close(found, cases.sigmoid(image, text, 10.0, -10.0), 1e-5)


def test_softmax_of_two_pairs_by_hand():
    """Orthogonal pairs at scale ln 3: each query gives its own key 3 / (3 + 1)."""
    loss, accuracy, _ = cases.value_and_gradients(reference.softmax, jnp.eye(2), jnp.eye(2), np.log(3.0))
    assert loss == pytest.approx(-np.log(3 / 4), rel=1e-6)
    assert accuracy == 1.0


def test_softmax_of_random_embeddings_is_the_logarithm_of_the_batch():
    loss, *_ = cases.value_and_gradients(reference.softmax, *cases.embeddings(64, 512), 1.0)
    assert loss == pytest.approx(np.log(64), abs=0.02)


def test_padding_counts_neither_as_rows_nor_as_columns():
    cases.assert_padding_is_ignored(reference.softmax, cases.softmax, 14.3, padding=0.5)
    cases.assert_padding_is_ignored(reference.sigmoid, cases.sigmoid, 10.0, -10.0, padding=0.5)
