"""Renders a scene of ``shapes``: flat, outlined, textured shapes on a light background, antialiased, in NumPy alone.

A shape is a signed distance in pixels (negative inside), from which edge, outline and antialiasing all follow.
Distances are slow to evaluate, so each (shape, texture, radius) is evaluated once and cached as a *stencil* that any
color can fill: drawing an object is one multiplication and two additions over its box of pixels.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

Field = Float[np.ndarray, "height width"]
RGB = tuple[float, float, float]
"""Red, green and blue in 0..255."""

COLORS: dict[str, RGB] = {
    # Far apart in hue or lightness, so that the jitter of a scene never turns one into another; none begins with a
    # vowel, so that "a {}" is right for all of them.
    "red": (222, 40, 40),
    "yellow": (252, 208, 32),
    "green": (48, 160, 64),
    "cyan": (64, 200, 220),
    "blue": (40, 80, 210),
    "purple": (128, 56, 176),
    "pink": (252, 140, 190),
    "black": (44, 44, 50),
}


class SceneObject(NamedTuple):
    """One object of a scene: how captions describe it, then how it is drawn (lengths are fractions of the side)."""

    color: str
    shape: str
    size: str
    texture: str
    position: str
    x: float
    y: float
    radius: float
    rgb: RGB


class Scene(NamedTuple):
    """Everything that a picture shows, from which it is rendered at any resolution."""

    objects: tuple[SceneObject, ...]
    background: RGB
    light: tuple[float, float]
    """How much brighter the background is at the right edge and at the bottom edge than in the middle."""


def render(scene: Scene, image_size: int) -> UInt8[np.ndarray, "side side 3"]:
    """The picture: uint8, the same bytes wherever IEEE arithmetic holds."""
    canvas = background(scene, image_size)
    for each in scene.objects:
        stencil = _stencil(each.shape, each.texture, each.radius * image_size, image_size)
        # Centers are rounded to whole pixels, or no two objects would share a stencil.
        half = len(stencil.keep) // 2
        left, top = (middle - half for middle in _center(each, image_size))
        patch = canvas[top : top + 2 * half, left : left + 2 * half]
        patch *= stencil.keep
        patch += stencil.tint * np.float32(each.rgb)
        patch += stencil.white
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def box(each: SceneObject, image_size: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an object in the picture of that size, as fractions of its side."""
    x, y = _center(each, image_size)
    radius = each.radius * image_size
    left, top, right, bottom = _extent(each.shape)
    sides = (x + radius * left, y + radius * top, x + radius * right, y + radius * bottom)
    return tuple(min(max(side / image_size, 0.0), 1.0) for side in sides)


def _center(each: SceneObject, image_size: int) -> tuple[int, int]:
    """Where an object is drawn, in whole pixels: all of its stencil lies in the picture."""
    half = _half(each.radius * image_size)
    return tuple(min(max(round(side * image_size), half), image_size - half) for side in (each.x, each.y))


def _half(radius: float) -> int:
    """Half of the side of a stencil: the radius and the soft edge, in whole pixels."""
    return math.ceil(radius + 0.5)


