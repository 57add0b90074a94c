"""Zero-shot classification with prompt templates, from embeddings (Radford et al. 2021, section 3.1.4).

Per class: fill the templates, encode, normalize each, average, normalize again. An image belongs to the class whose
vector is nearest.

- ``top1``, ``top5``: the share of images whose class is among the nearest one or five. Top-5 is None below five
  classes; with exactly five it is 1 for any model, and an average should leave it out.
- ``mean_per_class``: the mean of top-1 over the classes that occur, whatever their sizes (scikit-learn's
  ``balanced_accuracy_score``). The papers report it for Caltech-101, Aircraft, Pets and Flowers.

A tie counts as the probability of a right guess: an image that is equally near to ten classes is a tenth right. A
constant model therefore scores exactly chance, however its classes are distributed and ordered; argmax would give it
all images of the first class.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clip_jax.data.templates import check
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.ranking import TIE, check_finite, hit_of

PROMPT_BLOCK = 8192
"""Prompts whose embeddings exist at one time: 32 MB at 1,024 features."""
IMAGE_BLOCK = 2048


def classifier(
    class_names: Sequence[str],
    templates: Sequence[str],
    encode: Callable[[Sequence[str]], Float[np.ndarray, "prompts dim"]],
) -> Float[np.ndarray, "classes dim"]:
    """One unit vector per class; ``encode`` gives unit embeddings of texts. Raises UserError for a template."""
    check("templates", templates)
    prompts, vectors = Prompts(tuple(class_names), tuple(templates)), []
    block = max(1, PROMPT_BLOCK // len(templates))
    for start in range(0, len(class_names), block):
        names = class_names[start : start + block]
        texts = [text for name in names for text in prompts.of_class(name)]
        mean = np.asarray(encode(texts)).reshape(len(names), len(templates), -1).mean(axis=1)
        vectors.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(vectors)


class Judged(NamedTuple):
    """How each image ranks the classes."""

    predicted: Int[np.ndarray, " images"]
    """The nearest class; of equally near ones, the first."""
    above: Int[np.ndarray, " images"]
    """The number of wrong classes that are nearer than the (best) right one."""
    tied: Int[np.ndarray, " images"]
    """The number of wrong classes that are equally near."""
    tied_right: Int[np.ndarray, " images"]
    """The number of right classes that are equally near: 1, or more where an image has several."""
    classes: int
    """The number of classes among which the nearest is chosen."""

    @property
    def all_equal(self) -> bool:
        """Whether all classes are equally near to every image: the model is constant, and its score is chance."""
        return bool((self.tied + self.tied_right == self.classes).all())

    def hits(self, k: int = 1) -> Float[np.ndarray, " images"]:
        """Whether a right class is among the k nearest; under ties, the probability of it."""
        return hit_of(self.above, self.tied, self.tied_right, k, "expected")


def judge(
    images: Float[np.ndarray, "images dim"],
    right: Int[np.ndarray, " images"] | Int[np.ndarray, "images labels"],
    classes: Float[np.ndarray, "classes dim"],
    *,
    only: Sequence[int] | None = None,
    parents: Int[np.ndarray, " classes"] | None = None,
) -> Judged:
    """Compares unit embeddings of images with those of classes, in blocks.

    ``right`` is each image's class, or several of them padded with -1: an image is right with any, as under ImageNet's
    ReaL labels (Beyer et al. 2020; leave images without a label out before). ``only`` restricts the classes before the
    nearest is chosen, as ImageNet-A, -R and ObjectNet define it; labels remain indices of all classes. ``parents``
    gives the super-class of each class: an image is as near to a super-class as to its nearest child, and ``right``
    then names super-classes. Raises ValueError for embeddings that are not finite and labels that are no class.
    """
    check_finite(images=images, classes=classes)
    right = right[:, None] if right.ndim == 1 else right
    count = len(classes) if parents is None else int(parents.max()) + 1
    allowed = np.arange(count) if only is None else np.asarray(only)
    column = np.full(count, -1)  # label -> its index among the allowed classes
    column[allowed] = np.arange(len(allowed))
    if len(right) and not (right.min() >= -1 and right.max() < count):
        raise ValueError(f"labels are between {right.min()} and {right.max()}, the classes are {count}")
    columns = np.where(right >= 0, column[right], -1)
    if not (columns >= 0).any(axis=1).all():
        raise ValueError(f"{int((columns < 0).all(axis=1).sum())} images have no label among the classes")
    found = []
    for rows, nearness in _blocks(images, classes, parents):
        nearness, right_columns = nearness if only is None else nearness[:, allowed], columns[rows]
        predicted = allowed[nearness.argmax(axis=1)]
        best = np.where(right_columns >= 0, np.take_along_axis(nearness, right_columns, 1), -np.inf).max(
            axis=1, keepdims=True
        )
        above = np.count_nonzero(nearness > best + TIE, axis=1)
        reached = np.count_nonzero(nearness >= best - TIE, axis=1)
        tied_right = _count_right(nearness, right_columns, best)
        found.append((predicted, above, reached - above - tied_right, tied_right))
    return Judged(*map(np.concatenate, zip(*found, strict=True)), len(allowed))


def scores(
    judged: Judged, labels: Int[np.ndarray, " images"] | None, classes: int, at: Sequence[int] = (1, 5)
) -> dict[str, float | None]:
    """``{"top1": ..., "top5": ..., "mean_per_class": ...}`` among the given number of classes.

    A top-k is None below k classes, and ``mean_per_class`` where images have no single label.
    """
    result: dict[str, float | None] = {f"top{k}": float(judged.hits(k).mean()) if k <= classes else None for k in at}
    result["mean_per_class"] = None if labels is None else float(np.mean(list(by_class(judged, labels).values())))
    return result


def by_class(judged: Judged, labels: Int[np.ndarray, " images"]) -> dict[int, float]:
    """The top-1 of each class that occurs."""
    hits, present = judged.hits(), np.unique(labels)
    return {int(label): float(hits[labels == label].mean()) for label in present}


def f1_macro(judged: Judged, labels: Int[np.ndarray, " images"]) -> float:
    """The mean over classes of the harmonic mean of precision and recall, as iWildCam is scored (Koh et al. 2021).

    Classes that are neither a label nor predicted are left out, as in scikit-learn. Of equally near classes the first
    is predicted.
    """
    classes = np.union1d(labels, judged.predicted)
    both = np.array([np.sum((labels == c) & (judged.predicted == c)) for c in classes])
    either = np.array([np.sum(labels == c) + np.sum(judged.predicted == c) for c in classes])
    return float(np.mean(2 * both / either))


def accuracy(
    images: Float[np.ndarray, "images dim"],
    labels: Int[np.ndarray, " images"],
    classes: Float[np.ndarray, "classes dim"],
) -> dict[str, float]:
    """``{"zero_shot_top1": ..., "zero_shot_top5": ...}``; top 5 only where there are more than five classes."""
    found = scores(judge(images, labels, classes), labels, len(classes))
    names = ("top1", "top5") if len(classes) > 5 else ("top1",)
    return {f"zero_shot_{name}": found[name] for name in names}


def _count_right(nearness: np.ndarray, columns: np.ndarray, best: np.ndarray) -> Int[np.ndarray, " block"]:
    """The number of different right classes that are as near as the best of them; none of them is nearer."""
    columns = np.sort(columns, axis=1)
    new = (columns >= 0) & np.append(np.ones((len(columns), 1), bool), np.diff(columns, axis=1) > 0, axis=1)
    return np.count_nonzero(new & (np.take_along_axis(nearness, columns, 1) >= best - TIE), axis=1)


def _blocks(images, classes, parents) -> Iterator[tuple[slice, Float[np.ndarray, "block classes"]]]:
    for start in range(0, len(images), IMAGE_BLOCK):
        rows = slice(start, start + IMAGE_BLOCK)
        nearness = images[rows] @ classes.T
        if parents is not None:
            order = np.argsort(parents, kind="stable")
            names, first = np.unique(parents[order], return_index=True)
            grouped = np.full((len(nearness), int(parents.max()) + 1), -np.inf, nearness.dtype)
            grouped[:, names] = np.maximum.reduceat(nearness[:, order], first, axis=1)
            nearness = grouped
        yield rows, nearness
