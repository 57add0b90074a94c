"""Augmentations of a crop: mirrored, other colors, gray. ``config.data.augment``; all are off by default.

They are torchvision's transforms on Pillow's images, as in the training transforms of OpenCLIP, CLIPA and PE
(docs/data.md has their settings), applied by the workers to the resized crop. An augmentation that is off draws no
random number, so that it changes no batch. ``augment_device.py`` makes them in the step.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from clip_jax.data.images import Crop


class Augment(NamedTuple):
    """How often each augmentation is applied, and how strong it is."""

    flip: float = 0.0
    """The probability that an image is mirrored, left to right."""
    jitter: tuple[float, ...] = ()
    """The largest change of brightness, contrast, saturation (factors within 1 +- change) and hue (in turns); empty:
    colors are not changed."""
    jitter_probability: float = 1.0
    gray: float = 0.0
    """The probability that an image loses its colors."""


NONE = Augment()


def augment(crop: Crop, rng: np.random.Generator, how: Augment) -> Crop:
    """The crop with its augmentations: first the mirror, then the colors."""
    flipped = how.flip > 0 and rng.random() < how.flip
    pixels = crop.pixels[:, ::-1] if flipped else crop.pixels
    if how.jitter and rng.random() < how.jitter_probability:
        pixels = jitter(pixels, rng, how.jitter)
    if how.gray > 0 and rng.random() < how.gray:
        pixels = gray(pixels)
    return Crop(pixels, crop.box, crop.flipped != flipped)


def jitter(pixels: np.ndarray, rng: np.random.Generator, strength: tuple[float, ...]) -> np.ndarray:
    """uint8[height, width, 3]: torchvision's ColorJitter. Changes come in random order; a strength of 0 makes none."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    # All numbers are drawn in any case: the order of the changes must not depend on which of them are made.
    factors = [rng.uniform(max(0.0, 1 - change), 1 + change) for change in strength[:3]]
    turn = rng.uniform(-strength[3], strength[3])
    for kind in rng.permutation(4):
        if strength[kind] == 0:
            continue
        image = turned_hue(image, turn) if kind == 3 else ENHANCE[kind](image).enhance(factors[kind])
    return np.asarray(image)


ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def turned_hue(image: Image.Image, turn: float) -> Image.Image:
    """The hue moved by a part of the circle, -0.5 to 0.5, in steps of 1/256."""
    hue, saturation, value = image.convert("HSV").split()
    moved = (np.asarray(hue).astype(np.int32) + int(turn * 255)) % 256
    return Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), saturation, value)).convert("RGB")


def gray(pixels: np.ndarray) -> np.ndarray:
    """uint8[height, width, 3]: the luminance (ITU-R 601) in all channels."""
    luminance = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))
    return np.repeat(luminance[..., None], 3, axis=2)
