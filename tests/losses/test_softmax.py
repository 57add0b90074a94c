"""The loss on a mesh equals its ten-line definition, and the definition equals float64 arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses import grid, reference
from clip_jax.sharding import make_mesh


def float64_loss(image, text, scale):
    """-(mean log softmax over rows + over columns) / 2 of the diagonal, in NumPy."""
    logits = scale * image.astype(np.float64) @ text.astype(np.float64).T

    def diagonal_log_softmax(logits):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return np.diagonal(shifted) - np.log(np.exp(shifted).sum(axis=1))

    return -(diagonal_log_softmax(logits).mean() + diagonal_log_softmax(logits.T).mean()) / 2


def embeddings(batch, dim, aligned=0.0):
    rng = np.random.default_rng(0)
    image, noise = rng.normal(size=(2, batch, dim))
    text = aligned * image + (1 - aligned) * noise
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


@pytest.mark.parametrize("aligned", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_definition_equals_float64(scale, aligned):
    image, text = embeddings(32, 16, aligned)
    loss, _ = reference.softmax(jnp.asarray(image), jnp.asarray(text), jnp.float32(scale))
    assert float(loss) == pytest.approx(float64_loss(image, text, scale), rel=1e-5, abs=1e-5)


def test_two_pairs_by_hand():
    """Orthogonal pairs at scale ln 3: each query gives its own key 3 / (3 + 1)."""
    eye = jnp.eye(2)
    loss, metrics = reference.softmax(eye, eye, jnp.log(3.0))
    assert float(loss) == pytest.approx(-np.log(3 / 4), rel=1e-6)
    assert float(metrics["accuracy"]) == 1.0


@pytest.mark.parametrize(
    ("data", "fsdp", "tensor"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 4)]
)
def test_loss_and_gradients_are_the_same_on_1_2_4_and_8_devices(data, fsdp, tensor):
    image, text = embeddings(32, 16)
    mesh = make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])

    def on_mesh(image, text, scale):
        return grid.softmax(image, text, scale, mesh=mesh)

    expected, expected_gradients = jax.value_and_grad(reference.softmax, (0, 1, 2), has_aux=True)(
        image, text, jnp.float32(14.3)
    )
    found, gradients = jax.jit(jax.value_and_grad(on_mesh, (0, 1, 2), has_aux=True))(image, text, jnp.float32(14.3))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    assert float(found[1]["accuracy"]) == float(expected[1]["accuracy"])
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_gradients_equal_float64_differences():
    image, text = embeddings(8, 4)
    mesh = make_mesh(4, devices=jax.devices()[:4])
    gradient = jax.grad(lambda i: grid.softmax(i, text, jnp.float32(5.0), mesh=mesh)[0])(jnp.asarray(image))
    for row, column in ((0, 0), (3, 2), (7, 3)):
        step = np.zeros_like(image, np.float64)
        step[row, column] = 1e-6
        difference = (float64_loss(image + step, text, 5.0) - float64_loss(image - step, text, 5.0)) / 2e-6
        assert float(gradient[row, column]) == pytest.approx(difference, abs=1e-6)


def test_random_embeddings_cost_the_logarithm_of_the_batch():
    image, text = embeddings(64, 512)
    loss, _ = reference.softmax(image, text, jnp.float32(1.0))
    assert float(loss) == pytest.approx(np.log(64), abs=0.02)


def test_no_device_holds_the_whole_logit_matrix():
    mesh = make_mesh(8)
    image, text = embeddings(64, 16)
    compiled = jax.jit(lambda i, t: grid.softmax(i, t, jnp.float32(1.0), mesh=mesh)).lower(image, text).compile()
    assert "f32[8,64]" in compiled.as_text()
    assert "f32[64,64]" not in compiled.as_text()


def test_a_batch_that_does_not_divide_is_refused():
    image, text = embeddings(12, 4)
    with pytest.raises(ValueError, match="12 pairs does not divide over 8 devices"):
        grid.softmax(image, text, jnp.float32(1.0), mesh=make_mesh(8))
