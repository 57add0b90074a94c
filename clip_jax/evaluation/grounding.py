"""Referring expressions: the box that the decoder finds for each text of an example's boxes, against the box itself.

The decoder completes "ARef: {text} :" (``objectives/grounding.py``) greedily. A completion that is no box counts as the
whole image, which is the answer of a model that knows nothing.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.data import images
from clip_jax.data.sources.boxes import Sides
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.stream import read
from clip_jax.devices.sharding import process_rows, to_devices
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import Embedder, Variables
from clip_jax.objectives.grounding import prompt, read_box

WHOLE = (0.0, 0.0, 1.0, 1.0)


class Question(NamedTuple):
    """A text of an image, and the box that it refers to."""

    pixels: np.ndarray
    text: str
    sides: Sides


def boxes(embedder: Embedder, weights: Variables, source: Source) -> dict[str, float]:
    """Over all boxes of a source: ``box_error``, the mean distance of a side from its place, as a share of the image's
    side; ``iou``, the mean intersection over union; ``iou_above_half``, the share above 0.5; ``readable``, the share of
    completions that are boxes. Raises UserError for a source without boxes."""
    found, wanted, readable = [], [], 0
    batch: list[Question] = []

    def answer() -> None:
        nonlocal readable
        for question, sides in zip(batch, _answers(embedder, weights, batch), strict=True):
            readable += sides is not None
            found.append(sides or WHOLE)
            wanted.append(question.sides)
        batch.clear()

    for question in _questions(embedder, source):
        batch.append(question)
        if len(batch) == embedder.batch_size:
            answer()
    if batch:
        answer()
    if not found:
        raise UserError(f"{source.name}: none of its examples has boxes")
    overlap = iou(np.array(found), np.array(wanted))
    return {
        "box_error": float(np.mean(np.abs(np.array(found) - np.array(wanted)))),
        "iou": float(np.mean(overlap)),
        "iou_above_half": float(np.mean(overlap > 0.5)),
        "readable": readable / len(found),
        "boxes": len(found),
    }


def iou(one: Float[np.ndarray, "boxes 4"], other: Float[np.ndarray, "boxes 4"]) -> Float[np.ndarray, "boxes"]:
    """Intersection over union of pairs of boxes; 0 where both are empty."""
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=1)
    areas = sum(np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=1) for x in (one, other))
    return both / np.maximum(areas - both, 1e-9)


def _questions(embedder: Embedder, source: Source) -> Iterator[Question]:
    """All boxes of all usable examples, in the image as the model sees it."""
    size, preprocess = embedder.image_size, embedder.preprocess

    def look(index: int) -> list[Question]:
        try:
            sample: Sample = read(source, index)
            regions = sample.extras.get("boxes", ())
            if not regions:
                return []
            image = np.asarray(images.decode(sample.image, exif=preprocess.exif))
            options = dict(resize=preprocess.resize, interpolation=preprocess.interpolation)
            pixels = images.resize_and_crop(image, size, **options)
        except (BadSampleError, images.BadImageError):
            return []
        height, width = image.shape[:2] if preprocess.resize == "shortest" else (1, 1)
        return [Question(pixels, region.text, _in_center(region.sides, width, height)) for region in regions]

    with ThreadPoolExecutor(embedder.workers) as pool:
        for start in range(0, len(source), embedder.batch_size):
            for found in pool.map(look, range(start, min(start + embedder.batch_size, len(source)))):
                yield from found


def _in_center(sides: Sides, width: int, height: int) -> Sides:
    """A box of an image, in the square of its center."""
    left, top, right, bottom = sides
    short = min(width, height)
    across, down = ((width - short) / 2 / width, width / short), ((height - short) / 2 / height, height / short)
    moves = zip((left, top, right, bottom), (across, down) * 2, strict=True)
    moved = ((side - first) * scale for side, (first, scale) in moves)
    return tuple(min(max(side, 0.0), 1.0) for side in moved)


def _answers(embedder: Embedder, weights: Variables, questions: Sequence[Question]) -> list[Sides | None]:
    """The box that the decoder finds for each of at most a batch of questions."""
    rows = [row % len(questions) for row in process_rows(embedder.mesh, embedder.batch_size)]
    tokens = embedder.tokenizer([prompt(questions[row].text) for row in rows])
    # The end token of a prompt is not part of what is completed.
    count = np.argmax(tokens == embedder.tokenizer.end_id, axis=1).astype(np.int32)
    host = {"image": np.stack([questions[row].pixels for row in rows]), "given": tokens, "count": count}
    batch = to_devices(host, embedder.mesh, embedder.batch_size)
    ids = embedder.encoders.complete(weights, batch["image"], batch["given"], batch["count"])
    return [read_box(embedder.tokenizer.decode(row)) for row in np.asarray(ids)[: len(questions)]]
