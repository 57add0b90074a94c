"""The bundled dataset: rendered scenes with captions, from which a laptop pretrains a small CLIP in minutes.

    open_shapes("train")[6].captions[0]  ->  "a drawing of a little spotted red heart right of a big dotted green heart"

One to three objects, each of a colour, a shape, a size, a texture and a place, told in varied English. Of the
64 combinations of colour and shape, 24 never appear in training, not even as a bystander, while each of their colours
and shapes appears with five others: accuracy on them measures composition, not memory.

Nothing is downloaded or stored. A scene follows from its split and index alone; ``shapes_render.py`` draws it.
"""

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from clip_jax.data.shapes_render import COLOURS, SHAPES, TEXTURES, Scene, Thing, render
from clip_jax.data.sources import Sample
from clip_jax.errors import UserError, nearest

T = TypeVar("T")
Words = tuple[str, ...]
Combination = tuple[str, str]
"""A colour and a shape."""

SPLITS = {"train": 200_000, "heldout": 512, "zero_shot": 480}
"""Each split with its usual number of examples."""

COMBINATIONS: tuple[Combination, ...] = tuple(itertools.product(COLOURS, SHAPES))
# Steps 0, 1 and 3 along the diagonals: every colour and every shape is held out three times, and no two colours (or
# shapes) lack the same three partners.
HELD_OUT: tuple[Combination, ...] = tuple(
    (colour, tuple(SHAPES)[(row + step) % len(SHAPES)]) for row, colour in enumerate(COLOURS) for step in (0, 1, 3)
)
SEEN: tuple[Combination, ...] = tuple(c for c in COMBINATIONS if c not in HELD_OUT)
CLASS_NAMES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour, shape in HELD_OUT)


def open_shapes(split: str, *, image_size: int = 64, examples: int | None = None) -> "Shapes":
    """The split as a source; ``examples`` lengthens or shortens it without changing the scenes it shares.

    - ``train``: seen combinations only, three captions a scene: all there is to say, some of it, the bare objects.
    - ``heldout``: a held-out combination in each scene and one full caption, true of no other scene of the split.
    - ``zero_shot``: a single object of a held-out combination; ``label`` indexes ``class_names``; balanced.
    """
    if split not in SPLITS:
        raise UserError(f"shapes:{split}: no such split{nearest(split, SPLITS)}; there are {', '.join(SPLITS)}")
    if image_size < 32:
        raise UserError(f"shapes:{split}: image_size {image_size} is too small to tell shapes apart; take 32 or more")
    if examples is None:
        examples = SPLITS[split]
    if examples < 1:
        raise UserError(f"shapes:{split}: examples is {examples}; take 1 or more")
    scenes = tuple(itertools.islice(_heldout_scenes(), examples)) if split == "heldout" else ()
    return Shapes(split, image_size, examples, scenes)


