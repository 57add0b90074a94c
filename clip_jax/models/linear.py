"""Matrix products of activations and weights, and biases, in the form that XLA compiles best on each platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.devices.sharding import on_cpu, on_tpu
from clip_jax.models.compute import Compute


def product(
    equation: str, x: Float[Array, "*tokens features"], weight: Array, compute: Compute
) -> Float[Array, "*tokens outputs"]:
    """``jnp.einsum`` of activations, whose axes ``...`` are batch and tokens, and a weight cast to the compute dtype.

    On CPUs, batch and tokens are merged into one axis. The gradient with respect to the weight sums over both, and for
    a contraction over two axes XLA first transposes the activations in memory, a third of the time of a training step.
    """
    weight = weight.astype(compute.dtype)
    if not on_cpu(compute.mesh):
        return jnp.einsum(equation, x, weight)
    features = equation.index(",") - len("...")
    tokens = x.shape[: x.ndim - features]
    result = jnp.einsum(equation.replace("...", "n"), x.reshape(-1, *x.shape[-features:]), weight)
    return result.reshape(*tokens, *result.shape[1:])


def add_bias(
    x: Float[Array, "*tokens features"], bias: Float[Array, " features"], compute: Compute
) -> Float[Array, "*tokens features"]:
    """``x`` plus a bias in the compute type.

    The gradient of a bias is a sum over all tokens. On TPUs it is computed on the MXU, as a product with ones: by the
    compiler's estimate, the vector unit would take a tenth of a B/16 step for it.
    """
    bias = bias.astype(compute.dtype)
    return _add_bias_with_matmul_gradient(x, bias) if on_tpu(compute.mesh) else x + bias


@jax.custom_vjp
def _add_bias_with_matmul_gradient(x: Array, bias: Array) -> Array:
    return x + bias


def _forward(x: Array, bias: Array) -> tuple[Array, None]:
    return x + bias, None


def _backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, sum_over_tokens(gradient).astype(gradient.dtype)


_add_bias_with_matmul_gradient.defvjp(_forward, _backward)


def sum_over_tokens(x: Float[Array, "*tokens features"]) -> Float[Array, " features"]:
    """The sum over all axes but the last, in float32, by the matrix unit."""
    # Eight rows, because XLA turns a product with a single row of ones back into a sum.
    ones = jnp.ones((8, *x.shape[:-1]), x.dtype)
    tokens = tuple(range(x.ndim - 1))
    dimension_numbers = ((tuple(axis + 1 for axis in tokens), tokens), ((), ()))
    return jax.lax.dot_general(ones, x, dimension_numbers, preferred_element_type=jnp.float32)[0]
