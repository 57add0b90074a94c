"""Typographic attacks: a wrong class's name painted on the image (Goh et al. 2021, "Multimodal neurons", section 5).

A model that reads instead of looking takes an apple with a label "iPod" for an iPod. Per image one wrong class is
drawn, the same for every size of the letters; its name is painted in white letters with a black edge at a place that
follows from the image's key.

- ``clean``, ``mean``: top-1 accuracy without the word, and with it, the mean over the sizes.
- ``fooled``: the share of images that are taken for the painted class, likewise; chance for a constant model.

Traps. A word that hides the object lowers accuracy without being read: ``fooled`` above the share of that class among
the clean mistakes is what shows reading. Numbers depend on the font (Pillow's own, Latin letters) and on the sizes,
which are shares of the image's height, and are not comparable with photographs of printed labels.
"""

import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clip_jax.data.sources.sample import Sample, Source
from clip_jax.evaluation import prompts
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.robustness import Changed, Pixels
from clip_jax.evaluation.subject import (
    Ensemble,
    Result,
    Task,
    class_probabilities,
    judge,
    judge_probabilities,
    labeled,
)

SIZES = (0.06, 0.1, 0.15, 0.2)
"""The height of the letters, as a share of the image's height."""
MARGIN = 2


def wrong_class(label: int, classes: int, key: str) -> int:
    """A class other than ``label``, which follows from the image's key."""
    return (label + 1 + int(_generator(key, "class").integers(classes - 1))) % classes


def paint(pixels: Pixels, word: str, size: float, key: str) -> Pixels:
    """The image with a word on it; letters become smaller where the word would be wider than the image."""
    image = Image.fromarray(pixels)
    draw, height = ImageDraw.Draw(image), max(6.0, size * image.height)
    left, top, right, bottom, edge = _box(draw, word, height)
    while right - left > image.width - 2 * MARGIN and height > 2:  # widths are rounded, and the edge does not shrink
        height *= 0.95
        left, top, right, bottom, edge = _box(draw, word, height)
    x, y = _generator(key, "place").random(2)
    at = (
        MARGIN + x * max(0, image.width - 2 * MARGIN - (right - left)) - left,
        MARGIN + y * max(0, image.height - 2 * MARGIN - (bottom - top)) - top,
    )
    font = ImageFont.load_default(height)
    draw.text(at, word, fill="white", font=font, stroke_width=edge, stroke_fill="black")
    return np.asarray(image)


def attacked(source: Source, names: tuple[str, ...], size: float) -> Changed:
    """The source with the name of a wrong class on every image."""

    def change(pixels: Pixels, sample: Sample) -> Pixels:
        return paint(pixels, names[wrong_class(sample.label, len(names), sample.key)], size, sample.key)

    return Changed(source, f"typographic {size:g} {Prompts(names, ()).fingerprint}", change)


def protocol(task: Task, models: Ensemble) -> Result:
    """Accuracy and fooled images by the size of the letters."""
    embedded, names = labeled(task.source, models), task.prompts.class_names
    keys = [task.source[index].key for index in embedded.indices.tolist()]
    painted = np.array(
        [wrong_class(label, len(names), key) for label, key in zip(embedded.labels.tolist(), keys, strict=True)]
    )
    judged, fooled = [], []
    for each in (task, *(task._replace(source=attacked(task.source, names, size)) for size in SIZES)):
        judged.append(judge(each, models))
        fooled.append(_hits(each, models, painted))
    right = [each.hits() for each in judged]
    metrics = {"mean": float(np.mean(right[1:])), "clean": float(right[0].mean()), "fooled": float(np.mean(fooled[1:]))}
    metrics |= {f"letters_{100 * size:g}": float(v.mean()) for size, v in zip(SIZES, right[1:], strict=True)}
    at = [0.0, *(100 * size for size in SIZES)]
    curves = {
        title: [[x, float(v.mean())] for x, v in zip(at, values, strict=True)]
        for title, values in (("right, by letters in % of the height", right), ("taken for the word", fooled))
    }
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    hits, details = {"mean": np.concatenate(right[1:])}, {"all_equal": all(each.all_equal for each in judged)}
    return Result(metrics, "mean", len(painted), embedded.skipped.total(), wanted, hits, curves, details)


def _hits(task: Task, models: Ensemble, classes: np.ndarray) -> np.ndarray:
    return judge_probabilities(class_probabilities(task, models), classes, models).hits()


def _box(draw: ImageDraw.ImageDraw, word: str, height: float) -> tuple[float, float, float, float, int]:
    edge = max(1, round(height / 12))
    font = ImageFont.load_default(height)
    return (*draw.textbbox((0, 0), word, font=font, stroke_width=edge), edge)


def _generator(key: str, purpose: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(f"typographic/{purpose}/{key}".encode()))
