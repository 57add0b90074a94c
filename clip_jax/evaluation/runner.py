"""Runs tasks on a model: embeds each source once, computes every protocol from the embeddings, and returns results.

A task is data (``Task``); what it needs is a function of the embeddings that a ``Subject`` makes and keeps. Metrics of
a result are plain numbers or None; ``curves`` and ``details`` are for the report, and ``hits`` has one value per
example, for paired comparisons.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clip_jax.data.sources import shapes
from clip_jax.data.sources.sample import Source
from clip_jax.errors import UserError
from clip_jax.evaluation import calibration, composition, probe, prompts, ranking, retrieval, zero_shot
from clip_jax.evaluation.datasets import Dataset
from clip_jax.evaluation.embed import Embedded, Embedder, Variables, embed_source, embed_texts
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.robustness import CORRUPTIONS, SEVERITIES, Corrupted

EMBEDDED_SOURCES = 4
"""Sources whose embeddings are kept: as many as a suite uses for several tasks."""


class Task(NamedTuple):
    """One line of a suite: its name, its protocol (a key of ``PROTOCOLS``) and what is measured."""

    name: str
    protocol: str
    source: Source
    prompts: Prompts | None = None
    train: Source | None = None
    """The source on which a probe is fitted."""
    metric: str = ""
    """The main metric, where a suite has another than the protocol's."""


class Result(NamedTuple):
    """The result of a task."""

    metrics: dict[str, float | None]
    main_metric: str
    examples: int
    skipped: int
    prompts: str | None
    """The fingerprint of the prompts."""
    hits: dict[str, Float[np.ndarray, " queries"]]
    """One value per example, by the metric that is their mean."""
    curves: dict[str, list[list[float]]]
    """title -> [[x, y], ...]"""
    details: dict[str, Any]


class Subject:
    """A model with its embeddings: each source is embedded once, each set of prompts becomes a classifier once."""

    def __init__(self, name: str, embedder: Embedder, weights: Variables, scale: float, tokenizer: str):
        self.name, self.embedder, self.weights, self.scale, self.tokenizer = name, embedder, weights, scale, tokenizer
        self._embedded: dict[tuple[str, bool], Embedded] = {}
        self._classifiers: dict[str, np.ndarray] = {}

    @property
    def fingerprint(self) -> str:
        """A hash that changes with the model and with its training step."""
        digest = hashlib.sha256(f"{self.tokenizer} {self.embedder.image_size} {self.embedder.preprocess}".encode())
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.weights)[0]:
            flat = jnp.asarray(leaf, jnp.float32).ravel()
            # The first numbers and two sums of all: reading back every number would take longer than some evaluations.
            start = np.asarray(jnp.concatenate([flat[:64], jnp.array([flat.sum(), jnp.abs(flat).sum()])]))
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + start.tobytes())
        return digest.hexdigest()[:16]

    def embed(self, source: Source, *, texts: bool) -> Embedded:
        """The embeddings of a source. Raises UserError if they are not finite."""
        key = source.fingerprint, texts
        if key not in self._embedded:
            while len(self._embedded) >= EMBEDDED_SOURCES:
                self._embedded.pop(next(iter(self._embedded)))
            embedded = embed_source(self.embedder, self.weights, source, texts=texts)
            self._check(source.name, images=embedded.images, texts=embedded.texts)
            self._embedded[key] = embedded
        return self._embedded[key]

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """The embeddings of texts. Raises UserError if they are not finite."""
        found = embed_texts(self.embedder, self.weights, texts)
        self._check("prompts", texts=found)
        return found

    def _check(self, of: str, **embeddings: np.ndarray) -> None:
        try:
            ranking.check_finite(**embeddings)
        except ValueError as error:
            raise UserError(f"{self.name} on {of}: {error}; the model is broken") from error

    def classifier(self, wanted: Prompts) -> Float[np.ndarray, "classes dim"]:
        """The class vectors of prompts, which are brought into the form that this model expects."""
        wanted = prompts.for_model(wanted, self.tokenizer)
        if wanted.fingerprint not in self._classifiers:
            found = zero_shot.classifier(wanted.class_names, wanted.templates, self.texts)
            self._classifiers[wanted.fingerprint] = found
        return self._classifiers[wanted.fingerprint]


