"""The bundled dataset: its scenes, the truth of its captions, and that no held-out combination leaks."""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest

from clip_jax.data.sources.shapes import HELD_OUT, SEEN, TEMPLATES, open_shapes, rendering
from clip_jax.data.sources.shapes.rendering import COLORS, SHAPES, TEXTURES, Scene, SceneObject, render
from clip_jax.errors import UserError

SPLITS = ("train", "heldout", "zero_shot")
POSITIONS = ("top left", "top right", "bottom left", "bottom right", "top", "bottom", "left", "right", "middle")


# A parser of captions that shares nothing with the code that writes them. Nouns become @, and what is between them must
# be a sentence of the grammar below.

SIZE = {"small": "small", "tiny": "small", "little": "small", "large": "large", "big": "large"}
TEXTURE = {"plain": "plain", "solid": "plain", "striped": "striped", "dotted": "dotted", "spotted": "dotted"}
TEXTURE |= {"with stripes": "striped", "with dots": "dotted"}
NOUN = re.compile(
    rf"\ba (?:(?P<size>{'|'.join(SIZE)}) )?(?:(?P<texture>{'|'.join(TEXTURE)}) )?"
    rf"(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})\b(?: (?P<clause>with stripes|with dots))?"
)
FRAME = r"(?:(?:a picture of|an image of|a drawing of|there is|this picture shows|we see) )?"
POSITION = rf"(?:at|on|in) the (?P<position>{'|'.join(POSITIONS)})(?: corner)?"
SIDES = {
    "left": r"(?:to the )?left of|to its left",
    "right": r"(?:to the )?right of|to its right",
    "above": r"above(?: it)?|over",
    "below": r"below(?: it)?|under",
}
SIDE = rf"(?:{'|'.join(SIDES.values())})"
UNNAMED_POSITION = POSITION.replace("?P<position>", "?:")
SENTENCE = re.compile(
    rf"{FRAME}@(?: {UNNAMED_POSITION})?|{UNNAMED_POSITION}(?:,| there is) @"
    rf"|{FRAME}@(?:, @)* and @"
    rf"|@ {UNNAMED_POSITION}(?:, @ {UNNAMED_POSITION})* and @ {UNNAMED_POSITION}"
    rf"|{FRAME}@(?: (?:and )?{SIDE}(?: and {SIDE})? @)+"
    rf"|{FRAME}@ with @ {SIDE}(?: and {SIDE})?(?: and @ {SIDE}(?: and {SIDE})?)*"
)


class Claims(NamedTuple):
    objects: list[dict[str, str | None]]
    positions: dict[int, str]
    sides: list[tuple[int, str, int]]
    """(subject, side, object): objects by their order in the caption."""


def read(caption: str) -> Claims:
    objects = []
    for noun in NOUN.finditer(caption):
        texture = noun["texture"] or noun["clause"]
        said = {"size": SIZE.get(noun["size"]), "texture": TEXTURE.get(texture)}
        objects.append({"color": noun["color"], "shape": noun["shape"], **said})
    skeleton = NOUN.sub("@", caption)
    assert SENTENCE.fullmatch(skeleton), caption
    before, *after = skeleton.split("@")
    positions = {i: position["position"] for i, gap in enumerate(after) if (position := re.search(POSITION, gap))}
    if position := re.search(POSITION, before):
        positions[0] = position["position"]
    sides = []
    if not positions:
        of_it = after[0] == " with "
        for gap_index, gap in enumerate(after):
            for side, pattern in SIDES.items():
                if re.search(pattern, gap):
                    sides.append((gap_index, side, 0) if of_it else (0, side, gap_index + 1))
    return Claims(objects, positions, sides)


def is_true(claims: Claims, scene: Scene) -> bool:
    """Whether the scene shows all that is claimed, judged by coordinates."""
    found = []
    for claim in claims.objects:
        match = [t for t in scene.objects if all(getattr(t, name) == said for name, said in claim.items() if said)]
        if len(match) != 1:
            return False
        found += match
    for index, position in claims.positions.items():
        if position_of(found[index]) != position:
            return False
    for pair in {(subject, other) for subject, _, other in claims.sides}:
        sides = {side for subject, side, other in claims.sides if (subject, other) == pair}
        if sides != sides_of(found[pair[0]], found[pair[1]]):
            return False
    return True


def position_of(each: SceneObject) -> str:
    row, column = (
        names[0] if at < 0.4 else names[1] if at > 0.6 else ""
        for at, names in ((each.y, ("top", "bottom")), (each.x, ("left", "right")))
    )
    return f"{row} {column}".strip() or "middle"


def sides_of(each: SceneObject, other: SceneObject) -> set[str]:
    """The sides that a look at the picture would name: one that is more than twice as far as the other names alone."""
    dx, dy = each.x - other.x, each.y - other.y
    sides = set()
    if abs(dx) > abs(dy) / 2:
        sides.add("left" if dx < 0 else "right")
    if abs(dy) > abs(dx) / 2:
        sides.add("above" if dy < 0 else "below")
    return sides


