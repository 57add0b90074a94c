"""Encoding many inputs: in order, in batches of few sizes, decoded while the device is busy."""

import threading

import numpy as np
import pytest

from clip_jax.batching import encode_in_batches
from clip_jax.errors import UserError


@pytest.mark.parametrize("batch_size", [1, 4, 6, 64])
def test_every_input_is_encoded_once_in_its_order_in_batches_of_a_power_of_two(batch_size):
    sizes = set()

    def encode(rows):
        sizes.add(len(rows))
        return rows * 2.0

    for count in range(1, 70):
        found = encode_in_batches(range(count), lambda i: np.array([i]), encode, batch_size=batch_size, workers=3)
        np.testing.assert_array_equal(found[:, 0], 2.0 * np.arange(count))
    assert sizes <= {2**k for k in range(7)} | {batch_size} and max(sizes) == batch_size


def test_the_next_batch_is_decoded_while_the_device_has_the_first():
    decoded = [threading.Event() for _ in range(6)]

    def decode(i):
        decoded[i].set()
        return np.array([i])

    def encode(rows):
        if rows[0, 0] == 0:
            assert all(event.wait(timeout=60) for event in decoded)
        return rows

    assert len(encode_in_batches(range(6), decode, encode, batch_size=2, workers=1)) == 6


def test_decoding_stays_a_few_batches_ahead_so_that_memory_does_not_grow_with_the_list():
    decoded, most = [], []

    def encode(rows):
        most.append(len(decoded) - rows[-1, 0])
        return rows

    encode_in_batches(range(200), lambda i: decoded.append(i) or np.array([i]), encode, batch_size=4, workers=2)
    assert max(most) <= 4 * 4


def test_a_broken_input_ends_it_at_once():
    decoded = []

    def decode(i):
        decoded.append(i)
        if i == 3:
            raise UserError("3.jpg: undecodable image")
        return np.array([i])

    with pytest.raises(UserError, match=r"3\.jpg"):
        encode_in_batches(range(10_000), decode, lambda rows: rows, batch_size=4)
    assert len(decoded) < 100


def test_a_bar_is_shown_where_it_is_asked_for(capsys):
    rows = np.zeros((40, 1))
    encode_in_batches(rows, None, lambda rows: rows, batch_size=2)  # no terminal
    assert capsys.readouterr() == ("", "")
    encode_in_batches(rows, None, lambda rows: rows, batch_size=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "40/40" in shown.err


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": 0}])
def test_sizes_below_one_are_mistakes(wrong):
    with pytest.raises(UserError, match="must be at least 1"):
        encode_in_batches([1], lambda i: np.array([i]), lambda rows: rows, **wrong)
    with pytest.raises(UserError, match="nothing to encode"):
        encode_in_batches([], None, lambda rows: rows)