@functools.cache
def _extent(shape: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a shape in units of its radius, to 1/256."""
    steps = np.linspace(-1, 1, 513, dtype=np.float32)
    x, y = np.broadcast_arrays(steps[None, :], steps[:, None])
    inside = SHAPES[shape](x, y) <= 0
    across, down = (steps[np.flatnonzero(inside.any(axis))] for axis in (0, 1))
    return float(across[0]), float(down[0]), float(across[-1]), float(down[-1])


def background(scene: Scene, image_size: int) -> Float[np.ndarray, "side side 3"]:
    """The picture without its objects, in 0..255."""
    ramp = np.linspace(-1, 1, image_size, dtype=np.float32)
    across, down = np.float32(scene.light[0]) * ramp, np.float32(scene.light[1]) * ramp
    return (down[:, None] + across)[:, :, None] + np.float32(scene.background)


class _Stencil(NamedTuple):
    """pixel = keep * background + tint * color + white."""

    keep: Float[np.ndarray, "height width 1"]
    tint: Float[np.ndarray, "height width 1"]
    white: Float[np.ndarray, "height width 1"]


@functools.lru_cache(maxsize=4096)
def _stencil(shape: str, texture: str, radius: float, image_size: int) -> _Stencil:
    half = _half(radius)
    centers = np.arange(-half, half, dtype=np.float32) + np.float32(0.5)
    x, y = np.broadcast_arrays(centers[None, :], centers[:, None])
    distance = SHAPES[shape](x / radius, y / radius) * radius
    coverage = soften(distance)
    # The outline, darker than the fill, closes the silhouette where white texture meets the light background.
    outline = soften(-distance - image_size / 64)
    white = soften(TEXTURES[texture](x, y, image_size / 64)) * (1 - outline)
    planes = (1 - coverage, coverage * (1 - white) * (1 - 0.45 * outline), coverage * white * 255)
    return _Stencil(*(plane[:, :, None].astype(np.float32) for plane in planes))


def soften(distance: Field) -> Field:
    """How much of a pixel lies inside an edge at this distance from its center."""
    return np.clip(0.5 - distance, 0, 1)


# Shapes: signed distances in units of the radius, y pointing down; none extends beyond 1.


def _polygon(*corners: tuple[float, float]) -> Callable[[Field, Field], Field]:
    # Rounded, so that the last bit of a platform's sine does not change a pixel.
    corners = tuple((round(x, 4), round(y, 4)) for x, y in corners)

    def distance(x: Field, y: Field) -> Field:
        squared = np.full(x.shape, np.inf, np.float32)
        inside: Bool[np.ndarray, "height width"] = np.zeros(x.shape, bool)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy = bx - ax, by - ay
            along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
            squared = np.minimum(squared, (x - ax - along * dx) ** 2 + (y - ay - along * dy) ** 2)
            if dy:  # Even-odd rule: a pixel is inside if an odd number of edges lies to its right.
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * (dx / dy))
        return np.where(inside, -1, 1) * np.sqrt(squared)

    return distance


def _star(points: int, inner_radius: float) -> list[tuple[float, float]]:
    turns = [math.pi * k / points for k in range(2 * points)]
    radii = [1.0, inner_radius] * points
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]


def _heart(corners: int) -> list[tuple[float, float]]:
    """The usual curve (16 sin^3 t, 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t), shrunk to fit."""
    turns = [2 * math.pi * k / corners for k in range(corners)]
    curve = [
        (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in turns
    ]
    return [(x / 17, -(y + 2.5) / 16) for x, y in curve]


SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": lambda x, y: np.sqrt(x * x + y * y) - 0.94,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.8,
    "triangle": _polygon((0, -0.94), (0.98, 0.8), (-0.98, 0.8)),
    "star": _polygon(*_star(5, 0.5)),
    "cross": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.36, np.maximum(abs(x), abs(y)) - 0.96),
    "diamond": _polygon((0, -1), (0.76, 0), (0, 1), (-0.76, 0)),
    "ring": lambda x, y: abs(np.sqrt(x * x + y * y) - 0.68) - 0.27,
    "heart": _polygon(*_heart(32)),
}


# Textures: signed distances in pixels to the region where the fill is white; ``unit`` is 1 in 64-pixel pictures.


def _from_lattice(u: Field, period: float) -> Field:
    """Distance to the nearest multiple of the period."""
    return abs((u + period / 2) % period - period / 2)


def _striped(x: Field, y: Field, unit: float) -> Field:
    return _from_lattice((x + y) * math.sqrt(0.5) + 2.5 * unit, 5 * unit) - 1.1 * unit


def _dotted(x: Field, y: Field, unit: float) -> Field:
    u, v = (x + y) * math.sqrt(0.5), (x - y) * math.sqrt(0.5)
    return np.sqrt(_from_lattice(u, 5 * unit) ** 2 + _from_lattice(v, 5 * unit) ** 2) - 1.5 * unit


TEXTURES: dict[str, Callable[[Field, Field, float], Field]] = {
    "plain": lambda x, y, unit: np.full(x.shape, np.inf, np.float32),
    "striped": _striped,
    "dotted": _dotted,
}