def described(split: str, examples: int | None = None) -> list[tuple[Scene, tuple[str, ...]]]:
    source = open_shapes(split, examples=examples)
    return [source.describe(index) for index in range(len(source))]


@pytest.fixture(scope="module")
def train():
    return described("train", 4000)


# Splits


def test_training_never_shows_or_names_a_held_out_combination(train):
    for scene, captions in train:
        assert not {(each.color, each.shape) for each in scene.objects} & set(HELD_OUT)
        assert not any(f"{color} {shape}" in caption for caption in captions for color, shape in HELD_OUT)


def test_training_shows_every_other_combination_and_every_size_texture_and_position(train):
    objects = [each for scene, _ in train for each in scene.objects]
    assert {(each.color, each.shape) for each in objects} == set(SEEN)
    assert {each.texture for each in objects} == set(TEXTURES)
    assert {each.size for each in objects} == {"small", "large"}
    assert {each.position for each in objects} == set(POSITIONS)


def test_half_of_the_training_scenes_hold_one_object_and_none_more_than_three(train):
    counts = Counter(len(scene.objects) for scene, _ in train)
    assert set(counts) == {1, 2, 3}
    assert 0.47 < counts[1] / len(train) < 0.53


def test_every_color_and_shape_is_held_out_three_times_and_seen_five_times():
    for name, position in itertools.chain(((c, 0) for c in COLORS), ((s, 1) for s in SHAPES)):
        assert sum(combination[position] == name for combination in HELD_OUT) == 3
        assert sum(combination[position] == name for combination in SEEN) == 5
    assert not set(HELD_OUT) & set(SEEN)


def test_every_held_out_scene_holds_a_held_out_combination():
    scenes = [scene for scene, _ in described("heldout")]
    assert len(scenes) == 512
    assert all({(t.color, t.shape) for t in scene.objects} & set(HELD_OUT) for scene in scenes)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}


def test_zero_shot_shows_each_class_equally_often_alone_and_labels_it():
    source = open_shapes("zero_shot")
    labels = []
    for index in range(len(source)):
        (each,) = source.describe(index)[0].objects
        labels.append(source[index].label)
        assert source.class_names[labels[-1]] == f"{each.color} {each.shape}"
        assert (each.color, each.shape) in HELD_OUT
    assert Counter(labels) == dict.fromkeys(range(24), 20)


@pytest.mark.parametrize("split", ("train", "heldout"))
def test_other_splits_have_no_classes(split):
    source = open_shapes(split, examples=30)
    assert source.class_names == ()
    assert {source[index].label for index in range(30)} == {-1}


# Captions


@pytest.mark.parametrize("split", SPLITS)
def test_captions_name_every_object_and_say_nothing_untrue(split):
    for scene, captions in described(split, 1500):
        for caption in captions:
            claims = read(caption)
            assert len(claims.objects) == len(scene.objects), caption
            assert is_true(claims, scene), (caption, scene)


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_caption_says_size_and_texture_of_all_and_where_they_are(split):
    for scene, captions in described(split, 500):
        claims = read(captions[0])
        assert all(all(claim.values()) for claim in claims.objects)
        assert claims.positions or claims.sides
        assert len(claims.positions) in (0, len(scene.objects))


def test_training_says_a_scene_in_full_in_part_and_barely(train):
    said = np.array([sum(map(bool, read(c).objects[0].values())) - 2 for _, cs in train for c in cs])
    full, part, bare = said.reshape(-1, 3).T
    assert set(full) == {2}
    assert set(part) == {0, 1, 2}
    assert set(bare) == {0}


def test_each_held_out_caption_is_true_of_its_own_scene_alone():
    scenes, captions = zip(*described("heldout"), strict=True)
    assert len(set(captions)) == len(captions)
    for index, (caption,) in enumerate(captions):
        claims = read(caption)
        assert [i for i, scene in enumerate(scenes) if is_true(claims, scene)] == [index], caption


def test_captions_are_at_most_30_words_with_the_right_article(train):
    for _, captions in train:
        for caption in captions:
            assert len(caption.split()) <= 30
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


def test_every_template_is_a_wording_that_training_uses(train):
    said = {caption for _, captions in train for caption in captions}
    for template in TEMPLATES:
        assert any(template.format(f"{color} {shape}") in said for color, shape in SEEN), template
    assert 5 <= len(TEMPLATES) <= 8


# Pixels


def alone(
    shape: str, *, color: str = "red", texture: str = "plain", radius: float = 0.2, image_size: int = 64
) -> np.ndarray:
    each = SceneObject(color, shape, "large", texture, "middle", 0.5, 0.5, radius, COLORS[color])
    return render(Scene((each,), (240, 240, 240), (0, 0)), image_size)


def nearest_color(pixel: np.ndarray) -> str:
    return min(COLORS, key=lambda color: np.abs(np.subtract(pixel, COLORS[color], dtype=float)).sum())


