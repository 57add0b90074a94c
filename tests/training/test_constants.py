"""A checksum of weights: the same for every sharding, another one for any other value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.devices.sharding import make_mesh
from clip_jax.training.constants import checksum

X = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checksum_does_not_depend_on_the_sharding(dtype):
    x = jnp.asarray(X, dtype)
    split = jax.device_put(x, NamedSharding(make_mesh(2, 4), PartitionSpec(("data", "fsdp"))))
    assert checksum({"a": {"b": x}}) == checksum({"a": {"b": split}})


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.nextafter(X, np.float32(9))},
        {"a": X[::-1].copy()},  # the same values at other positions
        {"a": X.swapaxes(0, 1).copy()},
        {"a": X.reshape(6, 8, 4)},
        {"a": jnp.asarray(X, "bfloat16")},
        {"b": X},
        {"a": X, "b": X},
    ],
)
def test_other_values_positions_shapes_types_and_names_have_another_checksum(other):
    assert checksum({"a": jnp.asarray(X)}) != checksum(jax.tree.map(jnp.asarray, other))
