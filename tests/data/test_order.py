"""The order of samples is a pure function of (seed, k), visits all, and depends on nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.order import Order, permute

SIZES = st.integers(1, 500)


@given(size=SIZES, seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_permutation_and_inverse_undoes_it(size, seed):
    out = permute(np.arange(size), size, seed)
    assert sorted(out) == list(range(size))
    assert list(permute(out, size, seed, inverse=True)) == list(range(size))


@given(samples=st.integers(1, 120), batch=st.integers(3, 40), block=st.integers(1, 30), window=st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_every_sample_once_though_batches_span_two(samples, batch, block, window):
    order = Order(samples, batch, seed=3, block=block, window=window)
    steps = -(-2 * samples // batch)
    seen = np.concatenate([order.batch(step) for step in range(steps)])
    assert sorted(seen[:samples]) == list(range(samples))
    assert sorted(seen[samples : 2 * samples]) == list(range(samples))


def test_epochs_and_seeds_differ():
    one, other = Order(1000, 1000, seed=0), Order(1000, 1000, seed=1)
    assert not np.array_equal(one.batch(0), one.batch(1))
    assert not np.array_equal(one.batch(0), other.batch(0))


def test_a_full_shuffle_is_uncorrelated_with_the_order_on_disk():
    shuffled = Order(100_000, 100_000, seed=0).batch(0)
    assert abs(np.corrcoef(np.arange(100_000), shuffled)[0, 1]) < 0.02
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.02


@pytest.mark.parametrize(("samples", "windows"), [(1000, 1), (1003, 2)])
def test_a_stretch_of_a_windows_length_reads_the_blocks_of_its_windows_alone(samples, windows):
    """After a short last block, windows begin earlier, so that such a stretch may touch two."""
    block, window = 10, 4
    order = Order(samples, samples, seed=5, block=block, window=window).batch(0)
    for start in range(0, samples - 100, block * window):
        assert len(np.unique(order[start : start + block * window] // block)) <= windows * window


def test_first_indices_are_fixed_for_ever():
    """A resumed run relies on these numbers; a library update or a refactoring must not change them."""
    assert Order(3447, 8, seed=0).batch(0).tolist() == FIRST_BATCH
    assert Order(103, 8, seed=7, block=10, window=3).batch(12).tolist() == BATCH_ACROSS_EPOCHS


FIRST_BATCH = [376, 2388, 1145, 3052, 1529, 111, 134, 2661]
BATCH_ACROSS_EPOCHS = [79, 18, 11, 73, 77, 74, 78, 31]