@pytest.mark.parametrize("image_size", (32, 64, 101))
def test_the_center_of_a_plain_object_has_its_color(image_size):
    source = open_shapes("train", image_size=image_size)
    seen = set()
    for index in range(300):
        scene, _ = source.describe(index)
        for each in scene.objects:
            if each.texture == "plain" and each.shape != "ring":
                x, y = (min(round(at * image_size), image_size - 1) for at in (each.x, each.y))
                assert nearest_color(source[index].image[y, x]) == each.color
                seen.add(each.color)
    assert seen == set(COLORS)


def test_a_ring_shows_the_paper_through_its_hole():
    assert alone("ring")[32, 32].tolist() == [240, 240, 240]


def test_no_two_shapes_look_alike_even_when_small():
    ink = {shape: alone(shape, radius=17 / 128)[:, :, 1] < 200 for shape in SHAPES}
    for one, other in itertools.combinations(SHAPES, 2):
        assert (ink[one] & ink[other]).sum() / (ink[one] | ink[other]).sum() < 0.88, (one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_textures_whiten_less_than_half_of_a_shape_and_none_of_its_outline(shape):
    plain, *textured = (alone(shape, texture=texture, image_size=192).astype(int) for texture in TEXTURES)
    fill = (plain == COLORS["red"]).all(axis=2)
    outline = (plain == plain.min(axis=(0, 1))).all(axis=2)
    assert outline.sum() > 200
    for image in textured:
        whitened = (image - plain)[fill, 1].mean() / (255 - COLORS["red"][1])
        assert 0.15 < whitened < 0.5
        np.testing.assert_allclose(image[outline], plain[outline], atol=1)


@pytest.mark.parametrize("split", SPLITS)
def test_objects_lie_inside_the_picture_and_apart_from_each_other(split):
    for scene, _ in described(split, 1000):
        for each in scene.objects:
            assert each.radius < min(each.x, each.y, 1 - each.x, 1 - each.y)
        for one, other in itertools.combinations(scene.objects, 2):
            assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


@pytest.mark.parametrize("company", (False, True), ids=("alone", "in company"))
def test_a_large_object_is_at_least_a_quarter_wider_than_a_small_one(train, company):
    objects = [each for scene, _ in train for each in scene.objects if (len(scene.objects) > 1) == company]
    large, small = ([each.radius for each in objects if each.size == size] for size in ("large", "small"))
    assert min(large) > 5 / 4 * max(small)


@pytest.mark.parametrize("image_size", (32, 57, 64, 224))
def test_pictures_are_bytes_of_the_size_asked_for(image_size):
    source = open_shapes("heldout", image_size=image_size, examples=20)
    for index in range(20):
        image = source[index].image
        assert image.dtype == np.uint8
        assert image.shape == (image_size, image_size, 3)


# The source


@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_follows_from_its_split_and_index_alone(split):
    forwards, backwards = open_shapes(split, examples=40), open_shapes(split, examples=60)
    for index in reversed(range(40)):
        one, other = forwards[index], backwards[index]
        assert one._replace(image=None) == other._replace(image=None)
        np.testing.assert_array_equal(one.image, other.image)


def test_samples_are_the_same_in_another_process():
    program = "from clip_jax.data.sources.shapes import open_shapes; print(open_shapes('heldout').fingerprint)"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == open_shapes("heldout").fingerprint


def test_threads_read_the_samples_that_one_thread_reads():
    rendering._stencil.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(open_shapes("train").__getitem__, range(100)))
    for index, sample in enumerate(together):
        np.testing.assert_array_equal(sample.image, open_shapes("train")[index].image)


def test_the_fingerprint_follows_split_size_length_and_pixels(monkeypatch):
    opened = [
        open_shapes("train"),
        open_shapes("heldout"),
        open_shapes("train", image_size=32),
        open_shapes("train", examples=30_000),
    ]
    fingerprints = [source.fingerprint for source in opened]
    assert len(set(fingerprints)) == 4
    assert open_shapes("train").fingerprint == fingerprints[0]
    monkeypatch.setitem(COLORS, "red", (230, 40, 40))
    assert open_shapes("train").fingerprint not in fingerprints


def test_names_and_keys_say_where_a_sample_is_from():
    source = open_shapes("train")
    assert source.name == "shapes:train"
    assert source[123].key == "shapes:train/123"
    assert len(open_shapes("train", examples=123_456)) == 123_456
    assert open_shapes("train", examples=123_456)[123_455].key == "shapes:train/123455"


@pytest.mark.parametrize("index", (-1, 24, 10**9))
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError, match=rf"shapes:zero_shot has 24 examples; there is no number {index}"):
        open_shapes("zero_shot", examples=24)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "held_out"}, r"shapes:held_out: no such split \(nearest: heldout\); there are train, "),
        ({"split": "train", "image_size": 8}, "shapes:train: image_size 8 is too small"),
        ({"split": "train", "examples": 0}, "shapes:train: examples is 0; take 1 or more"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_way_out(arguments, message):
    with pytest.raises(UserError, match=message):
        open_shapes(**arguments)
