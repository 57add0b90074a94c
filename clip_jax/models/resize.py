"""Parameters for another image size or text length: position embeddings are resampled as OpenCLIP and timm do it.

Image grids by a bicubic filter with antialiasing, texts linearly without; each is a product with a small matrix of
weights, equal to PyTorch's ``interpolate``.
Rotary embeddings need nothing: they stretch any grid to the one that was pretrained.
"""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clip_jax.errors import UserError
from clip_jax.models.clip import Architecture, Params
from clip_jax.models.resnet import ResNetTower


def resize(
    params: Params, architecture: Architecture, *, image_size: int | None = None, context_length: int | None = None
) -> tuple[Params, Architecture]:
    """The model for images of ``image_size`` pixels a side and texts of ``context_length`` tokens; None: as it is.

    A size that changes no grid changes no parameter. Raises UserError for an image smaller than a patch.
    """
    image, text = architecture.image, architecture.text
    if image_size is not None and image_size != image.image_size:
        new = replace(image, image_size=image_size)
        if new.grid < 1:
            raise UserError(f"image_size={image_size} is smaller than a patch of {image.patch_size} pixels")
        resnet = isinstance(image, ResNetTower)  # its grid has one more row in front: the mean
        path = ("attention_pooling", "spatial_embedding") if resnet else ("position_embedding",)
        params = params | {
            "image": _replaced(params["image"], path, image.grid, new.grid, bool(resnet or image.class_token))
        }
        architecture = replace(architecture, image=new)
    if context_length is not None and context_length != text.context_length:
        if context_length < 1:
            raise UserError(f"context_length={context_length} must be at least 1")
        weights = linear(text.context_length, context_length)
        positions = jnp.asarray(weights) @ params["text"]["position_embedding"]
        params = params | {"text": params["text"] | {"position_embedding": positions}}
        architecture = replace(architecture, text=replace(text, context_length=context_length))
    return params, architecture


def _replaced(tree: Params, path: tuple[str, ...], old: int, new: int, first: bool) -> Params:
    """The tree with the grid of positions at ``path`` resampled, and a first row in front of it kept."""
    if len(path) > 1:
        return tree | {path[0]: _replaced(tree[path[0]], path[1:], old, new, first)}
    rows = tree[path[0]]
    if old == new:
        return tree
    weights = jnp.asarray(bicubic(old, new))
    grid = rows[int(first) :].reshape(old, old, -1)
    grid = jnp.einsum("ai,bj,ijw->abw", weights, weights, grid, precision="highest").reshape(new * new, -1)
    return tree | {path[0]: jnp.concatenate([rows[: int(first)], grid])}


def bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of Keys's cubic with a = -0.5 (Keys 1981), widened when shrinking so that nothing aliases."""

    def cubic(x):
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    return _antialiased(old, new, cubic, reach=2)


def _antialiased(old: int, new: int, kernel: Callable, reach: int) -> Float[np.ndarray, "new old"]:
    scale = old / new
    stretch = max(scale, 1.0)
    weights = np.zeros((new, old))
    for row in range(new):
        centre = scale * (row + 0.5)
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), old)
        taps = kernel((np.arange(first, last) + 0.5 - centre) / stretch)
        weights[row, first:last] = taps / taps.sum()
    return weights.astype(np.float32)


def linear(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Weights of the two nearest positions, pixel centres aligned, without antialiasing."""
    place = np.maximum(old / new * (np.arange(new) + 0.5) - 0.5, 0)
    below = np.minimum(np.floor(place).astype(int), old - 1)
    above, share = np.minimum(below + 1, old - 1), place - below
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new), below), 1 - share)
    np.add.at(weights, (np.arange(new), above), share)
    return weights.astype(np.float32)
