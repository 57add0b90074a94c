"""The sigmoid loss on a mesh equals its definition and float64 arithmetic, gradients and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses import grid, reference, tile
from clip_jax.sharding import make_mesh
from tests.losses.test_softmax import (
    MESHES,
    embeddings,
    grid_mesh,
    in_batch_accuracy,
    relative_error,
    value_and_gradients,
)


def float64(image, text, scale, bias):
    """(loss, gradients by images, texts, scale and bias), in NumPy."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    cosines = image @ text.T
    signs = 2 * np.eye(len(image)) - 1
    z = signs * (scale * cosines + bias)
    loss = np.sum(np.logaddexp(0, -z)) / len(image)
    by_logits = -signs / (1 + np.exp(z)) / len(image)
    by_scale, by_bias = np.sum(by_logits * cosines), np.sum(by_logits)
    return loss, (scale * by_logits @ text, scale * by_logits.T @ image, by_scale, by_bias)


@pytest.mark.parametrize(("shape", "rows"), MESHES, ids=str)
@pytest.mark.parametrize(("scale", "bias", "aligned"), [(10.0, -10.0, 0.0), (1.0, 0.0, 0.0), (100.0, -12.0, 0.6)])
def test_loss_and_gradients_are_those_of_float64_on_every_grid(shape, rows, scale, bias, aligned, monkeypatch):
    mesh = grid_mesh(shape, rows, monkeypatch)
    image, text = embeddings(48, 16, aligned)
    loss, accuracy, gradients = value_and_gradients(grid.sigmoid, mesh, image, text, scale, bias)
    tolerance = 1e-6 if scale <= 14.3 else 1e-5
    expected, expected_gradients = float64(image, text, scale, bias)
    assert loss == pytest.approx(expected, rel=tolerance)
    assert accuracy == pytest.approx(in_batch_accuracy(image, text))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert relative_error(ours, theirs) < tolerance


def test_the_definition_equals_float64():
    image, text = embeddings(32, 16)
    loss, _ = reference.sigmoid(image, text, jnp.float32(10.0), jnp.float32(-10.0))
    assert float(loss) == pytest.approx(float64(image, text, 10.0, -10.0)[0], rel=1e-5)


def test_one_pair_by_hand():
    """A pair with cosine 1 at scale 1 and bias 0: log(1 + exp(-1))."""
    one = jnp.ones((1, 1))
    loss, *_ = value_and_gradients(grid.sigmoid, make_mesh(1, devices=jax.devices()[:1]), one, one, 1.0, 0.0)
    assert loss == pytest.approx(np.log(1 + np.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_the_size_of_a_block_does_not_matter(block, monkeypatch):
    monkeypatch.setattr(tile, "BLOCK_LOGITS", block)
    image, text = embeddings(48, 8)
    mesh = make_mesh(4, devices=jax.devices()[:4])
    loss, _, gradients = value_and_gradients(grid.sigmoid, mesh, image, text, 10.0, -10.0)
    expected, expected_gradients = float64(image, text, 10.0, -10.0)
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("rows", [1, 2])
def test_bfloat16_embeddings_are_within_two_percent_of_float64(rows, monkeypatch):
    mesh = grid_mesh((8, 1, 1), rows, monkeypatch)
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in embeddings(64, 16, 0.5))
    loss, _, gradients = value_and_gradients(grid.sigmoid, mesh, image, text, 10.0, -10.0)
    expected, expected_gradients = float64(*(np.asarray(x, np.float64) for x in (image, text)), 10.0, -10.0)
    assert loss == pytest.approx(expected, rel=2e-2)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert relative_error(ours, theirs) < 2e-2
