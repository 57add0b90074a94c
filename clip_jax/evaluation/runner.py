"""Runs tasks on a model: embeds each source once, computes every protocol from the embeddings, and returns results.

A ``Task`` is plain data; its protocol is a function of the embeddings, which a ``Subject`` computes and caches. The
metrics of a result are numbers or None; ``curves`` and ``details`` are for the report, and ``hits`` has one value per
example, for paired comparisons.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.data.sources import shapes
from clip_jax.data.sources.sample import Source
from clip_jax.evaluation import (
    adversarial,
    aro,
    calibration,
    composition,
    cues,
    dense,
    groups,
    label_maps,
    multi_label,
    probe_protocol,
    prompts,
    ranking,
    retrieval,
    typographic,
    winogavil,
    zero_shot,
)
from clip_jax.evaluation.datasets import Dataset
from clip_jax.evaluation.embed import Embedded
from clip_jax.evaluation.masks import MaskedScenes
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.robustness import CORRUPTIONS, SEVERITIES, corrupted
from clip_jax.evaluation.subject import (
    Ensemble,
    Result,
    Subject,
    Task,
    as_cosines,
    class_probabilities,
    judge,
    judge_probabilities,
    labeled,
)


def run(task: Task, subjects: Sequence[Subject], weights: Sequence[float] | None = None) -> Result:
    """A task on one model, or on several as an ensemble; ``weights`` of the models, equal by default.

    An ensemble averages the probabilities of classification, and cosines in retrieval and composition.
    """
    share = np.ones(len(subjects)) if weights is None else np.asarray(weights, float)
    found = PROTOCOLS[task.protocol](task, list(zip(subjects, share / share.sum(), strict=True)))
    return found._replace(main_metric=task.metric or found.main_metric)


def _zero_shot(task: Task, models: Ensemble) -> Result:
    embedded = labeled(task.source, models)
    probabilities = class_probabilities(task, models)
    return _classification(task, models, embedded, probabilities)


def _classification(task: Task, models: Ensemble, embedded: Embedded, probabilities: np.ndarray) -> Result:
    labels, count = embedded.labels, probabilities.shape[1]
    judged = judge_probabilities(probabilities, labels, models)
    metrics = zero_shot.scores(judged, labels, count)
    metrics["top1_top5"] = None if metrics["top5"] is None else (metrics["top1"] + metrics["top5"]) / 2
    metrics["f1_macro"] = zero_shot.f1_macro(judged, labels)
    if count == 2:
        metrics["roc_auc"] = multi_label.roc_auc(probabilities[:, 1], labels == 1)
    hits, confidence = judged.hits(), probabilities.max(axis=1)
    metrics["calibration_error"] = calibration.expected_calibration_error(confidence, hits)
    fitted = calibration.fitted(as_cosines(probabilities, models), labels, hits)
    metrics |= {"fitted_scale": fitted.scale, "fitted_calibration_error": fitted.calibration_error}
    metrics |= {"acc1": metrics["top1"], "acc5": metrics["top5"], "mean_per_class_recall": metrics["mean_per_class"]}
    bins = calibration.reliability(confidence, hits)
    per_class = zero_shot.by_class(judged, labels)
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (labels, judged.predicted), 1)
    worst = sorted(per_class, key=per_class.get)[:8]
    names = task.prompts.class_names
    details = {
        "worst_classes": [
            {
                "class": names[c],
                "top1": per_class[c],
                "images": int((labels == c).sum()),
                "taken_for": names[int(np.argmax(np.where(np.arange(count) == c, -1, confusion[c])))],
                "examples": embedded.indices[(labels == c) & (judged.predicted != c)][:6].tolist(),
            }
            for c in worst
        ],
        "all_equal": judged.all_equal,
    }
    if count <= 32:
        details["confusion"] = {"classes": list(names), "counts": confusion.tolist()}
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer)
    return Result(
        metrics,
        "top1",
        len(labels),
        embedded.skipped.total(),
        wanted.fingerprint,
        {"top1": hits},
        {"reliability": [[b.confidence, b.accuracy] for b in bins if b.count]},
        details,
        embedded.indices,
    )


def _grouped(task: Task, models: Ensemble) -> Result:
    embedded, probabilities = labeled(task.source, models), class_probabilities(task, models)
    found, grouping = _classification(task, models, embedded, probabilities), task.source.grouping
    judged = judge_probabilities(probabilities, embedded.labels, models)
    metrics, by_group = groups.worst(judged, task.source.rows[embedded.indices], grouping)
    main = f"worst_{grouping.columns[0]}_top1"
    return found._replace(
        metrics=found.metrics | metrics, main_metric=main, details=found.details | {"by_group": by_group}
    )


def _retrieval(task: Task, models: Ensemble) -> Result:
    found = [model.embed(task.source, texts=True) for model, _ in models]
    first = found[0]
    # The cosine of concatenated vectors, each scaled by the root of its share, is the mean of the cosines.
    images, texts = (
        np.concatenate(
            [np.sqrt(share) * getattr(e, field) for e, (_, share) in zip(found, models, strict=True)], axis=1
        )
        for field in ("images", "texts")
    )
    mesh = models[0][0].embedder.mesh
    both = retrieval.rank_both(images, texts, first.owner, mesh)
    metrics, hits, equal = {}, {}, []
    for ranked, name, candidates in zip(both, ("i2t", "t2i"), (len(texts), len(images)), strict=True):
        equal.append(ranking.all_equal(ranked, candidates))
        metrics |= retrieval.summarize(ranked, candidates, name, retrieval.RECALL_AT, "pessimistic")
        hits[f"{name}_R@1"] = ranking.hit(ranked, 1, "pessimistic")
    for k in retrieval.RECALL_AT:  # CLIP_benchmark's names, by what is retrieved
        if f"t2i_R@{k}" in metrics and f"i2t_R@{k}" in metrics:
            metrics[f"image_retrieval_recall@{k}"] = metrics[f"t2i_R@{k}"]
            metrics[f"text_retrieval_recall@{k}"] = metrics[f"i2t_R@{k}"]
    if "i2t_R@1" in metrics and "t2i_R@1" in metrics:
        metrics["mean_recall@1"] = (metrics["i2t_R@1"] + metrics["t2i_R@1"]) / 2
    metrics["captions_per_image"] = len(texts) / len(images)
    details = {"ties": "pessimistic", "all_equal": all(equal), "gallery": _gallery(first, images, texts, both[1])}
    return Result(metrics, "mean_recall@1", len(images), first.skipped.total(), None, hits, {}, details)


def _gallery(embedded: Embedded, images: np.ndarray, texts: np.ndarray, ranked: ranking.Ranked) -> list[dict[str, Any]]:
    """The first captions and those whose image ranks lowest, each with the nearest images (indices of the source)."""
    ranks = ranking.first_rank(ranked, "pessimistic")
    first = list(range(min(4, len(texts))))
    shown = first + [int(t) for t in np.argsort(-ranks, kind="stable") if t not in first and ranks[t] > 1][:4]
    found = []
    for t in shown:
        nearest = np.argsort(-(images @ texts[t]), kind="stable")[:6]
        found.append(
            {
                "caption": embedded.captions[t],
                "rank": int(ranks[t]),
                "image": int(embedded.indices[embedded.owner[t]]),
                "nearest": embedded.indices[nearest].tolist(),
            }
        )
    return found


def _corruptions(task: Task, models: Ensemble) -> Result:
    metrics, curves, judged = {}, {}, [judge(task, models)]
    clean = judged[0].hits()
    for kind in CORRUPTIONS:
        found = [judge(task._replace(source=corrupted(task.source, kind, s)), models) for s in SEVERITIES]
        values = [each.hits() for each in found]
        curves[kind] = [
            [0, float(clean.mean())],
            *([s, float(v.mean())] for s, v in zip(SEVERITIES, values, strict=True)),
        ]
        metrics[kind] = float(np.mean([v.mean() for v in values]))
        judged += found
    metrics = {"mean": float(np.mean(list(metrics.values()))), "clean": float(clean.mean())} | metrics
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    hits = {"mean": np.concatenate([each.hits() for each in judged[1:]])}
    details = {"all_equal": all(each.all_equal for each in judged)}
    return Result(metrics, "mean", len(clean), 0, wanted, hits, curves, details)


PROTOCOLS: Mapping[str, Callable[[Task, Ensemble], Result]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "composition": composition.protocol,
    "winoground": composition.winoground_protocol,
    "sugar_crepe": composition.sugar_crepe_protocol,
    "aro": aro.protocol,
    "caption_order": aro.order_protocol,
    "multi_label": multi_label.protocol,
    "labels": label_maps.protocol,
    "grouped": _grouped,
    "winogavil": winogavil.protocol,
    "dense": dense.protocol,
    "corruptions": _corruptions,
    "typographic": typographic.protocol,
    "adversarial": adversarial.protocol,
    "cues": cues.protocol,
    "probe": probe_protocol.protocol,
    "probe_pooled": functools.partial(probe_protocol.protocol, pooled=True),
}


def quick(image_size: int, *, classification: int = 384, pairs: int = 256, corrupted: int = 12) -> tuple[Task, ...]:
    """A suite without downloads, on rendered scenes of color and shape combinations that are never trained on.

    The probe is fitted on ``classification`` further scenes of the same classes.
    """
    size = max(32, image_size)
    test = shapes.open_shapes("zero_shot", image_size=size, examples=classification)
    both = shapes.open_shapes("zero_shot", image_size=size, examples=2 * classification)
    pictures = shapes.open_shapes("heldout", image_size=size, examples=pairs)
    few = shapes.open_shapes("zero_shot", image_size=size, examples=corrupted)
    wanted = Prompts(shapes.CLASS_NAMES, shapes.TEMPLATES)
    return (
        Task("shapes_zero_shot", "zero_shot", test, wanted),
        Task("shapes_probe", "probe", test, wanted, train=_After(both, classification)),
        Task("shapes_retrieval", "retrieval", pictures),
        Task("shapes_composition", "composition", pictures),
        Task("shapes_corruptions", "corruptions", few, wanted),
    )


def robustness(image_size: int, given: Iterable[Task], *, classification: int = 96) -> tuple[Task, ...]:
    """Corruptions, typographic attacks and adversarial attacks on each given labeled dataset (or else the bundled
    scenes), and the cues of the bundled scenes."""
    scenes = shapes.open_shapes("zero_shot", image_size=max(32, image_size), examples=classification)
    bundled = Task("shapes", "zero_shot", scenes, Prompts(shapes.CLASS_NAMES, shapes.TEMPLATES))
    sets = [task for task in given if task.protocol == "zero_shot"] or [bundled]
    kinds = ("corruptions", "typographic", "adversarial")
    attacked = [task._replace(name=f"{task.name}_{kind}", protocol=kind) for task in sets for kind in kinds]
    return (*attacked, bundled._replace(name="shapes_cues", protocol="cues"))


def dense_suite(image_size: int, given: Iterable[Task], *, pictures: int = 96) -> tuple[Task, ...]:
    """Every given set with masks, or else the bundled scenes."""
    scenes = MaskedScenes(shapes.open_shapes("heldout", image_size=max(32, image_size), examples=pictures))
    bundled = Task("shapes_dense", "dense", scenes, Prompts(scenes.class_names, shapes.TEMPLATES))
    return tuple(task for task in given if task.protocol == "dense") or (bundled,)


@dataclass(frozen=True)
class _After:
    """The examples of a source from ``start`` on."""

    source: Source
    start: int

    name = property(lambda self: f"{self.source.name} from {self.start}")
    fingerprint = property(lambda self: f"{self.source.fingerprint}-from-{self.start}")
    class_names = property(lambda self: self.source.class_names)

    def __len__(self) -> int:
        return len(self.source) - self.start

    def __getitem__(self, index):
        return self.source[self.start + index]


def task_of(dataset: Dataset) -> Task:
    given = dataset.name, dataset.protocol, dataset.source, dataset.prompts
    return Task(*given, labels=dataset.labels, language=dataset.language)