@dataclass(frozen=True, repr=False)
class Shapes:
    """A ``Source`` of rendered scenes; made by ``open_shapes``."""

    split: str
    image_size: int
    examples: int
    heldout: tuple[Scene, ...]
    """The scenes of the held-out split, which are chosen to differ from each other; empty for other splits."""

    @property
    def name(self) -> str:
        return f"shapes:{self.split}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES if self.split == "zero_shot" else ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Covers the first samples, pixels and words, so that an edit of this dataset cannot pass as the old one."""
        digest = hashlib.sha256(f"{self.name} {self.image_size} {len(self)}".encode())
        for index in range(min(len(self), 64)):
            sample = self[index]
            digest.update(sample.image.tobytes())
            digest.update("\n".join(sample.captions).encode())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> Sample:
        scene, captions = self.describe(index)
        label = index % len(CLASS_NAMES) if self.split == "zero_shot" else -1
        return Sample(render(scene, self.image_size), captions, f"{self.name}/{index}", label)

    def describe(self, index: int) -> tuple[Scene, tuple[str, ...]]:
        """What sample ``index`` shows and what is said of it, without drawing it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples; there is no number {index}")
        rng = _rng(self.split, index)
        if self.split == "train":
            scene = _draw_scene(rng)
            return scene, tuple(tell(rng, scene, detail) for detail in (1.0, 0.5, 0.0))
        if self.split == "heldout":
            scene = self.heldout[index]
        else:
            scene = _draw_scene(rng, HELD_OUT[index % len(HELD_OUT)], alone=True)
        return scene, (tell(rng, scene, 1.0),)


# Scenes


def _rng(*name: str | int) -> random.Random:
    """Random numbers that belong to this name.

    Only ``random()`` and what is a formula of it are used: Python promises that sequence for all versions and
    platforms, as it does not for ``choice`` and ``shuffle``, nor NumPy for its generators.
    """
    return random.Random("/".join(map(str, name)))


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


# Lengths in 128ths of the side: halves of a pixel at 64, so that few stencils serve all scenes. Two large objects side
# by side do not touch; small and large stay a gap apart, so that they can be told from one picture alone.
_TEXTURES = ("plain", "plain", *TEXTURES)  # plain for most: it is from these that shape is learned
_RADII = {"small": range(17, 21), "large": range(27, 30)}

_COLUMNS = {"left": -1, "right": 1}
_ROWS = {"top": -1, "bottom": 1}
PLACES: dict[str, tuple[int, int]] = {
    " ".join(filter(None, (row, column))) or "middle": (_COLUMNS.get(column, 0), _ROWS.get(row, 0))
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
}
"""The nine places with their column and row, -1 to 1."""

_CORNERS = tuple(place for place, (column, row) in PLACES.items() if column and row)
_LAYOUTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: tuple((place,) for place in PLACES),
    2: (
        *itertools.permutations(_CORNERS, 2),
        *(2 * tuple(itertools.permutations(("left", "right")))),
        *(2 * tuple(itertools.permutations(("top", "bottom")))),
    ),
    3: tuple(itertools.permutations(_CORNERS, 3)),
}


def _draw_scene(rng: random.Random, held_out: Combination | None = None, *, alone: bool = False) -> Scene:
    """One object in half of the scenes, two or three in the others, no two of one colour and shape.

    The first is of the held-out combination if one is given, with any others beside it; else all are seen ones.
    """
    count = 1 if alone else _pick(rng, (1, 1, 1, 1, 1, 2, 2, 2, 3, 3))
    combinations = [held_out or _pick(rng, SEEN)]
    while len(combinations) < count:
        combination = _pick(rng, COMBINATIONS if held_out else SEEN)
        if combination not in combinations:
            combinations.append(combination)
    places = _pick(rng, _LAYOUTS[count])
    things = tuple(_draw_thing(rng, *c, place, count) for c, place in zip(combinations, places, strict=True))
    grey = rng.uniform(226, 246)
    paper = tuple(grey + rng.uniform(-7, 7) for _ in range(3))
    return Scene(things, paper, light=(rng.uniform(-6, 6), rng.uniform(-6, 6)))


def _draw_thing(rng: random.Random, colour: str, shape: str, place: str, count: int) -> Thing:
    size = _pick(rng, tuple(_RADII))
    radius = _pick(rng, _RADII[size]) / 128
    x, y = (_coordinate(rng, side) for side in PLACES[place])
    rgb = tuple(channel + rng.uniform(-8, 8) for channel in COLOURS[colour])
    return Thing(colour, shape, size, _pick(rng, _TEXTURES), place, x, y, radius, rgb)


def _coordinate(rng: random.Random, side: int) -> float:
    """The middle of the named third, give or take a pixel at 64: shapes at any offset take far longer to learn."""
    return 0.5 + 0.245 * side + rng.uniform(-0.01, 0.01)


def _heldout_scenes() -> Iterator[Scene]:
    """Scenes with a held-out combination, of which no full caption is true of another one's picture."""
    shown: set[frozenset] = set()
    told: set[frozenset] = set()
    for number in itertools.count():
        scene = _draw_scene(_rng("heldout scene", number), HELD_OUT[number % len(HELD_OUT)])
        # What a full caption says for certain: looks, and the place only where there is no relation to tell instead.
        looks = [thing[:4] for thing in scene.things]
        placed = [frozenset([thing[:5]]) for thing in scene.things]
        said = frozenset(looks) if len(looks) > 1 else placed[0]
        true = {*placed, *(frozenset(group) for k in (2, 3) for group in itertools.combinations(looks, k))}
        if said not in shown and told.isdisjoint(true):
            shown |= true
            told.add(said)
            yield scene


