"""Boxes with texts: read from the data, and carried through the crop and the flip that the image of an example had.

A box is ``[x0, y0, x1, y1]``: left, top, right and bottom as fractions of the width and height of the image, before
the crop in a source's examples and after it in batches. A crop cuts boxes off at its edges; one of which less than half
remains is dropped, for its text would no longer describe what can be seen.
"""

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from clip_jax.data.images import Crop
from clip_jax.data.sources.sample import BadSampleError, Source
from clip_jax.data.valid_text import valid

Sides = tuple[float, float, float, float]

FIELD = "boxes"
"""Their name in the extras of an example, and in what ``clip-jax pack`` writes."""
LEAST_VISIBLE = 0.5
"""The share of a box's area that must remain in the crop."""
TOLERANCE = 1e-3
"""How far a side may lie outside of 0..1: annotations are rounded."""


class Box(NamedTuple):
    """A region of an image, and what is there."""

    sides: Sides
    text: str


def parse(value: Any, key: str) -> tuple[Box, ...]:
    """The boxes in a JSON field or a column: ``[{"box": [x0, y0, x1, y1], "text": "a red kite"}, ...]``, or that as
    JSON text; none for a field that is missing or empty.

    A box without area is left out. Raises BadSampleError for everything else, such as sides in pixels.
    """
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise BadSampleError("boxes are not JSON", key) from error
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadSampleError("boxes are not a list", key)
    found = (_box(entry, key) for entry in value)
    return tuple(box for box in found if _area(box.sides) > 0)


def are_in(source: Source) -> bool:
    """Whether its examples have boxes, or a place for them."""
    return bool(getattr(source, "boxes", ""))


def written(boxes: Iterable[Box]) -> str:
    """The boxes as JSON, of which ``parse`` makes equal ones."""
    return json.dumps([{"box": list(sides), "text": text} for sides, text in boxes], ensure_ascii=False)


def carry(boxes: Iterable[Box], crop: Crop) -> tuple[Box, ...]:
    """The boxes as they lie in a crop: cut off at its edges, without those of which less than half is left."""
    left, top, right, bottom = crop.box
    width, height = right - left, bottom - top
    carried = []
    for sides, text in boxes:
        x0, x1 = ((x - left) / width for x in sides[::2])
        y0, y1 = ((y - top) / height for y in sides[1::2])
        if crop.flipped:
            x0, x1 = 1 - x1, 1 - x0
        seen = (max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0))
        if seen[0] < seen[2] and seen[1] < seen[3] and _area(seen) >= LEAST_VISIBLE * _area((x0, y0, x1, y1)):
            carried.append(Box(seen, text))
    return tuple(carried)


def _box(entry: Any, key: str) -> Box:
    sides, text = (entry.get("box"), entry.get("text")) if isinstance(entry, dict) else (None, None)
    if not isinstance(text, str) or not (text := valid(text).strip()):
        raise BadSampleError("a box without a text", key)
    if not isinstance(sides, list | tuple) or len(sides) != 4 or not all(_is_number(side) for side in sides):
        raise BadSampleError("a box is not [x0, y0, x1, y1]", key)
    x0, y0, x1, y1 = (min(max(float(side), 0.0), 1.0) for side in sides)
    if not all(-TOLERANCE <= side <= 1 + TOLERANCE for side in sides) or x0 > x1 or y0 > y1:
        raise BadSampleError("a box is not [x0, y0, x1, y1] in 0..1", key)
    return Box((x0, y0, x1, y1), text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _area(sides: Sides) -> float:
    return (sides[2] - sides[0]) * (sides[3] - sides[1])
