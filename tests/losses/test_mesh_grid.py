"""The shape of the grid; tiles with ids and more texts than images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_sigmoid, logsumexp

from clip_jax.devices.sharding import batch_sharding, make_mesh
from clip_jax.losses.mesh_grid import DEFAULT_TILING, Embeddings, Tiling, make_grid
from clip_jax.losses.sigmoid import _sigmoid
from clip_jax.losses.softmax import _softmax
from tests.losses import cases

SCALARS = {"softmax": (14.3,), "sigmoid": (10.0, -10.0)}


def test_a_grid_is_square_while_the_gathered_texts_fit_and_a_ring_when_they_do_not():
    mesh = make_mesh()

    def grid_shape(batch, tiling=DEFAULT_TILING):
        return tuple(make_grid(mesh, jax.ShapeDtypeStruct((batch, 1024), jnp.bfloat16), tiling).shape.values())

    # A text takes 2 KiB and its gradient 4, and two rows gather a quarter of the batch: 1 GiB at 699,050.
    assert grid_shape(32_768) == grid_shape(699_048) == (2, 4, 1)
    assert grid_shape(699_056) == grid_shape(32_768, Tiling(gathered_bytes=0)) == (1, 8, 1)


def softmax_with_ids(image, text, scale, *, ids, valid):
    """Rows over all texts, columns of the images' own texts, which come first."""
    logits, pairs = scale * image @ text.T, len(image)
    counts = (ids[:pairs, None] != ids) | jnp.eye(pairs, len(text), dtype=bool)
    rows = logsumexp(logits, axis=1, where=counts & valid)
    columns = logsumexp(logits[:, :pairs], axis=0, where=counts[:, :pairs] & valid[:pairs, None])
    return jnp.mean((rows + columns) / 2 - jnp.diagonal(logits), where=valid[:pairs])


def sigmoid_with_ids(image, text, scale, bias, *, ids, valid):
    """The images' own texts come first."""
    logits, pairs = scale * image @ text.T + bias, len(image)
    positive = jnp.eye(pairs, len(text), dtype=bool)
    losses = -jnp.where(positive, log_sigmoid(logits), log_sigmoid(-logits))
    counts = (ids[:pairs, None] != ids) | positive
    return jnp.mean(jnp.sum(losses, axis=1, where=counts & valid), where=valid[:pairs])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "on_mesh", "definition"),
    [("softmax", _softmax, softmax_with_ids), ("sigmoid", _sigmoid, sigmoid_with_ids)],
)
def test_more_texts_than_images_some_with_the_ids_of_others(name, on_mesh, definition, padded):
    """Two pairs per device and three more texts. A text with an image's id is no negative of it."""
    pairs, others, mesh, tiling = 16, 24, make_mesh(4, 2), Tiling(block_logits=4)
    image, text = cases.embeddings(pairs + others, 16, 0.3)
    ids, valid = np.arange(pairs + others, dtype=np.int32), np.ones(pairs + others, bool)
    ids[[5, 20, 39]] = 3, 3, 11
    valid[[1, 15, 30]] = not padded
    # The definition has the texts of all images first; on the mesh each device has those of its own first.
    order = np.concatenate([np.arange(pairs).reshape(8, 2), pairs + np.arange(others).reshape(8, 3)], axis=1).ravel()

    def run(image, text, *scalars):
        image, text = jax.lax.with_sharding_constraint((image, text[order]), batch_sharding(mesh))
        texts = Embeddings(text, ids[order], valid[order] if padded else None)
        return on_mesh(image, texts, *scalars, make_grid(mesh, text, tiling), tiling, 0.0)[0]

    values = (image[:pairs], text, *map(jnp.float32, SCALARS[name]))
    loss, gradients = jax.jit(jax.value_and_grad(run, tuple(range(len(values)))))(*values)
    define = functools.partial(definition, ids=ids, valid=jnp.asarray(valid))
    expected, expected_gradients = jax.jit(jax.value_and_grad(define, tuple(range(len(values)))))(*values)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert cases.relative_error(found, np.asarray(wanted, np.float64)) < 1e-5
