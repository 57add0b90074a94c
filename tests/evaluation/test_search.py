"""Exact search against a full sort; blocks, devices and parts change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.devices.sharding import make_mesh
from clip_jax.evaluation.paired import difference
from clip_jax.evaluation.search import search, top_k


def unit(n, seed, dim=9):
    x = np.random.default_rng(seed).normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("block", "cuts", "devices"), [(300, [], 1), (16, [100, 107], 1), (64, [50], 8), (7, [], 3), (2048, [], 1)]
)
def test_it_finds_what_a_full_sort_finds(block, cuts, devices):
    queries, index = unit(5, 0), unit(203, 1)
    mesh = make_mesh(devices, devices=jax.devices()[:devices])
    hits = search(queries, np.split(index, cuts), 10, mesh, block=block)
    similarity = queries @ index.T
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :10]
    assert hits.number.tolist() == expected.tolist()
    np.testing.assert_allclose(hits.similarity, np.take_along_axis(similarity, expected, 1), atol=1e-6)


def test_equal_vectors_are_found_in_their_order_and_k_may_exceed_the_index():
    index = np.repeat(unit(1, 0), 5, 0)
    for block in (2, 5, 100):
        hits = search(index[:1], [index], 8, block=block)
        assert hits.number.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1]]
        assert np.isneginf(hits.similarity[0, 5:]).all()


def test_the_largest_by_chunks_are_those_of_a_full_sort_with_many_equal_values():
    rng = np.random.default_rng(0)
    few = np.zeros((7, 64))
    few[:, 40], few[:, [2, 41]] = 5, 3  # the earlier of the equal values is in the chunk with the lower maximum
    for values in (rng.normal(size=(7, 64)), rng.integers(0, 4, (7, 64)), np.zeros((7, 64)), few):
        values = np.where(rng.random((7, 64)) < 0.1 * (values < 3), -np.inf, values).astype(np.float32)
        found, where = top_k(jnp.asarray(values), 5, chunk=8)
        expected = np.argsort(-values, axis=1, kind="stable")[:, :5]
        assert np.asarray(where).tolist() == expected.tolist()
        assert np.array_equal(found, np.take_along_axis(values, expected, 1))


def test_half_precision_and_vectors_that_are_not_finite():
    queries, index = unit(3, 0), unit(40, 1).astype(np.float16)
    index[7] = np.nan
    hits = search(queries, [index], 40)
    assert 7 not in hits.number and (hits.number[:, -1] == -1).all()
    queries[1, 0] = np.inf
    with pytest.raises(ValueError, match="1 of 3 embeddings are not finite"):
        search(queries, [index], 3)


def test_a_paired_difference_is_narrower_than_its_parts_and_contains_the_truth():
    rng = np.random.default_rng(0)
    a = rng.random(2000) < 0.5
    b = np.where(rng.random(2000) < 0.04, True, a)  # b gains half of 4 %
    found = difference(a.astype(float), b.astype(float))
    assert found.mean == pytest.approx(np.mean(b) - np.mean(a)) and found.low < found.mean < found.high
    assert found.low > 0 and found.high - found.low < 0.02  # unpaired, the width would be 0.06
    assert found.better == (b & ~a).sum() and found.worse == 0
    same = difference(a.astype(float), a.astype(float))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="2 and 3 examples"):
        difference(np.zeros(2), np.zeros(3))
