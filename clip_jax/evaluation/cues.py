"""Which cues a model uses: shapes without color, outlines alone, and shape against texture, on the bundled scenes.

Each picture has one object, of every combination of color and shape equally often, and is classified among all of them
("a red circle"); the shape of the nearest one counts.

- ``normal``, ``gray``, ``outline``: accuracy on the pictures as they are, on luminance alone, on dark outlines.
- ``conflict_shape``, ``conflict_texture``: the silhouette of one shape is filled with small copies of another; the
  share of pictures that are taken for the silhouette, and for the filling. ``shape_bias`` is the first divided by both
  (Geirhos et al. 2019, section 3); None if a model names neither.

Traps. Shape bias says nothing about accuracy: a constant model has 1/2. The conflicts are rendered, not the stylized
photographs of that paper, and its values for people and networks do not apply. Pictures of held-out combinations alone
would put a model that knows nothing but colors below chance: it names a shape that training had in this color, and the
right one is none of these. Prompts without a color ("a circle") are unlike all captions of the scenes, and cost 16
points of a short run's accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip_jax.data.sources import shapes
from clip_jax.data.sources.sample import Sample
from clip_jax.data.sources.shapes import variants
from clip_jax.data.sources.shapes.rendering import SHAPES, Scene, render
from clip_jax.data.sources.shapes.scenes import COMBINATIONS, draw_scene, generator
from clip_jax.evaluation import prompts
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.subject import Ensemble, Result, Task, class_probabilities, judge_probabilities, labeled
from clip_jax.evaluation.zero_shot import Judged

DRAWINGS = ("normal", "gray", "outline")
CONTRASTS = (0.25, 0.5, 0.75, 1.0)
NAMES = tuple(SHAPES)
PROMPTS = Prompts(tuple(f"{color} {shape}" for color, shape in COMBINATIONS), shapes.TEMPLATES)


@dataclass(frozen=True)
class Redrawn:
    """Scenes of one object, drawn by a function of an index; labels are combinations of color and shape."""

    source: shapes.Shapes
    """Gives the size of the pictures, and about how many there are: every combination equally often."""
    what: str
    draw: Callable[[int], variants.Picture]

    class_names = PROMPTS.class_names

    @property
    def name(self) -> str:
        return f"{self.source.name} {self.what}"

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-combinations-{self.what}"

    def __len__(self) -> int:
        return -(-len(self.source) // len(COMBINATIONS)) * len(COMBINATIONS)

    def __getitem__(self, index: int) -> Sample:
        label = index % len(COMBINATIONS)
        return Sample(self.draw(index), (f"a {self.class_names[label]}",), f"{self.name}/{index}", label)


def scene(index: int) -> Scene:
    return draw_scene(generator("cues", index), COMBINATIONS[index % len(COMBINATIONS)], alone=True)


def other_shape(index: int) -> str:
    """The shape that fills the silhouette of a scene; every pair of shapes occurs."""
    shape = index % len(NAMES)
    return NAMES[(shape + 1 + index % (len(NAMES) - 1)) % len(NAMES)]


def redrawn(source: shapes.Shapes, what: str, contrast: float = 1.0) -> Redrawn:
    """``what``: normal, gray, outline or conflict."""
    size = source.image_size
    if what == "conflict":
        return Redrawn(
            source,
            f"conflict-{contrast:g}",
            lambda index: variants.filled(scene(index), other_shape(index), contrast, size),
        )
    drawings = {
        "normal": lambda index: render(scene(index), size),
        "gray": lambda index: variants.gray(render(scene(index), size)),
        "outline": lambda index: variants.outline(scene(index), size),
    }
    return Redrawn(source, what, drawings[what])


def protocol(task: Task, models: Ensemble) -> Result:
    """On scenes of the size of a ``shapes`` source; its own scenes and the task's prompts are not used."""
    source = task.source
    judged = [_judge(redrawn(source, what), models) for what in DRAWINGS]
    right = {what: each.hits() for what, each in zip(DRAWINGS, judged, strict=True)}
    count = len(right["normal"])
    textures = np.array([NAMES.index(other_shape(index)) for index in range(count)])
    by_shape, by_texture = [], []
    for contrast in CONTRASTS:
        conflict = redrawn(source, "conflict", contrast)
        judged.append(_judge(conflict, models))
        by_shape.append(judged[-1].hits())
        by_texture.append(_judge(conflict, models, textures).hits())
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
    details = {"all_equal": all(each.all_equal for each in judged)}
    return Result(metrics, "mean", count, 0, wanted, hits, curves, details)


def _judge(source: Redrawn, models: Ensemble, classes: np.ndarray | None = None) -> Judged:
    """A hit is a picture whose nearest combination has the right shape, or that of ``classes``."""
    task = Task(source.name, "zero_shot", source, PROMPTS)
    wanted = labeled(source, models).labels % len(NAMES) if classes is None else classes
    # Combinations are ordered by color, then shape.
    by_shape = class_probabilities(task, models).reshape(len(source), -1, len(NAMES)).max(axis=1)
    return judge_probabilities(by_shape, wanted, models)
