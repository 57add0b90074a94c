"""Layer norm whose sums are products with ones, as on TPUs, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.compute import Compute
from clip_jax.models.norm import LayerNorm, summed_by_products

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, size=(4, 17, 96)).astype(np.float32)  # a mean that is not zero
SCALE, BIAS = (RNG.normal(size=96).astype(np.float32) for _ in range(2))
GRADIENT = RNG.normal(size=X.shape).astype(np.float32)


def definition(x, scale, bias):
    return LayerNorm(Compute()).apply({"params": {"scale": scale, "bias": bias}}, x)


def value_and_gradients(norm, x):
    value, backward = jax.vjp(norm, x, SCALE, BIAS)
    return value, *backward(GRADIENT.astype(value.dtype))


def test_values_and_gradients_are_those_of_the_definition():
    found = value_and_gradients(lambda *of: summed_by_products(*of, 1e-5), X)
    for ours, theirs in zip(found, value_and_gradients(definition, X), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_in_bfloat16_it_is_as_exact_as_a_norm_that_is_rounded_at_its_end():
    x = jnp.asarray(X, jnp.bfloat16)
    exact = value_and_gradients(definition, x.astype(jnp.float32))
    found = value_and_gradients(lambda *of: summed_by_products(*of, 1e-5), x)
    for ours, theirs in zip(found, exact, strict=True):
        apart = np.abs(np.asarray(ours, np.float32) - np.asarray(theirs)).mean() / np.abs(theirs).mean()
        assert apart < 2**-8, apart


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elsewhere_the_sums_are_sums(dtype):
    """CPUs and GPUs, and float32 on TPUs, keep the definition: their numbers do not change."""
    norm = LayerNorm(Compute(dtype=jnp.dtype(dtype)))
    program = jax.make_jaxpr(lambda x: norm.apply({"params": {"scale": SCALE, "bias": BIAS}}, x))(X)
    assert "dot_general" not in str(program) and "custom_vjp" not in str(program)
