"""Position embeddings for another image size or text length, resampled as OpenCLIP and timm resample them.

Image grids by a bicubic filter with antialiasing, texts linearly without; each is a product with a small matrix of
weights, equal to PyTorch's ``interpolate``. Rotary embeddings need nothing: they stretch any grid to the pretrained
one.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resize_positions(
    positions: Float[np.ndarray, "old width"], length: int, *, image: bool
) -> Float[np.ndarray, "new width"]:
    """Position embeddings for ``length`` tokens.

    Those of an image are a square grid, and a class token in front of it does not change; those of a text are a line.
    """
    positions = np.asarray(positions)
    width = positions.shape[1]
    if not image:
        return linear(len(positions), length) @ positions
    first = class_tokens(len(positions))
    old, new = math.isqrt(len(positions) - first), math.isqrt(length - first)
    weights, grid = bicubic(old, new), positions[first:].reshape(old, old, width)
    grid = np.einsum("ai,bj,ijw->abw", weights, weights, grid, optimize=True).reshape(new * new, width)
    return np.concatenate([positions[:first], grid])


def resize_grid(positions: Float[Array, "old width"], length: int) -> Float[Array, "new width"]:
    """The same for an image's positions inside a JAX program."""
    first = class_tokens(len(positions))
    old, new = math.isqrt(len(positions) - first), math.isqrt(length - first)
    weights, grid = jnp.asarray(bicubic(old, new)), positions[first:].reshape(old, old, -1)
    grid = jnp.einsum("ai,bj,ijw->abw", weights, weights, grid, precision="highest").reshape(new * new, -1)
    return jnp.concatenate([positions[:first], grid])


def class_tokens(length: int) -> int:
    """0 for a square number of tokens, else 1: the class token. Unambiguous, since no two squares differ by one."""
    return int(math.isqrt(length) ** 2 != length)


def bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of Keys's cubic with a = -0.5 (Keys 1981), widened when shrinking so that nothing aliases."""
    scale = old / new
    stretch = max(scale, 1.0)
    weights = np.zeros((new, old))
    for row in range(new):
        center = scale * (row + 0.5)
        first = max(int(center - 2 * stretch + 0.5), 0)
        last = min(int(center + 2 * stretch + 0.5), old)
        taps = _cubic((np.arange(first, last) + 0.5 - center) / stretch)
        weights[row, first:last] = taps / taps.sum()
    return weights.astype(np.float32)


def _cubic(x: Float[np.ndarray, "taps"]) -> Float[np.ndarray, "taps"]:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def linear(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of the two nearest positions, pixel centers aligned, without antialiasing."""
    position = np.maximum(old / new * (np.arange(new) + 0.5) - 0.5, 0)
    below = np.minimum(np.floor(position).astype(int), old - 1)
    above, share = np.minimum(below + 1, old - 1), position - below
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), below), 1 - share)
    np.add.at(weights, (np.arange(new), above), share)
    return weights.astype(np.float32)
