"""The softmax loss on a mesh equals its ten-line definition and float64 arithmetic, gradients and all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.losses import grid, reference, tile
from clip_jax.sharding import make_mesh


def float64_loss(image, text, scale):
    """-(mean log softmax over rows + over columns) / 2 of the diagonal, in NumPy."""
    logits = scale * image.astype(np.float64) @ text.astype(np.float64).T

    def diagonal_log_softmax(logits):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return np.diagonal(shifted) - np.log(np.exp(shifted).sum(axis=1))

    return -(diagonal_log_softmax(logits).mean() + diagonal_log_softmax(logits.T).mean()) / 2


def float64_gradients(image, text, scale):
    """Of the loss by images, texts and scale, in NumPy: the probabilities of rows and columns minus the identity."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    logits = scale * image @ text.T

    def softmax(logits):
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    by_logits = ((softmax(logits) + softmax(logits.T).T) / 2 - np.eye(len(image))) / len(image)
    return scale * by_logits @ text, scale * by_logits.T @ image, np.sum(by_logits * (image @ text.T))


def in_batch_accuracy(image, text):
    """Of images among texts and of texts among images, together."""
    cosines = image @ text.T
    return np.mean([np.argmax(cosines, axis=axis) == np.arange(len(image)) for axis in (0, 1)])


def embeddings(batch, dim, aligned=0.0):
    rng = np.random.default_rng(0)
    image, noise = rng.normal(size=(2, batch, dim))
    text = aligned * image + (1 - aligned) * noise
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


def relative_error(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("aligned", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_definition_equals_float64(scale, aligned):
    image, text = embeddings(32, 16, aligned)
    loss, _ = reference.softmax(jnp.asarray(image), jnp.asarray(text), jnp.float32(scale))
    assert float(loss) == pytest.approx(float64_loss(image, text, scale), rel=1e-5, abs=1e-5)


def test_the_definitions_gradients_are_those_of_float64():
    image, text = embeddings(48, 16)
    gradients = jax.grad(lambda *x: reference.softmax(*x)[0], (0, 1, 2))(image, text, jnp.float32(14.3))
    for found, expected in zip(gradients, float64_gradients(image, text, 14.3), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_two_pairs_by_hand():
    """Orthogonal pairs at scale ln 3: each query gives its own key 3 / (3 + 1)."""
    eye = jnp.eye(2)
    loss, metrics = reference.softmax(eye, eye, jnp.log(3.0))
    assert float(loss) == pytest.approx(-np.log(3 / 4), rel=1e-6)
    assert float(metrics["accuracy"]) == 1.0


# (data, fsdp, tensor), rows of the grid. The last three gather nothing.
MESHES = [
    ((1, 1, 1), 1), ((2, 1, 1), 1), ((4, 1, 1), 2), ((8, 1, 1), 2), ((1, 8, 1), 2), ((2, 2, 2), 2), ((1, 1, 4), 1),
    ((3, 1, 1), 1), ((6, 1, 1), 2), ((4, 1, 1), 1), ((8, 1, 1), 1), ((2, 2, 2), 1),
]  # fmt: skip


def grid_mesh(shape, rows, monkeypatch):
    """The mesh; a limit of no bytes at all makes a grid of one row of what would have more."""
    if rows == 1:
        monkeypatch.setattr(tile, "GATHERED_BYTES", 0)
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    assert tile.grid_of(mesh, np.zeros((48, 16), np.float32)).shape[tile.ROWS] == rows
    return mesh


@functools.lru_cache
def compiled(loss, mesh, rows, block):
    """One compilation for all embeddings and scales; rows and block are what tests have set in ``tile``."""
    arguments = tuple(range(3 if loss is grid.softmax else 4))
    return jax.jit(jax.value_and_grad(lambda *x: loss(*x, mesh=mesh), arguments, has_aux=True))


def value_and_gradients(loss, mesh, image, text, *scalars):
    run = compiled(loss, mesh, tile.grid_of(mesh, text).shape[tile.ROWS], tile.BLOCK_LOGITS)
    (value, metrics), gradients = run(image, text, *map(jnp.float32, scalars))
    return float(value), float(metrics["accuracy"]), gradients


@pytest.mark.parametrize(("shape", "rows"), MESHES, ids=str)
@pytest.mark.parametrize(
    ("scale", "aligned", "tolerance"), [(1.0, 0.0, 1e-6), (14.3, 0.0, 1e-6), (100.0, 0.0, 1e-5), (100.0, 0.6, 1e-5)]
)
def test_loss_and_gradients_are_those_of_float64_on_every_grid(shape, rows, scale, aligned, tolerance, monkeypatch):
    """Aligned embeddings at scale 100 are where logits minus a log-sum-exp lose all digits of the loss."""
    mesh = grid_mesh(shape, rows, monkeypatch)
    image, text = embeddings(48, 16, aligned)
    loss, accuracy, gradients = value_and_gradients(grid.softmax, mesh, image, text, scale)
    assert loss == pytest.approx(float64_loss(image, text, scale), rel=tolerance)
    assert accuracy == pytest.approx(in_batch_accuracy(image, text))
    for found, expected in zip(gradients, float64_gradients(image, text, scale), strict=True):
        assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("block", [1, 6, 50, 10**6])
def test_the_size_of_a_block_does_not_matter(block, monkeypatch):
    """Tiles are 12 x 24: a block is one logit, 2 x 3, 6 x 8 or the whole tile."""
    monkeypatch.setattr(tile, "BLOCK_LOGITS", block)
    image, text = embeddings(48, 8)
    mesh = make_mesh(4, devices=jax.devices()[:4])
    loss, _, gradients = value_and_gradients(grid.softmax, mesh, image, text, 14.3)
    assert loss == pytest.approx(float64_loss(image, text, 14.3), rel=1e-6)
    for found, expected in zip(gradients, float64_gradients(image, text, 14.3), strict=True):
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("rows", [1, 2])
def test_bfloat16_embeddings_are_within_two_percent_of_float64(rows, monkeypatch):
    mesh = grid_mesh((8, 1, 1), rows, monkeypatch)
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in embeddings(64, 16, 0.5))
    loss, _, gradients = value_and_gradients(grid.softmax, mesh, image, text, 14.3)
    rounded = [np.asarray(x, np.float64) for x in (image, text)]
    assert loss == pytest.approx(float64_loss(*rounded, 14.3), rel=2e-2)
    for found, expected in zip(gradients, float64_gradients(*rounded, 14.3), strict=True):
        assert relative_error(found, expected) < 2e-2


def test_one_pair_alone_costs_nothing():
    image, text = embeddings(1, 4)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    loss, accuracy, gradients = value_and_gradients(grid.softmax, mesh, image, text, 14.3)
    assert (loss, accuracy) == (0.0, 1.0)
    assert all(not np.any(g) for g in gradients)


def test_random_embeddings_cost_the_logarithm_of_the_batch():
    image, text = embeddings(64, 512)
    loss, _ = reference.softmax(image, text, jnp.float32(1.0))
    assert float(loss) == pytest.approx(np.log(64), abs=0.02)


def test_a_batch_that_does_not_divide_is_refused():
    image, text = embeddings(12, 4)
    with pytest.raises(ValueError, match="12 pairs does not divide over 8 devices"):
        grid.softmax(image, text, jnp.float32(1.0), mesh=make_mesh(8))