# Captions

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


def tell(rng: random.Random, scene: Scene, detail: float) -> str:
    """A caption that is true of the scene and names all its objects, in 30 words at most.

    Each size, texture and place or relation is said with probability ``detail``: 1 says all, 0 says colour and shape.
    """
    frame = _pick(rng, _FRAMES) if rng.random() < 0.6 else "{}"
    where = rng.random() < detail
    if len(scene.things) == 1:
        return _tell_one(rng, scene.things[0], detail, where, frame)
    things = sorted(scene.things, key=lambda thing: rng.random())
    if not where:
        return frame.format(_join([_noun(rng, thing, detail) for thing in things]))
    if rng.random() < 0.3:  # No frame here: three places are long enough.
        return _join([f"{_noun(rng, thing, detail)} {_preposition(thing.place)} {thing.place}" for thing in things])
    return frame.format(_relate(rng, things, detail))


def _tell_one(rng: random.Random, thing: Thing, detail: float, where: bool, frame: str) -> str:
    if thing.texture in _TEXTURE_CLAUSES and rng.random() < 0.3 * detail:
        noun = f"{_noun(rng, thing, detail, texture=False)} {_TEXTURE_CLAUSES[thing.texture]}"
    else:
        noun = _noun(rng, thing, detail)
    if not where:
        return frame.format(noun)
    place = f"{_preposition(thing.place)} {thing.place}"
    if thing.place in _CORNERS and rng.random() < 0.5:
        place = f"in the {thing.place} corner"
    if frame == "{}" and rng.random() < 0.4:
        return _pick(rng, (f"{place}, {noun}", f"{place} there is {noun}"))
    return f"{frame.format(noun)} {place}"


def _relate(rng: random.Random, things: Sequence[Thing], detail: float) -> str:
    """Two things by where one is from the other; three by the corner that shares a side with both others."""
    corner = (thing for thing in things if all(0 in _offset(thing, other) for other in things))
    subject = next(corner) if len(things) == 3 else things[0]
    noun = _noun(rng, subject, detail)
    others = [(other, _noun(rng, other, detail)) for other in things if other is not subject]
    if rng.random() < 0.4:
        clauses = [f"{name} {_sides(rng, _offset(other, subject), _BESIDE_IT, _OVER_IT)}" for other, name in others]
        return f"{noun} with {_join(clauses)}"
    clauses = [f"{_sides(rng, _offset(subject, other), _BESIDE, _OVER)} {name}" for other, name in others]
    return f"{noun} {_join(clauses)}"


def _offset(thing: Thing, other: Thing) -> tuple[int, int]:
    """Where a thing is, seen from another one: column and row, -1 to 1."""
    (column, row), (other_column, other_row) = PLACES[thing.place], PLACES[other.place]
    return (column > other_column) - (column < other_column), (row > other_row) - (row < other_row)


def _sides(rng: random.Random, offset: tuple[int, int], beside: dict[int, Words], over: dict[int, Words]) -> str:
    column, row = offset
    return _join([_pick(rng, words[side]) for words, side in ((over, row), (beside, column)) if side])


def _noun(rng: random.Random, thing: Thing, detail: float, *, texture: bool = True) -> str:
    words = ["a", thing.colour, thing.shape]
    if texture and rng.random() < detail:
        words.insert(1, _pick(rng, _TEXTURE_WORDS[thing.texture]))
    if rng.random() < detail:
        words.insert(1, _pick(rng, _SIZE_WORDS[thing.size]))
    return " ".join(words)


def _preposition(place: str) -> str:
    return {"left": "on the", "right": "on the", "middle": "in the"}.get(place, "at the")


def _join(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