def run(task: Task, subjects: Sequence[Subject], weights: Sequence[float] | None = None) -> Result:
    """A task on one model, or on several as an ensemble; ``weights`` of the models, equal by default.

    An ensemble averages the probabilities of classification, and cosines in retrieval and composition.
    """
    share = np.ones(len(subjects)) if weights is None else np.asarray(weights, float)
    found = PROTOCOLS[task.protocol](task, list(zip(subjects, share / share.sum(), strict=True)))
    return found._replace(main_metric=task.metric or found.main_metric)


Ensemble = Sequence[tuple[Subject, float]]


def _zero_shot(task: Task, models: Ensemble) -> Result:
    embedded = _labelled(task.source, models)
    probabilities = _probabilities(task, models)
    return _classification(task, models, embedded, probabilities)


def _probabilities(task: Task, models: Ensemble) -> Float[np.ndarray, "images classes"]:
    mixed = 0.0
    for model, share in models:
        cosines = model.embed(task.source, texts=False).images @ model.classifier(task.prompts).T
        logits = model.scale * cosines.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        exponent = np.exp(logits)
        mixed = mixed + share * exponent / exponent.sum(axis=1, keepdims=True)
    return mixed


def _classification(task: Task, models: Ensemble, embedded: Embedded, probabilities: np.ndarray) -> Result:
    labels, count = embedded.labels, probabilities.shape[1]
    judged = _judge(probabilities, labels, models)
    metrics = zero_shot.scores(judged, labels, count)
    hits, confidence = judged.hits(), probabilities.max(axis=1)
    metrics["calibration_error"] = calibration.expected_calibration_error(confidence, hits)
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
        "all_equal": bool((judged.tied == count - 1).all()),
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
    places = retrieval.place_both(images, texts, first.owner, mesh)
    metrics, hits = {}, {}
    for placed, name, candidates in zip(places, ("i2t", "t2i"), (len(texts), len(images)), strict=True):
        metrics |= retrieval.summarize(placed, candidates, name, retrieval.RECALL_AT, "pessimistic")
        hits[f"{name}_R@1"] = ranking.hit(placed, 1, "pessimistic")
    for k in retrieval.RECALL_AT:  # CLIP_benchmark's names, by what is retrieved
        if f"t2i_R@{k}" in metrics and f"i2t_R@{k}" in metrics:
            metrics[f"image_retrieval_recall@{k}"] = metrics[f"t2i_R@{k}"]
            metrics[f"text_retrieval_recall@{k}"] = metrics[f"i2t_R@{k}"]
    if "i2t_R@1" in metrics and "t2i_R@1" in metrics:
        metrics["mean_recall@1"] = (metrics["i2t_R@1"] + metrics["t2i_R@1"]) / 2
    metrics["captions_per_image"] = len(texts) / len(images)
    details = {"ties": "pessimistic", "gallery": _gallery(first, images, texts, places[1])}
    return Result(metrics, "mean_recall@1", len(images), first.skipped.total(), None, hits, {}, details)


def _gallery(embedded: Embedded, images: np.ndarray, texts: np.ndarray, placed: ranking.Placed) -> list[dict[str, Any]]:
    """The first captions and those whose image ranks lowest, each with the nearest images (indices of the source)."""
    ranks = ranking.first_rank(placed, "pessimistic")
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


def _composition(task: Task, models: Ensemble) -> Result:
    """Swaps of the bundled scenes of a ``shapes`` source."""
    embedded = models[0][0].embed(task.source, texts=True)
    rows, made = [], []
    for row, index in enumerate(embedded.indices.tolist()):
        for swap in composition.swaps(task.source.describe(index)[0], index):
            rows.append(row)
            made.append(swap)
    captions = sorted({caption for swap in made for caption in (swap.true, swap.false)})
    number = {caption: i for i, caption in enumerate(captions)}
    true, false = np.zeros(len(made)), np.zeros(len(made))
    for model, share in models:
        images, texts = model.embed(task.source, texts=True).images[rows].astype(np.float64), model.texts(captions)
        true += share * np.sum(images * texts[[number[swap.true] for swap in made]], axis=1)
        false += share * np.sum(images * texts[[number[swap.false] for swap in made]], axis=1)
    wins, kinds = composition.true_caption_wins(true, false), np.array([swap.kind for swap in made])
    metrics = {kind: float(wins[kinds == kind].mean()) for kind in sorted(set(kinds))}
    metrics["mean"] = float(np.mean(list(metrics.values())))
    details = {"all_equal": composition.all_equal(true, false), "pairs": len(made)}
    return Result(metrics, "mean", len(embedded.images), embedded.skipped.total(), None, {"pairs": wins}, {}, details)


