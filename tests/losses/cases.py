"""The losses and their gradients in float64 NumPy, embeddings to compare them on, and grids to run them on."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Float64

from clip_jax.devices.sharding import make_mesh
from clip_jax.losses.mesh_grid import ROWS, Tiling, make_grid

# (data, fsdp, tensor), rows of the grid, logits per block; for a batch of 48.
GRIDS = [
    pytest.param((1, 1, 1), 1, 2**21, id="one device, its tile one block"),
    pytest.param((2, 1, 1), 1, 50, id="1 x 2, tiles of 24 x 24 in blocks of 6 x 8"),
    pytest.param((6, 1, 1), 2, 6, id="2 x 3, tiles of 8 x 16 in blocks of 2 x 2"),
    pytest.param((4, 2, 1), 2, 1, id="2 x 4 across both mesh axes, blocks of one logit"),
    pytest.param((2, 2, 2), 2, 2**21, id="2 x 2 and two replicas"),
    pytest.param((8, 1, 1), 1, 2**21, id="1 x 8 where 2 x 4 is possible"),
]


def grid(shape: tuple[int, int, int], rows: int, block_logits: int = 2**21) -> tuple[Mesh, Tiling]:
    """A limit of no gathered bytes makes a grid of one row."""
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    tiling = Tiling(block_logits, gathered_bytes=0 if rows == 1 else 2**30)
    assert make_grid(mesh, np.zeros((48, 16), np.float32), tiling).shape[ROWS] == rows
    return mesh, tiling


def embeddings(batch: int, dim: int, aligned: float = 0.0) -> tuple[Float32[np.ndarray, "batch dim"], ...]:
    """Random images and texts of unit length; with ``aligned`` near 1, those of a pair are almost equal."""
    rng = np.random.default_rng(0)
    image, noise = rng.normal(size=(2, batch, dim))
    text = aligned * image + (1 - aligned) * noise
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


@functools.lru_cache
def _compiled(loss: Callable, scalars: int, **settings) -> Callable:
    """One compilation for all embeddings, scales and paddings."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, **settings), tuple(range(2 + scalars)), has_aux=True))


def value_and_gradients(
    loss: Callable,
    image: Float[Array, "batch dim"],
    text: Float[Array, "batch dim"],
    *scalars: float,
    valid: Bool[np.ndarray, "batch"] | None = None,
    **settings,
) -> tuple[float, float, tuple[Array, ...]]:
    """(loss, accuracy, gradients with respect to all arguments); ``settings`` are keywords of the loss."""
    run = _compiled(loss, len(scalars), **settings)
    (value, metrics), gradients = run(image, text, *map(jnp.float32, scalars), valid=valid)
    return float(value), float(metrics["accuracy"]), gradients


def softmax(
    image: Float[np.ndarray, "batch dim"], text: Float[np.ndarray, "batch dim"], scale: float
) -> tuple[float, tuple[Float64[np.ndarray, "..."], ...]]:
    """(-(mean log softmax over rows + over columns) / 2 of the diagonal, its gradients)."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    logits, size = scale * image @ text.T, len(image)

    def log_softmax(logits: Float64[np.ndarray, "batch batch"]) -> Float64[np.ndarray, "batch batch"]:
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

    rows, columns = log_softmax(logits), log_softmax(logits.T).T
    dlogits = ((np.exp(rows) + np.exp(columns)) / 2 - np.eye(size)) / size
    gradients = scale * dlogits @ text, scale * dlogits.T @ image, np.sum(dlogits * (image @ text.T))
    return -np.trace(rows + columns) / (2 * size), gradients


def sigmoid(
    image: Float[np.ndarray, "batch dim"], text: Float[np.ndarray, "batch dim"], scale: float, bias: float
) -> tuple[float, tuple[Float64[np.ndarray, "..."], ...]]:
    """(-log sigmoid of the signed logits, summed over columns, its mean over rows; its gradients)."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    cosines, size = image @ text.T, len(image)
    signs = 2 * np.eye(size) - 1
    signed = signs * (scale * cosines + bias)
    dlogits = -signs / (1 + np.exp(signed)) / size
    gradients = scale * dlogits @ text, scale * dlogits.T @ image, np.sum(dlogits * cosines), np.sum(dlogits)
    return np.sum(np.logaddexp(0, -signed)) / size, gradients


def in_batch_accuracy(image: Float[np.ndarray, "batch dim"], text: Float[np.ndarray, "batch dim"]) -> float:
    """The mean of the accuracy of images among texts and of texts among images."""
    cosines = image @ text.T
    return np.mean([np.argmax(cosines, axis=axis) == np.arange(len(image)) for axis in (0, 1)])


def relative_error(found: Float[Array, "..."], expected: Float[np.ndarray, "..."]) -> float:
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def assert_close(
    found: tuple[float, float, tuple[Array, ...]],
    expected: tuple[float, tuple[Float64[np.ndarray, "..."], ...]],
    tolerance: float,
) -> None:
    """The loss and the gradients, as relative errors of norms."""
    loss, _, gradients = found
    assert loss == pytest.approx(expected[0], rel=tolerance)
    assert [g.shape for g in gradients] == [np.shape(g) for g in expected[1]]
    assert max(map(relative_error, gradients, expected[1])) < tolerance


PADDING = {
    "at the end": np.arange(48) < 45,
    "all of a device, and holes": (np.arange(48) >= 6) & (np.arange(48) % 5 != 0),
    "all but one pair": np.arange(48) == 20,
    "none": np.ones(48, bool),
}


def assert_padding_is_ignored(
    loss: Callable, definition: Callable, *scalars: float, padding: float, **settings
) -> None:
    """The loss and gradients of batches with some ``padding`` are those of float64 for the pairs alone."""
    image, text = embeddings(48, 16, 0.3)
    for title, valid in PADDING.items():
        padded = [np.where(valid[:, None], x, np.float32(padding)) for x in (image, text)]
        value, accuracy, gradients = value_and_gradients(loss, *padded, *scalars, valid=valid, **settings)
        expected, expected_gradients = definition(image[valid], text[valid], *scalars)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-6), title
        assert accuracy == pytest.approx(in_batch_accuracy(image[valid], text[valid])), title
        assert not any(np.any(g[~valid]) for g in gradients[:2]), title
        found = [*(g[valid] for g in gradients[:2]), *gradients[2:]]
        for ours, theirs in zip(found, expected_gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6, err_msg=title)
