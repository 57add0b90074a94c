"""The protocol ``probe``: how well linear classifiers read a model's frozen features, by the number of labeled images.

- ``lp_acc1``: test accuracy of the linear probe of ``probe.py``, fitted on ``Task.train``; ``C`` is its strength;
  ``lp_mean_per_class_recall``: the mean of the accuracies of the classes that occur.
- ``K_shot``: of ridge on K images per class, the mean over three draws, with the deviation ``K_shot_std``;
  ``all_shot``: of ridge on all images. The curve has the number of images per class, of all images their mean.
- ``shots_equal_zero_shot``: the images per class with which the curve reaches zero-shot accuracy (Radford et al. 2021,
  figure 7); None if it never does. Only for tasks with prompts.

The features are unit embeddings. ``probe_pooled`` has the features before the projection, as they are, which are those
of the CLIP paper's probes (appendix A.3: I_f of figure 3) and not those of CLIP_benchmark's.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from clip_jax.data.sources.sample import Source
from clip_jax.errors import UserError
from clip_jax.evaluation import datasets, probe, prompts, ranking
from clip_jax.evaluation.subject import Ensemble, Result, Task, judge, labeled

SHOTS = (1, 2, 4, 8, 16)

Labeled = tuple[Float[np.ndarray, "n features"], Int[np.ndarray, " n"]]
"""Features with their classes."""


class FewShot(NamedTuple):
    """Test accuracies of ridge by the number of images per class."""

    shots: dict[int, list[float]]
    """One for each draw."""
    images_per_class: float
    """The mean, over all images."""
    of_all: float

    @property
    def curve(self) -> dict[float, list[float]]:
        return self.shots | {self.images_per_class: [self.of_all]}

    def means(self) -> dict[str, float]:
        return {f"{k}_shot": float(np.mean(found)) for k, found in self.shots.items()} | {"all_shot": self.of_all}


def few_shot(train: Labeled, test: Labeled, classes: int) -> FewShot:
    """For as many of ``SHOTS`` as the smallest class has images, and for all images."""
    labels = train[1]
    fewest = int(np.bincount(labels, minlength=classes).min())
    shots = probe.few_shot(train, test, classes, [k for k in SHOTS if k <= fewest], fit=probe.ridge)
    return FewShot(shots, len(labels) / classes, probe.ridge(*train, classes).accuracy(*test))


def protocol(task: Task, models: Ensemble, *, pooled: bool = False) -> Result:
    """The features of an ensemble are those of its models side by side."""
    readers = [(model.pooled(), share) for model, share in models] if pooled else models
    train, test = (_features(source, readers) for source in (task.train, task.source))
    classes = len(task.source.class_names)
    found = probe.linear_probe_of(*train, classes)
    correct = (found.head.logits(test[0]).argmax(axis=1) == test[1]).astype(np.float64)
    few = few_shot(train, test, classes)
    recall = [correct[test[1] == label].mean() for label in np.unique(test[1])]
    metrics = {"lp_acc1": float(correct.mean()), "lp_mean_per_class_recall": float(np.mean(recall)), "C": found.c}
    metrics |= few.means()
    metrics |= {f"{k}_shot_std": float(np.std(values)) for k, values in few.shots.items()}
    wanted = None
    if task.prompts is not None:
        zero_shot = float(judge(task, models).hits().mean())
        metrics["shots_equal_zero_shot"] = probe.shots_that_equal(few.curve, zero_shot)
        wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    points = {"few-shot": [[k, float(np.mean(values))] for k, values in few.curve.items()]}
    skipped = readers[0][0].embed(task.source, texts=False).skipped.total()
    details = {"all_equal": bool(np.ptp(test[0], axis=0).max() <= ranking.TIE)}
    return Result(metrics, "lp_acc1", len(correct), skipped, wanted, {"lp_acc1": correct}, points, details)


def _features(source: Source, models: Ensemble) -> Labeled:
    labels = labeled(source, models).labels
    return np.concatenate([model.embed(source, texts=False).images for model, _ in models], axis=1), labels


def probes(tasks: Iterable[Task], *, pooled: bool) -> tuple[Task, ...]:
    """A further task for every classification set that has a split ``train``. Raises UserError if none has."""
    name = "probe_pooled" if pooled else "probe"
    opened = [(task, datasets.open_train(task.source)) for task in tasks if task.protocol == "zero_shot"]
    found = tuple(
        task._replace(name=f"{task.name}_{name}", protocol=name, train=train, metric="")
        for task, train in opened
        if train is not None
    )
    if not found:
        raise UserError("--probe: no set has train/nshards.txt and train/0.tar, on which a probe is fitted")
    return found
