"""Which cues a model uses: shapes without color, outlines alone, and shape against texture, on the bundled scenes.

Each picture has one object, classified among the eight shapes ("a circle", "a star", ...).

- ``normal``, ``gray``, ``outline``: accuracy on the pictures as they are, on luminance alone, on dark outlines.
- ``conflict_shape``, ``conflict_texture``: the silhouette of one shape is filled with small copies of another; the
  share of pictures that are taken for the silhouette, and for the filling. ``shape_bias`` is the first divided by both
  (Geirhos et al. 2019, section 3); None if a model names neither.

Traps. Shape bias says nothing about accuracy: a constant model has 1/2. The conflicts are rendered, not the stylized
photographs of that paper, and its values for people and networks do not apply.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip_jax.data.sources import shapes
from clip_jax.data.sources.sample import Sample
from clip_jax.data.sources.shapes import variants
from clip_jax.data.sources.shapes.rendering import SHAPES
from clip_jax.evaluation import prompts
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.subject import Ensemble, Result, Task, class_probabilities, judge_probabilities, labelled

CONTRASTS = (0.25, 0.5, 0.75, 1.0)
NAMES = tuple(SHAPES)
PROMPTS = Prompts(NAMES, shapes.TEMPLATES)


@dataclass(frozen=True)
class Redrawn:
    """Scenes of one object, drawn by a function of the source and an index; labels are shapes."""

    source: shapes.Shapes
    what: str
    draw: Callable[[shapes.Shapes, int], variants.Picture]

    class_names = NAMES

    @property
    def name(self) -> str:
        return f"{self.source.name} {self.what}"

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-shapes-{self.what}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return sample._replace(image=self.draw(self.source, index), label=NAMES.index(_shape(self.source, index)))


def other_shape(source: shapes.Shapes, index: int) -> str:
    """The shape that fills the silhouette of a scene; every pair of shapes occurs."""
    own, turn = NAMES.index(_shape(source, index)), index
    return NAMES[(own + 1 + turn % (len(NAMES) - 1)) % len(NAMES)]


def redrawn(source: shapes.Shapes, what: str, contrast: float = 1.0) -> Redrawn:
    """``what``: normal, gray, outline or conflict."""
    if what == "conflict":

        def draw(source, index):
            scene, size = source.describe(index)[0], source.image_size
            return variants.filled(scene, other_shape(source, index), contrast, size)

        return Redrawn(source, f"conflict-{contrast:g}", draw)
    drawings = {
        "normal": lambda source, index: source[index].image,
        "gray": lambda source, index: variants.gray(source[index].image),
        "outline": lambda source, index: variants.outline(source.describe(index)[0], source.image_size),
    }
    return Redrawn(source, what, drawings[what])


def protocol(task: Task, models: Ensemble) -> Result:
    """On a ``shapes:zero_shot`` source; the task's prompts are not used."""
    source = task.source
    right = {what: _hits(redrawn(source, what), models) for what in ("normal", "gray", "outline")}
    textures = np.array([NAMES.index(other_shape(source, index)) for index in range(len(source))])
    by_shape, by_texture = [], []
    for contrast in CONTRASTS:
        conflict = redrawn(source, "conflict", contrast)
        by_shape.append(_hits(conflict, models))
        by_texture.append(_hits(conflict, models, textures))
    shape, texture = float(by_shape[-1].mean()), float(by_texture[-1].mean())
    metrics: dict[str, float | None] = {what: float(values.mean()) for what, values in right.items()}
    metrics = {"mean": float(np.mean([metrics["gray"], metrics["outline"], shape]))} | metrics
    metrics |= {"conflict_shape": shape, "conflict_texture": texture}
    metrics["shape_bias"] = shape / (shape + texture) if shape + texture else None
    curves = {
        title: [[contrast, float(v.mean())] for contrast, v in zip(CONTRASTS, values, strict=True)]
        for title, values in (("shape, by contrast of the filling", by_shape), ("texture, likewise", by_texture))
    }
    wanted = prompts.for_model(PROMPTS, models[0][0].tokenizer).fingerprint
    hits = {"mean": np.concatenate([right["gray"], right["outline"], by_shape[-1]])}
    return Result(metrics, "mean", len(source), 0, wanted, hits, curves, {})


def _hits(source: Redrawn, models: Ensemble, classes: np.ndarray | None = None) -> np.ndarray:
    task = Task(source.name, "zero_shot", source, PROMPTS)
    wanted = labelled(source, models).labels if classes is None else classes
    return judge_probabilities(class_probabilities(task, models), wanted, models).hits()


def _shape(source: shapes.Shapes, index: int) -> str:
    return source.describe(index)[0].objects[0].shape
