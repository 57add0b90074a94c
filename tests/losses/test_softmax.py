"""The softmax loss on a mesh equals float64 arithmetic, with all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices.sharding import make_mesh
from clip_jax.losses.softmax import softmax
from tests.losses import cases


@pytest.mark.parametrize(("shape", "rows", "block_logits"), cases.GRIDS)
def test_loss_and_gradients_are_those_of_float64_on_every_grid(shape, rows, block_logits):
    """Aligned embeddings at scale 100 are where logits minus a log-sum-exp lose all digits of the loss."""
    mesh, tiling = cases.grid(shape, rows, block_logits)
    for scale, aligned, tolerance in ((1.0, 0.0, 1e-6), (14.3, 0.0, 1e-6), (100.0, 0.0, 1e-5), (100.0, 0.6, 1e-5)):
        image, text = cases.embeddings(48, 16, aligned)
        found = cases.value_and_gradients(softmax, image, text, scale, mesh=mesh, tiling=tiling)
        cases.assert_close(found, cases.softmax(image, text, scale), tolerance)
        assert found[1] == pytest.approx(cases.in_batch_accuracy(image, text))


def test_padding_is_ignored_whatever_it_contains():
    mesh, tiling = cases.grid((4, 2, 1), 2, 9)
    cases.assert_padding_is_ignored(softmax, cases.softmax, 14.3, padding=np.nan, mesh=mesh, tiling=tiling)


def test_bfloat16_embeddings_are_within_two_percent_of_float64():
    mesh, tiling = cases.grid((2, 2, 2), 2)
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in cases.embeddings(48, 16, 0.5))
    found = cases.value_and_gradients(softmax, image, text, 14.3, mesh=mesh, tiling=tiling)
    assert {g.dtype for g in found[2][:2]} == {jnp.dtype(jnp.bfloat16)}
    cases.assert_close(found, cases.softmax(*(np.asarray(x, np.float64) for x in (image, text)), 14.3), 2e-2)


def test_the_loss_and_gradients_of_a_single_pair_are_zero():
    mesh = make_mesh(1, devices=jax.devices()[:1])
    loss, accuracy, gradients = cases.value_and_gradients(softmax, *cases.embeddings(1, 4), 14.3, mesh=mesh)
    assert (loss, accuracy) == (0.0, 1.0)
    assert all(not np.any(g) for g in gradients)


def test_a_batch_that_does_not_divide_over_the_devices_is_an_error():
    image, text = cases.embeddings(12, 4)
    with pytest.raises(ValueError, match="12 pairs does not divide over 8 devices"):
        softmax(image, text, jnp.float32(1.0), mesh=make_mesh(8))
