"""Composition: does a model distinguish a caption from a false one in similar words? Strict inequality throughout.

- Winoground (Thrush et al. 2022): two images, two captions of the same words. Text score: each image is more similar
  to its own caption; image score: each caption to its own image; group score: both.
- SugarCrepe (Hsieh et al. 2023) and swaps: the true caption is more similar to the image than the false one.

Trap: CLIP_benchmark takes the argmax with the true caption first, so that a model whose similarities are all equal has
100 %. Here equal is wrong (within ``ranking.TIE``): a constant model scores 0, below the chance of 1/2 (1/4 and 1/6 for
Winoground's scores), and ``all_equal`` says that it is one.

``swaps`` makes such pairs from the bundled scenes, so that a user sees at once if a model ignores word order. Its
captions are in one plain grammar, and every false one is false of the picture.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.data.sources.shapes.rendering import COLORS, SHAPES, Scene
from clip_jax.data.sources.shapes.scenes import POSITIONS, generator
from clip_jax.errors import UserError
from clip_jax.evaluation.ranking import TIE
from clip_jax.evaluation.subject import Ensemble, Result, Task, mean_cosines

NUMBERS = ("one", "two", "three", "four")


class Swap(NamedTuple):
    """A caption of a scene and a false one of the same length."""

    kind: str
    true: str
    false: str


def winoground(similarity: Float[np.ndarray, "n captions=2 images=2"]) -> dict[str, float]:
    """``{"text": ..., "image": ..., "group": ...}``; caption i belongs to image i. Raises ValueError for NaN."""
    s = _finite(similarity)
    text = (s[:, 0, 0] > s[:, 1, 0] + TIE) & (s[:, 1, 1] > s[:, 0, 1] + TIE)
    image = (s[:, 0, 0] > s[:, 0, 1] + TIE) & (s[:, 1, 1] > s[:, 1, 0] + TIE)
    return {"text": float(text.mean()), "image": float(image.mean()), "group": float((text & image).mean())}


def true_caption_wins(true: Float[np.ndarray, " n"], false: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """1 if the true caption is strictly more similar, else 0."""
    return (_finite(true) > _finite(false) + TIE).astype(np.float64)


def all_equal(true: Float[np.ndarray, " n"], false: Float[np.ndarray, " n"]) -> bool:
    """Whether all captions are equally near: the model is constant, which explains its score of 0."""
    return bool(np.all(np.abs(true - false) <= TIE))


def swaps(scene: Scene, seed: int) -> Iterator[Swap]:
    """The swaps that a scene allows, the same for the same seed.

    ``color``, ``shape`` replace one by another that is not in the picture, ``size`` the size; ``binding`` exchanges the
    colors of two objects, ``relation`` the two objects around "left of" or "above"; ``count`` names another number;
    ``negation`` denies a true part; ``order`` shuffles the words.
    """
    rng = generator("swap", seed)
    objects = scene.objects
    nouns = [f"{each.color} {each.shape}" for each in objects]
    color = _other(rng, tuple(COLORS), {each.color for each in objects})
    shape = _other(rng, tuple(SHAPES), {each.shape for each in objects})
    first = objects[0]
    yield Swap("color", f"a {nouns[0]}", f"a {color} {first.shape}")
    yield Swap("shape", f"a {nouns[0]}", f"a {first.color} {shape}")
    yield Swap("negation", f"a {nouns[0]} and no {color} {shape}", f"a {color} {shape} and no {nouns[0]}")
    number, wrong = NUMBERS[len(objects) - 1], _other(rng, NUMBERS, {NUMBERS[len(objects) - 1]})
    yield Swap("count", *(f"a picture of {n} {'shape' if n == 'one' else 'shapes'}" for n in (number, wrong)))
    if len(objects) == 1:
        other = {"small": "large", "large": "small"}[first.size]
        yield Swap("size", f"a {first.size} {nouns[0]}", f"a {other} {nouns[0]}")
        return
    second = objects[1]
    if first.color != second.color and first.shape != second.shape:
        false = f"a {second.color} {first.shape} and a {first.color} {second.shape}"
        if {f"{second.color} {first.shape}", f"{first.color} {second.shape}"} - set(nouns):
            yield Swap("binding", f"a {nouns[0]} and a {nouns[1]}", false)
    (column, row), (other_column, other_row) = POSITIONS[first.position], POSITIONS[second.position]
    words = None
    if column != other_column:
        words = "left of" if column < other_column else "right of"
    elif row != other_row:
        words = "above" if row < other_row else "below"
    if words is not None:
        yield Swap("relation", f"a {nouns[0]} {words} a {nouns[1]}", f"a {nouns[1]} {words} a {nouns[0]}")
        sentence = f"a {nouns[0]} {words} a {nouns[1]}".split()
        shuffled = sorted(sentence, key=lambda _: rng.random())
        if shuffled != sentence:
            yield Swap("order", " ".join(sentence), " ".join(shuffled))


def mentions(scene: Scene, seed: int) -> Iterator[Swap]:
    """A caption of several objects, one of which has a false color: ``mention 1`` the first that is named."""
    if len(scene.objects) < 2:
        return
    rng = generator("mention", seed)
    nouns = [f"a {each.color} {each.shape}" for each in scene.objects]
    for number, each in enumerate(scene.objects):
        color = _other(rng, tuple(COLORS), {other.color for other in scene.objects})
        false = [*nouns[:number], f"a {color} {each.shape}", *nouns[number + 1 :]]
        yield Swap(f"mention {number + 1}", " and ".join(nouns), " and ".join(false))


def curves(
    scenes: Sequence[Scene], kinds: Sequence[str], wins: Float[np.ndarray, " n"]
) -> dict[str, list[list[float]]]:
    """The share of right answers against properties of the scene of each swap; single objects have no distance."""
    kinds, first = np.array(kinds), [scene.objects[0] for scene in scenes]
    parts = np.isin(kinds, ("color", "shape"))
    pairs = np.isin(kinds, ("binding", "relation"))
    distance = np.array([_distance(scene) for scene in scenes])
    order = np.array([int(kind.rpartition(" ")[2]) if kind.startswith("mention") else 0 for kind in kinds])
    of = {
        "color and shape, by the object's size / side": (parts, np.array([2 * each.radius for each in first])),
        "color and shape, by the number of objects": (parts, np.array([len(scene.objects) for scene in scenes])),
        "binding and relation, by distance / side": (pairs, distance),
        "color, by order of mention": (order > 0, order),
    }
    return {title: _means(np.round(x[rows], 1), wins[rows]) for title, (rows, x) in of.items() if rows.any()}


def _distance(scene: Scene) -> float:
    if len(scene.objects) < 2:
        return 0.0
    one, other = scene.objects[:2]
    return float(np.hypot(one.x - other.x, one.y - other.y))


def _means(x: np.ndarray, wins: np.ndarray) -> list[list[float]]:
    return [[float(value), float(wins[x == value].mean())] for value in np.unique(x)]


def protocol(task: Task, models: Ensemble) -> Result:
    """Swaps of the bundled scenes of a ``shapes`` source; the curves have swaps by order of mention besides."""
    embedded = models[0][0].embed(task.source, texts=True)
    rows, made = [], []
    for row, index in enumerate(embedded.indices.tolist()):
        scene = task.source.describe(index)[0]
        for swap in (*swaps(scene, index), *mentions(scene, index)):
            rows.append(row)
            made.append(swap)
    captions = sorted({caption for swap in made for caption in (swap.true, swap.false)})
    number = {caption: i for i, caption in enumerate(captions)}
    true, false = np.zeros(len(made)), np.zeros(len(made))
    for model, share in models:
        images, texts = model.embed(task.source, texts=True).images[rows].astype(np.float64), model.texts(captions)
        true += share * np.sum(images * texts[[number[swap.true] for swap in made]], axis=1)
        false += share * np.sum(images * texts[[number[swap.false] for swap in made]], axis=1)
    wins, kinds = true_caption_wins(true, false), np.array([swap.kind for swap in made])
    scenes = [task.source.describe(index)[0] for index in embedded.indices[rows].tolist()]
    drawn = curves(scenes, kinds, wins)
    counted = np.array([not kind.startswith("mention") for kind in kinds])
    metrics = {kind: float(wins[kinds == kind].mean()) for kind in sorted(set(kinds[counted]))}
    metrics["mean"] = float(np.mean(list(metrics.values())))
    details = {"all_equal": all_equal(true, false), "pairs": int(counted.sum())}
    hits, skipped = {"pairs": wins[counted]}, embedded.skipped.total()
    return Result(metrics, "mean", len(embedded.images), skipped, None, hits, drawn, details)


def winoground_protocol(task: Task, models: Ensemble) -> Result:
    """Winoground's scores over the examples of which both images can be used (``layouts.open_winoground``)."""
    embedded = models[0][0].embed(task.source, texts=True)
    row = {index: i for i, index in enumerate(embedded.indices.tolist())}
    examples = [e for e in range(len(task.source) // 2) if 2 * e in row and 2 * e + 1 in row]
    if not examples:
        raise UserError(f"{task.name}: no example of which both images can be used")
    pairs = [(row[2 * e + image], row[2 * e + text]) for e in examples for text in (0, 1) for image in (0, 1)]
    images, texts = np.array(pairs).T  # every image has one caption: rows of images are rows of texts
    similarity = mean_cosines(task, models, images, texts).reshape(-1, 2, 2)
    metrics, hits = winoground(similarity), {}
    for name in metrics:
        hits[name] = np.array([winoground(each[None])[name] for each in similarity])
    parts = np.array([task.source.groups[2 * e] for e in examples])
    for part in sorted(set(parts.tolist()) - {""}):
        metrics[f"group {part}"] = float(hits["group"][parts == part].mean())
    details = {"all_equal": all_equal(similarity.ravel(), np.full(similarity.size, similarity.flat[0]))}
    skipped = embedded.skipped.total()
    return Result(metrics, "group", len(examples), skipped, None, {"group": hits["group"]}, {}, details)


def sugar_crepe_protocol(task: Task, models: Ensemble) -> Result:
    """The share of images nearer to the true caption than to the false one, by task, and the mean over the tasks."""
    embedded = models[0][0].embed(task.source, texts=True)
    rows = np.arange(len(embedded.images))  # every image has two captions
    true, false = (mean_cosines(task, models, rows, 2 * rows + k) for k in (0, 1))
    wins, parts = true_caption_wins(true, false), np.array([task.source.groups[i] for i in embedded.indices.tolist()])
    metrics = {part: float(wins[parts == part].mean()) for part in sorted(set(parts.tolist()))}
    metrics["mean"] = float(np.mean(list(metrics.values())))
    details = {"all_equal": all_equal(true, false), "pairs": len(wins)}
    return Result(metrics, "mean", len(rows), embedded.skipped.total(), None, {"pairs": wins}, {}, details)


def _other(rng, options: Sequence[str], taken: set[str]) -> str:
    left = [option for option in options if option not in taken]
    return left[int(rng.random() * len(left))]


def _finite(x: np.ndarray) -> np.ndarray:
    if not np.isfinite(x).all():
        raise ValueError("similarities are not finite")
    return x
