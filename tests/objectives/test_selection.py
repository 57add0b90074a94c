"""Active selection: the definition with the whole matrix, on every mesh; what moves between devices; a run with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices.sharding import batch_sharding, make_mesh, replicated, take_rows
from clip_jax.objectives import selection
from clip_jax.planning import program

PAIRS, RATIO, CHUNKS = 64, 2, 4


def case():
    """(learner, reference, keys); losses of a few units, so that scores matter beside the noise."""
    rng = np.random.default_rng(0)

    def model(dim, scale, bias):
        image, text = rng.normal(size=(2, PAIRS, dim)).astype(np.float32)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text)]
        return (*unit, np.float32(scale), np.float32(bias))

    return model(6, 12.0, -3.0), model(10, 20.0, -5.0), jax.random.split(jax.random.key(3), PAIRS)


def definition(learner, reference, keys):
    """JEST, with all losses at once."""

    def losses(image, text, scale, bias):
        signs = 1 - 2 * np.eye(PAIRS)
        return np.logaddexp(0, signs * (scale * image @ text.T + bias))

    scores, rows = losses(*learner) - losses(*reference), []
    for chunk in range(CHUNKS):
        gains = np.diag(scores) + scores[:, rows].sum(axis=1) + scores[rows, :].sum(axis=0)
        gains[rows] = -np.inf
        noise = [float(jax.random.gumbel(jax.random.fold_in(key, chunk))) for key in keys]
        rows += np.argsort(-(gains + noise))[: PAIRS // RATIO // CHUNKS].tolist()
    return rows, np.diag(scores)


@pytest.fixture(scope="module")
def expected():
    return definition(*case())


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_the_rows_are_those_of_the_definition_on_every_mesh_and_there_is_no_matrix(expected, shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    learner, reference, keys = case()
    put = [
        [jax.device_put(x, batch_sharding(mesh) if np.ndim(x) else replicated(mesh)) for x in model]
        for model in (learner, reference)
    ]
    run = jax.jit(lambda *models: selection.select(*models, keys, ratio=RATIO, chunks=CHUNKS, mesh=mesh))
    rows, metrics = run(*put)
    wanted, scores = expected
    assert rows.tolist() == wanted
    assert float(metrics["selection/all"]) == pytest.approx(scores.mean(), rel=1e-4)
    assert float(metrics["selection/selected"]) == pytest.approx(scores[wanted].mean(), rel=1e-4)
    assert scores[wanted].mean() > scores.mean()
    shapes = [shape.split("[")[1] for shape in program.buffers(run.lower(*put).compile().as_text())]
    sizes = [np.prod([int(n) for n in shape.rstrip("]").split(",") if n]) for shape in shapes]
    # Neither all scores nor, on several devices, all embeddings.
    assert max(sizes) < (PAIRS * PAIRS / RATIO / 2 if mesh.size == 1 else learner[0].size)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_only_the_taken_rows_move_between_devices(shape):
    mesh, rng = make_mesh(*shape), np.random.default_rng(0)
    rows = jnp.asarray(rng.permutation(64)[:32])
    for x in (rng.integers(0, 256, (64, 5, 7), np.uint8), rng.normal(size=(64, 3)), rng.random((64, 2)) < 0.5):
        x = jax.device_put(x, batch_sharding(mesh))
        run = jax.jit(lambda x, rows: take_rows(x, rows, mesh))
        np.testing.assert_array_equal(run(x, rows), np.asarray(x)[rows])
        assert run(x, rows).dtype == x.dtype
        sent = program.collectives(run.lower(x, rows).compile().as_text())
        assert 0 < sum(c.bytes * c.times for c in sent) <= 1.01 * x.nbytes / 2 * (4 if x.dtype != np.float32 else 1)
