"""Other pictures of the scenes of ``shapes``: gray, outlines, and silhouettes filled with another shape, masks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from clip_jax.data.sources.shapes.rendering import SHAPES, Field, Scene, SceneObject, background, soften

Picture = UInt8[np.ndarray, "side side 3"]
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion
INK = 44.0
LARGEST = 30 / 128
"""The radius of the largest objects: a fill needs room."""
TILES = 10
"""Copies of the filling shape per side of the picture."""


def gray(pixels: Picture) -> Picture:
    """Luminance alone."""
    luminance = np.rint(pixels @ np.array(LUMINANCE, np.float32)).astype(np.uint8)
    return np.repeat(luminance[:, :, None], 3, axis=2)


def outline(scene: Scene, image_size: int) -> Picture:
    """Dark lines of one color around every object, and nothing inside."""
    canvas = background(scene, image_size)
    for each in scene.objects:
        line = soften(abs(_distance(each, each.radius, image_size)) - image_size / 64)[:, :, None]
        canvas = canvas * (1 - line) + line * INK
    return _bytes(canvas)


def filled(scene: Scene, fill: str, contrast: float, image_size: int) -> Picture:
    """Every object in its color, large, with small white copies of the shape ``fill`` inside.

    ``contrast``: 0 shows no copies, 1 white ones.
    """
    canvas = background(scene, image_size)
    period = image_size / TILES
    y, x = np.mgrid[:image_size, :image_size].astype(np.float32) + np.float32(0.5)
    u, v = (((axis + period / 2) % period) - period / 2 for axis in (x, y))
    radius = 0.46 * period
    tiles = contrast * soften(SHAPES[fill](u / radius, v / radius) * radius)[:, :, None]
    for each in scene.objects:
        inside = soften(_distance(each, max(each.radius, LARGEST), image_size))[:, :, None]
        canvas = canvas * (1 - inside) + inside * (np.float32(each.rgb) * (1 - tiles) + 255 * tiles)
    return _bytes(canvas)


def mask(scene: Scene, class_names: Sequence[str], ignored: int, image_size: int) -> UInt8[np.ndarray, "side side"]:
    """The class of every pixel of an object ("red circle"); ``ignored`` for the background and for other objects."""
    found = np.full((image_size, image_size), ignored, np.uint8)
    for each in scene.objects:
        name = f"{each.color} {each.shape}"
        if name in class_names:
            found[_distance(each, each.radius, image_size) <= 0] = class_names.index(name)
    return found


def _distance(each: SceneObject, radius: float, image_size: int) -> Field:
    """The signed distance of every pixel of the picture to the edge of an object, in pixels."""
    centers, radius = np.arange(image_size, dtype=np.float32) + np.float32(0.5), radius * image_size
    x, y = np.broadcast_arrays(centers[None] - each.x * image_size, centers[:, None] - each.y * image_size)
    return SHAPES[each.shape](x / radius, y / radius) * radius


def _bytes(canvas: Float[np.ndarray, "side side 3"]) -> Picture:
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
