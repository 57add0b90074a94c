"""Which objects a scene of ``shapes`` holds, and where: drawn at random, the same for the same seed everywhere."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from clip_jax.data.sources.shapes.rendering import COLORS, SHAPES, TEXTURES, Scene, SceneObject

T = TypeVar("T")
Combination = tuple[str, str]
"""A color and a shape."""

COMBINATIONS: tuple[Combination, ...] = tuple(itertools.product(COLORS, SHAPES))
# Steps 0, 1 and 3 along the diagonals: every color and every shape is held out three times, and no two colors (or
# shapes) lack the same three partners.
HELD_OUT: tuple[Combination, ...] = tuple(
    (color, tuple(SHAPES)[(row + step) % len(SHAPES)]) for row, color in enumerate(COLORS) for step in (0, 1, 3)
)
SEEN: tuple[Combination, ...] = tuple(c for c in COMBINATIONS if c not in HELD_OUT)

# Lengths in 128ths of the side: halves of a pixel at 64, so that a few stencils serve all scenes. Two large objects
# side by side do not touch; a gap separates the small from the large, so that one picture alone tells them apart.
_TEXTURES = ("plain", "plain", *TEXTURES)  # mostly plain: the model learns the shapes from these
_RADII = {"small": range(17, 21), "large": range(27, 30)}

_COLUMNS = {"left": -1, "right": 1}
_ROWS = {"top": -1, "bottom": 1}
POSITIONS: dict[str, tuple[int, int]] = {
    " ".join(filter(None, (row, column))) or "middle": (_COLUMNS.get(column, 0), _ROWS.get(row, 0))
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
}
"""The nine positions with their column and row, -1 to 1."""

CORNERS = tuple(position for position, (column, row) in POSITIONS.items() if column and row)
_LAYOUTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: tuple((position,) for position in POSITIONS),
    2: (
        *itertools.permutations(CORNERS, 2),
        *(2 * tuple(itertools.permutations(("left", "right")))),
        *(2 * tuple(itertools.permutations(("top", "bottom")))),
    ),
    3: tuple(itertools.permutations(CORNERS, 3)),
}


def generator(*seed: str | int) -> random.Random:
    """Random numbers that follow from the seed.

    Only ``random()`` and formulas of it are used: Python promises that sequence for all versions and platforms. It
    promises nothing for ``choice`` and ``shuffle``, nor does NumPy for its generators.
    """
    return random.Random("/".join(map(str, seed)))


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """One of the options, all equally likely."""
    return options[int(rng.random() * len(options))]


def draw_scene(rng: random.Random, held_out: Combination | None = None, *, alone: bool = False) -> Scene:
    """One object in half of the scenes, two or three in the others, no two of the same color and shape.

    With ``held_out`` the first object is of that combination and the others are of any; without, all are of seen ones.
    """
    count = 1 if alone else pick(rng, (1, 1, 1, 1, 1, 2, 2, 2, 3, 3))
    combinations = [held_out or pick(rng, SEEN)]
    while len(combinations) < count:
        combination = pick(rng, COMBINATIONS if held_out else SEEN)
        if combination not in combinations:
            combinations.append(combination)
    positions = pick(rng, _LAYOUTS[count])
    objects = tuple(_draw_object(rng, *c, position) for c, position in zip(combinations, positions, strict=True))
    gray = rng.uniform(226, 246)
    background = tuple(gray + rng.uniform(-7, 7) for _ in range(3))
    return Scene(objects, background, light=(rng.uniform(-6, 6), rng.uniform(-6, 6)))


def _draw_object(rng: random.Random, color: str, shape: str, position: str) -> SceneObject:
    size = pick(rng, tuple(_RADII))
    radius = pick(rng, _RADII[size]) / 128
    x, y = (_coordinate(rng, side) for side in POSITIONS[position])
    rgb = tuple(channel + rng.uniform(-8, 8) for channel in COLORS[color])
    return SceneObject(color, shape, size, pick(rng, _TEXTURES), position, x, y, radius, rgb)


def _coordinate(rng: random.Random, side: int) -> float:
    """The middle of the named third, plus or minus a pixel at 64: shapes at any offset take far longer to learn."""
    return 0.5 + 0.245 * side + rng.uniform(-0.01, 0.01)


def held_out_scenes() -> Iterator[Scene]:
    """Scenes with a held-out combination; the full caption of each is true of no other scene's picture."""
    shown: set[frozenset] = set()
    claimed: set[frozenset] = set()
    for number in itertools.count():
        scene = draw_scene(generator("heldout scene", number), HELD_OUT[number % len(HELD_OUT)])
        # What a full caption is sure to state: all looks, but the position only of an object without neighbors.
        looks = [each[:4] for each in scene.objects]
        positioned = [frozenset([each[:5]]) for each in scene.objects]
        claim = frozenset(looks) if len(looks) > 1 else positioned[0]
        true = {*positioned, *(frozenset(group) for k in (2, 3) for group in itertools.combinations(looks, k))}
        if claim not in shown and claimed.isdisjoint(true):
            shown |= true
            claimed.add(claim)
            yield scene
