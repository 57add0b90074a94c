"""Matrix products of activations and weights, and biases, in the form that the compiler of each platform does best."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.devices.sharding import on_cpu, on_tpu
from clip_jax.models.compute import Compute


def product(
    equation: str, x: Float[Array, "*tokens features"], weight: Array, compute: Compute
) -> Float[Array, "*tokens features"]:
    """``jnp.einsum`` of activations, whose axes ``...`` are batch and tokens, and a weight in the compute type.

    On a CPU all tokens of the batch become one axis. The gradient with respect to the weight sums over both axes, and
    for a sum over two axes XLA first transposes the activations in memory: a third of a training step's time.
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

    The gradient of a bias is a sum over all tokens. On a TPU the matrix unit adds them: by the compiler's estimate, the
    vector unit would take a tenth of a B/16's step.
    """
    bias = bias.astype(compute.dtype)
    return _summed_by_products(x, bias) if on_tpu(compute.mesh) else x + bias


@jax.custom_vjp
def _summed_by_products(x: Array, bias: Array) -> Array:
    return x + bias


def _forward(x: Array, bias: Array) -> tuple[Array, None]:
    return x + bias, None


def _backward(_: None, gradient: Array) -> tuple[Array, Array]:
    # The compiler would turn a product with one row of ones back into a sum.
    ones = jnp.ones((8, *gradient.shape[:-1]), gradient.dtype)
    tokens = tuple(range(gradient.ndim - 1))
    numbers = ((tuple(axis + 1 for axis in tokens), tokens), ((), ()))
    summed = jax.lax.dot_general(ones, gradient, numbers, preferred_element_type=jnp.float32)[0]
    return gradient, summed.astype(gradient.dtype)


_summed_by_products.defvjp(_forward, _backward)
