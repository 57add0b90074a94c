"""Robustness: corrupted images at five severities, and effective robustness against a baseline line.

The kinds and their constants are those of ImageNet-C (Hendrycks and Dietterich 2019), whose pictures have 224 pixels;
lengths in pixels are scaled with the picture. ImageNet-C itself is JPEG files of such pictures: numbers on it and on
corruptions made here, before any compression, are not interchangeable. Their noise is a function of the sample's key.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from clip_jax.data import images
from clip_jax.data.sources.sample import BadSampleError, Sample, Source

Pixels = UInt8[np.ndarray, "height width 3"]
SEVERITIES = (1, 2, 3, 4, 5)
_SIDE = 224


def _noise(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return _bytes(pixels / 255 + rng.normal(scale=deviation, size=pixels.shape))


def _impulse(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    drawn = rng.random(pixels.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 255, pixels)).astype(np.uint8)


def _blur(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    sigma = (1, 2, 3, 4, 6)[severity - 1] * min(pixels.shape[:2]) / _SIDE
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def _jpeg(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(file).convert("RGB"))


def _contrast(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    contrast = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean = pixels.mean(axis=(0, 1), keepdims=True) / 255
    return _bytes((pixels / 255 - mean) * contrast + mean)


def _brightness(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    """Added to all channels; ImageNet-C adds it to HSV's value."""
    return _bytes(pixels / 255 + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1])


def _pixelate(pixels: Pixels, severity: int, rng: np.random.Generator) -> Pixels:
    scale = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = pixels.shape[:2]
    small = Image.fromarray(pixels).resize(
        (max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


CORRUPTIONS: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "noise": _noise,
    "impulse": _impulse,
    "blur": _blur,
    "jpeg": _jpeg,
    "contrast": _contrast,
    "brightness": _brightness,
    "pixelate": _pixelate,
}


def _bytes(x: np.ndarray) -> Pixels:
    return np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)


def corrupt(pixels: Pixels, kind: str, severity: int, key: str) -> Pixels:
    """The picture under ``kind`` at severity 1 to 5; the noise follows from ``key``."""
    rng = np.random.default_rng(zlib.crc32(f"{kind}/{severity}/{key}".encode()))
    return CORRUPTIONS[kind](pixels, severity, rng)


@dataclass(frozen=True)
class Changed:
    """A source with changed images."""

    source: Source
    what: str
    """Names the change with everything that it depends on."""
    change: Callable[[Pixels, Sample], Pixels]

    @property
    def name(self) -> str:
        return f"{self.source.name} {self.what}"

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-{self.what.replace(' ', '-')}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        try:
            pixels = np.asarray(images.decode(sample.image))
        except images.BadImageError as error:
            raise BadSampleError(str(error), sample.key) from error
        return sample._replace(image=self.change(pixels, sample))


def corrupted(source: Source, kind: str, severity: int) -> Changed:
    """The source with every image under a corruption."""
    return Changed(source, f"{kind} {severity}", lambda pixels, sample: corrupt(pixels, kind, severity, sample.key))


def effective_robustness(accuracy: float, shifted: float, baseline: Float[np.ndarray, "models 2"]) -> float:
    """How far ``shifted`` lies above what a model of this ``accuracy`` would be expected to have (Taori et al. 2020).

    ``baseline`` holds (accuracy, accuracy under the shift) of at least two other models, in (0, 1); the line is fitted
    through their logits, as in the paper.
    """
    if len(baseline) < 2 or not (np.all(baseline > 0) and np.all(baseline < 1)):
        raise ValueError("baseline: two or more models with accuracies between 0 and 1")
    x, y = np.log(baseline / (1 - baseline)).T
    slope, offset = np.polyfit(x, y, 1)
    with np.errstate(divide="ignore"):  # an accuracy of 0 or 1
        expected = slope * (np.log(accuracy) - np.log1p(-accuracy)) + offset
    return float(shifted - 1 / (1 + np.exp(-expected)))
