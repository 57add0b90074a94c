"""Products and biases in the form of each platform are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from clip_jax.devices.sharding import AXES, make_mesh, on_tpu
from clip_jax.models import linear
from clip_jax.models.compute import Compute

TPUS = AbstractMesh((1, 1, 1), AXES, abstract_device=AbstractDevice("", None, "tpu"))


def mean_of_squares(compute):
    return lambda x, bias: jnp.mean(linear.add_bias(x, bias, compute).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_bias_and_its_gradient_are_the_same_on_a_tpu(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 50, 24), dtype)
    bias = jnp.linspace(-1, 1, 24)
    assert on_tpu(TPUS) and not on_tpu(None) and not on_tpu(make_mesh())
    (value, gradients), (found, ours) = (
        jax.value_and_grad(mean_of_squares(Compute(dtype=dtype, mesh=mesh)), (0, 1))(x, bias) for mesh in (None, TPUS)
    )
    assert found == value
    for a, b in zip(gradients, ours, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5 if dtype == jnp.float32 else 2e-2, atol=1e-7)


def test_on_a_tpu_no_vector_unit_sums_the_gradient_of_a_bias():
    x, bias = jnp.ones((3, 50, 24), jnp.bfloat16), jnp.ones(24)
    program = str(jax.make_jaxpr(jax.grad(mean_of_squares(Compute(dtype=jnp.bfloat16, mesh=TPUS)), 1))(x, bias))
    assert "dot_general" in program and "reduce_sum" not in program.split("dot_general", 1)[1]