def _corruptions(task: Task, models: Ensemble) -> Result:
    metrics, curves, hits = {}, {}, []
    clean = _top1(task, models)
    for kind in CORRUPTIONS:
        values = [_top1(task._replace(source=Corrupted(task.source, kind, s)), models) for s in SEVERITIES]
        curves[kind] = [
            [0, float(clean.mean())],
            *([s, float(v.mean())] for s, v in zip(SEVERITIES, values, strict=True)),
        ]
        metrics[kind] = float(np.mean([v.mean() for v in values]))
        hits += values
    metrics = {"mean": float(np.mean(list(metrics.values()))), "clean": float(clean.mean())} | metrics
    wanted = prompts.for_model(task.prompts, models[0][0].tokenizer).fingerprint
    return Result(metrics, "mean", len(clean), 0, wanted, {"mean": np.concatenate(hits)}, curves, {})


def _top1(task: Task, models: Ensemble) -> Float[np.ndarray, " images"]:
    labels, probabilities = _labelled(task.source, models).labels, _probabilities(task, models)
    return _judge(probabilities, labels, models).hits()


def _judge(probabilities: np.ndarray, labels: np.ndarray, models: Ensemble) -> zero_shot.Judged:
    """Log-probabilities divided by the scale differ as cosines do, so that ties mean the same for an ensemble."""
    scale = sum(share * model.scale for model, share in models)
    return zero_shot.judge(np.log(np.maximum(probabilities, 1e-300)) / scale, labels, np.eye(probabilities.shape[1]))


def _probe(task: Task, models: Ensemble) -> Result:
    """Fitted on two thirds of ``train`` with a sweep on the rest, then few-shot from all of it.

    The features are unit embeddings, those of an ensemble side by side.
    """
    train, test = ([model.embed(source, texts=False) for model, _ in models] for source in (task.train, task.source))
    classes = len(task.source.class_names)
    (x, y), (x_test, y_test) = ((np.concatenate([e.images for e in es], 1), es[0].labels) for es in (train, test))
    order = np.random.default_rng(0).permutation(len(y))
    cut = len(y) * 2 // 3
    found = probe.linear_probe(
        (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]]), classes, iterations=300
    )
    correct = (found.head.logits(x_test).argmax(axis=1) == y_test).astype(np.float64)
    most = int(np.bincount(y, minlength=classes).min())
    shots = [k for k in (1, 2, 4, 8, 16) if k <= most]
    curve = probe.few_shot((x, y), (x_test, y_test), classes, shots, fit=probe.ridge)
    metrics = {"lp_acc1": float(correct.mean()), "C": found.c}
    metrics |= {f"{k}_shot": float(np.mean(values)) for k, values in curve.items()}
    metrics |= {f"{k}_shot_std": float(np.std(values)) for k, values in curve.items()}
    points = [[k, float(np.mean(values))] for k, values in curve.items()]
    skipped = test[0].skipped.total()
    return Result(metrics, "lp_acc1", len(y_test), skipped, None, {"lp_acc1": correct}, {"few-shot": points}, {})


def _labelled(source: Source, models: Ensemble) -> Embedded:
    embedded = models[0][0].embed(source, texts=False)
    outside = (embedded.labels < 0) | (embedded.labels >= len(source.class_names))
    if outside.any():
        raise UserError(
            f"{source.name}: {int(outside.sum())} images have no label among {len(source.class_names)} classes"
        )
    return embedded


PROTOCOLS: Mapping[str, Callable[[Task, Ensemble], Result]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "composition": _composition,
    "corruptions": _corruptions,
    "probe": _probe,
}


def quick(image_size: int, *, classification: int = 480, pairs: int = 512, corrupted: int = 24) -> tuple[Task, ...]:
    """The suite that needs no download: rendered scenes of combinations of color and shape that are never trained on.

    The probe is fitted on further scenes of the same classes, ``classification`` of them.
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
    return Task(dataset.name, dataset.protocol, dataset.source, dataset.prompts)
