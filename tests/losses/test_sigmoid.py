"""The sigmoid loss on a mesh equals float64 arithmetic, with all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices.sharding import make_mesh
from clip_jax.losses.sigmoid import sigmoid
from tests.losses import cases


@pytest.mark.parametrize(("shape", "rows", "block_logits"), cases.GRIDS)
def test_loss_and_gradients_are_those_of_float64_on_every_grid(shape, rows, block_logits):
    mesh, tiling = cases.grid(shape, rows, block_logits)
    for scale, bias, aligned, tolerance in ((10.0, -10.0, 0.0, 1e-6), (1.0, 0.0, 0.0, 1e-6), (100.0, -12.0, 0.6, 1e-5)):
        image, text = cases.embeddings(48, 16, aligned)
        found = cases.value_and_gradients(sigmoid, image, text, scale, bias, mesh=mesh, tiling=tiling)
        cases.assert_close(found, cases.sigmoid(image, text, scale, bias), tolerance)
        assert found[1] == pytest.approx(cases.in_batch_accuracy(image, text))


def test_padding_is_ignored_whatever_it_contains():
    mesh, tiling = cases.grid((4, 2, 1), 2, 9)
    cases.assert_padding_is_ignored(sigmoid, cases.sigmoid, 10.0, -10.0, padding=np.nan, mesh=mesh, tiling=tiling)


def test_bfloat16_embeddings_are_within_two_percent_of_float64():
    mesh, tiling = cases.grid((2, 2, 2), 2)
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in cases.embeddings(48, 16, 0.5))
    found = cases.value_and_gradients(sigmoid, image, text, 10.0, -10.0, mesh=mesh, tiling=tiling)
    assert {g.dtype for g in found[2][:2]} == {jnp.dtype(jnp.bfloat16)}
    cases.assert_close(found, cases.sigmoid(*(np.asarray(x, np.float64) for x in (image, text)), 10.0, -10.0), 2e-2)


def test_one_pair_by_hand():
    """A pair with cosine 1 at scale 1 and bias 0: log(1 + exp(-1))."""
    one, mesh = jnp.ones((1, 1)), make_mesh(1, devices=jax.devices()[:1])
    loss, *_ = cases.value_and_gradients(sigmoid, one, one, 1.0, 0.0, mesh=mesh)
    assert loss == pytest.approx(np.log(1 + np.exp(-1)), rel=1e-6)
