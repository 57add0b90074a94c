"""Images with a class for every pixel, for ``dense``: a folder of masks, and the bundled scenes."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_jax.data.images import ENDINGS
from clip_jax.data.sources import shapes
from clip_jax.data.sources.labels import FILE
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.data.sources.shapes import variants
from clip_jax.data.sources.shapes.rendering import COLORS, SHAPES
from clip_jax.errors import UserError

IGNORE = 255
"""Pixels of no class, as in Pascal VOC and ADE20K."""


@dataclass(frozen=True)
class Masked:
    """Images with a class for every pixel."""

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    images: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index].read_bytes(), ("",), self.images[index].name)

    def mask(self, index: int) -> UInt8[np.ndarray, "height width"]:
        """Raises BadSampleError for a file that holds no classes."""
        with Image.open(self.masks[index]) as file:
            found = np.asarray(file)  # a palette's colors are names of its numbers
        if found.ndim != 2 or found.dtype != np.uint8:
            raise BadSampleError("mask is not one 8-bit channel", str(self.masks[index]))
        return found


def is_masked(folder: Path) -> bool:
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def open_masked(folder: Path) -> Masked:
    """``images/NAME.jpg`` with ``masks/NAME.png``, whose pixels are lines of ``classnames.txt`` from 0, or 255.

    Raises UserError for what is missing.
    """
    names = tuple(line.strip() for line in _lines(folder / FILE))
    images = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower().lstrip(".") in ENDINGS)
    masks = [folder / "masks" / f"{image.stem}.png" for image in images]
    missing = [mask for mask in masks if not mask.is_file()]
    if not names or not images or missing:
        what = "classnames.txt has no class" if not names else f"{missing[0]}: missing" if images else "images is empty"
        raise UserError(f"{folder}: {what}; every images/NAME.jpg needs a masks/NAME.png of lines of classnames.txt")
    content = [[file.name, file.stat().st_size] for file in (*images, *masks)]
    fingerprint = hashlib.sha256(json.dumps([names, content]).encode()).hexdigest()[:24]
    return Masked(f"masks:{folder.name}", fingerprint, names, tuple(images), tuple(masks))


@dataclass(frozen=True)
class MaskedScenes:
    """The bundled scenes, where each pixel of an object has its class and the background has none."""

    source: shapes.Shapes

    class_names = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
    name = property(lambda self: f"{self.source.name} masks")
    fingerprint = property(lambda self: f"{self.source.fingerprint}-masks")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]

    def mask(self, index: int) -> UInt8[np.ndarray, "side side"]:
        scene = self.source.describe(index)[0]
        return variants.mask(scene, self.class_names, IGNORE, self.source.image_size)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
