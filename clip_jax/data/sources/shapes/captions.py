"""Captions of the scenes of ``shapes``: true of the scene, in varied English, from the bare objects to every detail."""

import random
from collections.abc import Sequence

from clip_jax.data.sources.shapes.rendering import Scene, SceneObject
from clip_jax.data.sources.shapes.scenes import CORNERS, POSITIONS, pick

Words = tuple[str, ...]

_FRAMES = (
    "{}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "there is {}",
    "this picture shows {}",
    "we see {}",
)
TEMPLATES: tuple[str, ...] = tuple(frame.format("a {}") for frame in _FRAMES)
"""Zero-shot prompts in the captions' own words; each takes a class name."""

_SIZE_WORDS = {"small": ("small", "tiny", "little"), "large": ("large", "big")}
_TEXTURE_WORDS = {"plain": ("plain", "solid"), "striped": ("striped",), "dotted": ("dotted", "spotted")}
_TEXTURE_CLAUSES = {"striped": "with stripes", "dotted": "with dots"}
_BESIDE = {-1: ("to the left of", "left of"), 1: ("to the right of", "right of")}
_OVER = {-1: ("above", "over"), 1: ("below", "under")}
_BESIDE_IT = {-1: ("to its left",), 1: ("to its right",)}
_OVER_IT = {-1: ("above it",), 1: ("below it",)}


def write_caption(rng: random.Random, scene: Scene, detail: float) -> str:
    """A caption that names every object of the scene, in 30 words at most.

    Each size, texture and position or relation is stated with probability ``detail``: 1 states everything, 0 the
    colors and shapes alone.
    """
    frame = pick(rng, _FRAMES) if rng.random() < 0.6 else "{}"
    with_position = rng.random() < detail
    if len(scene.objects) == 1:
        return _describe_one(rng, scene.objects[0], detail, with_position, frame)
    objects = sorted(scene.objects, key=lambda each: rng.random())
    if not with_position:
        return frame.format(_join([_noun(rng, each, detail) for each in objects]))
    if rng.random() < 0.3:  # No frame here: three positions are long enough.
        return _join([f"{_noun(rng, each, detail)} {_preposition(each.position)} {each.position}" for each in objects])
    return frame.format(_relate(rng, objects, detail))


def write_name(each: SceneObject) -> str:
    """The text of an object's box: everything but its position."""
    return f"a {each.size} {each.texture} {each.color} {each.shape}"


def _describe_one(rng: random.Random, only: SceneObject, detail: float, with_position: bool, frame: str) -> str:
    if only.texture in _TEXTURE_CLAUSES and rng.random() < 0.3 * detail:
        noun = f"{_noun(rng, only, detail, texture=False)} {_TEXTURE_CLAUSES[only.texture]}"
    else:
        noun = _noun(rng, only, detail)
    if not with_position:
        return frame.format(noun)
    position = f"{_preposition(only.position)} {only.position}"
    if only.position in CORNERS and rng.random() < 0.5:
        position = f"in the {only.position} corner"
    if frame == "{}" and rng.random() < 0.4:
        return pick(rng, (f"{position}, {noun}", f"{position} there is {noun}"))
    return f"{frame.format(noun)} {position}"


def _relate(rng: random.Random, objects: Sequence[SceneObject], detail: float) -> str:
    """Two objects by the side of one on which the other lies; three from the corner that is next to both others."""
    corner = (each for each in objects if all(0 in _offset(each, other) for other in objects))
    subject = next(corner) if len(objects) == 3 else objects[0]
    noun = _noun(rng, subject, detail)
    others = [(other, _noun(rng, other, detail)) for other in objects if other is not subject]
    if rng.random() < 0.4:
        clauses = [f"{name} {_sides(rng, _offset(other, subject), _BESIDE_IT, _OVER_IT)}" for other, name in others]
        return f"{noun} with {_join(clauses)}"
    clauses = [f"{_sides(rng, _offset(subject, other), _BESIDE, _OVER)} {name}" for other, name in others]
    return f"{noun} {_join(clauses)}"


def _offset(one: SceneObject, other: SceneObject) -> tuple[int, int]:
    """Where one object lies as seen from the other: column and row, -1 to 1."""
    (column, row), (other_column, other_row) = POSITIONS[one.position], POSITIONS[other.position]
    return (column > other_column) - (column < other_column), (row > other_row) - (row < other_row)


def _sides(rng: random.Random, offset: tuple[int, int], beside: dict[int, Words], over: dict[int, Words]) -> str:
    column, row = offset
    return _join([pick(rng, words[side]) for words, side in ((over, row), (beside, column)) if side])


def _noun(rng: random.Random, each: SceneObject, detail: float, *, texture: bool = True) -> str:
    words = ["a", each.color, each.shape]
    if texture and rng.random() < detail:
        words.insert(1, pick(rng, _TEXTURE_WORDS[each.texture]))
    if rng.random() < detail:
        words.insert(1, pick(rng, _SIZE_WORDS[each.size]))
    return " ".join(words)


def _preposition(position: str) -> str:
    return {"left": "on the", "right": "on the", "middle": "in the"}.get(position, "at the")


def _join(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
