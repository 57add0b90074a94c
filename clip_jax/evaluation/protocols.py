"""Named evaluations: what ``config.eval.<name>`` measures, on which source, and when.

A protocol is a function of an evaluation, weights, and the classifiers that other evaluations made with these weights.
A new one needs an entry in ``PROTOCOLS`` and its name in ``settings.EVALUATION_CHOICES``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from clip_jax.data.sources.sample import Source, notes
from clip_jax.devices.sharding import replicated
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import Embedded, Embedder, Variables, embed_source
from clip_jax.evaluation.grounding import boxes
from clip_jax.evaluation.masks import MaskedScenes
from clip_jax.evaluation.probe_protocol import few_shot
from clip_jax.evaluation.prompts import Prompts
from clip_jax.evaluation.retrieval import retrieval as retrieval_metrics
from clip_jax.evaluation.runner import run
from clip_jax.evaluation.subject import Classifiers, Subject, Task
from clip_jax.evaluation.zero_shot import accuracy
from clip_jax.models.clip import Params

Loss = Callable[[Params, np.ndarray, np.ndarray], float]


class Evaluation(NamedTuple):
    """One of a run's evaluations."""

    name: str
    protocol: str
    source: Source
    templates: tuple[str, ...]
    every: int | None
    """Steps between two evaluations; None: at the end only."""
    embedder: Embedder
    loss: Loss | None
    """The held-out loss over all pairs; None if the run has no contrastive objective."""
    tokenizer: str = ""
    """The kind of tokenizer of the model: SigLIP models expect canonical prompts."""
    train: Source | None = None
    """The source that a probe is fitted on."""


Metrics = dict[str, float]


def retrieval(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> tuple[Metrics, Embedded]:
    """The metrics of ``retrieval.py``, and the loss over all pairs (each image with its first caption) as one batch."""
    embedded = embed_source(evaluation.embedder, weights, evaluation.source)
    metrics = {}
    if evaluation.loss is not None:
        _, first = np.unique(embedded.owner, return_index=True)
        metrics["loss"] = evaluation.loss(weights.params, embedded.images, embedded.texts[first])
    mesh = evaluation.embedder.mesh
    metrics |= retrieval_metrics(embedded.images, embedded.texts, embedded.owner, mesh=mesh)
    return metrics | _counts(embedded), embedded


def zero_shot(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> tuple[Metrics, Embedded]:
    """Accuracy among the source's classes."""
    subject = _subject(evaluation, weights, classifiers)
    embedded = subject.embed(evaluation.source, texts=False)
    _check_labels(evaluation.source, embedded)
    classes = subject.classifier(_prompts(evaluation))
    return accuracy(embedded.images, embedded.labels, classes) | _counts(embedded), embedded


def by_runner(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> tuple[Metrics, Embedded]:
    """A protocol that is shared with ``clip-jax evaluate``: composition and cues of the bundled scenes, attacks."""
    subject = _subject(evaluation, weights, classifiers)
    task = Task(evaluation.name, evaluation.protocol, evaluation.source, _prompts(evaluation))
    result = run(task, [subject])
    metrics = {name: value for name, value in result.metrics.items() if value is not None}
    embedded = subject.embed(evaluation.source, texts=evaluation.protocol == "composition")
    return metrics | _counts(embedded), embedded


def probe(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> tuple[Metrics, Embedded]:
    """``all_shot`` and few-shot accuracy of ``probe_protocol.py``: ridge alone, which needs no sweep."""
    subject, sources = _subject(evaluation, weights, classifiers), (evaluation.train, evaluation.source)
    train, test = (subject.embed(source, texts=False) for source in sources)
    for source, embedded in zip(sources, (train, test), strict=True):
        _check_labels(source, embedded)
    found = few_shot((train.images, train.labels), (test.images, test.labels), len(evaluation.source.class_names))
    return found.means() | _counts(test), test


def dense(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> tuple[Metrics, None]:
    """Segmentation of the bundled scenes by their patches; ``dense.py``."""
    # It takes one picture at a time, on each device: the image tower must be there in one piece.
    image = jax.device_put(weights.params["image"], replicated(evaluation.embedder.mesh))
    subject = _subject(evaluation, weights._replace(params=weights.params | {"image": image}), classifiers)
    scenes = MaskedScenes(evaluation.source)
    result = run(Task(evaluation.name, "dense", scenes, Prompts(scenes.class_names, evaluation.templates)), [subject])
    return result.metrics | {"images": result.examples, "skipped": result.skipped}, None


def grounding(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> tuple[Metrics, None]:
    """How far the boxes that the decoder finds for texts are from those of the examples; ``grounding.py``."""
    return boxes(evaluation.embedder, weights, evaluation.source), None


PROTOCOLS: dict[str, Callable[[Evaluation, Variables, Classifiers], tuple[Metrics, Embedded | None]]] = {
    "retrieval": retrieval,
    "zero_shot": zero_shot,
    "composition": by_runner,
    "corruptions": by_runner,
    "typographic": by_runner,
    "adversarial": by_runner,
    "cues": by_runner,
    "grounding": grounding,
    "probe": probe,
    "dense": dense,
}
LABELED = ("zero_shot", "corruptions", "typographic", "adversarial", "probe")
"""Protocols that need labels."""
CUES = "shapes:zero_shot"
OF_SCENES = {"composition": "shapes:heldout", "cues": CUES, "dense": "shapes:heldout"}
"""Protocols on the bundled scenes alone."""


def evaluate(
    evaluation: Evaluation, weights: Variables, classifiers: Classifiers | None = None
) -> tuple[Metrics, Embedded | None]:
    """Metrics named ``eval/<name>/<metric>``, and the embeddings from which they were computed, if any.

    Evaluations that are given the same ``classifiers`` encode the same prompts once; give other weights another dict.
    """
    classifiers = {} if classifiers is None else classifiers
    metrics, embedded = PROTOCOLS[evaluation.protocol](evaluation, weights, classifiers)
    return {f"eval/{evaluation.name}/{name}": value for name, value in metrics.items()}, embedded


def check(evaluation: Evaluation) -> None:
    """Raises UserError for a source that the protocol cannot use."""
    where = f"config.eval.{evaluation.name}.source={evaluation.source.name}"
    if evaluation.protocol in LABELED and not evaluation.source.class_names:
        reasons = "".join(f"; {note}" for note in notes(evaluation.source))
        raise UserError(f"{where}: its examples have no labels to classify{reasons}")
    scenes = OF_SCENES.get(evaluation.protocol, "")
    if scenes and not (hasattr(evaluation.source, "describe") and (evaluation.source.class_names or scenes != CUES)):
        raise UserError(f"{where}: {evaluation.protocol} is measured on the bundled scenes: {scenes}")
    if evaluation.protocol == "probe":
        _check_train(evaluation)
    tower = evaluation.embedder.model.architecture.image
    if evaluation.protocol == "dense" and (tower.has_batch_norm or tower.pooling == "queries"):
        raise UserError(
            f"config.eval.{evaluation.name}.protocol=dense: the patches of "
            f"{'a ResNet' if tower.has_batch_norm else 'a pool of several queries'} cannot be compared with texts"
        )
    if evaluation.protocol == "grounding" and evaluation.embedder.encoders.complete is None:
        raise UserError(
            f"config.eval.{evaluation.name}.protocol=grounding: the model has no decoder that finds boxes; give "
            "config.objectives.captioning and config.objectives.grounding a weight"
        )


def _check_train(evaluation: Evaluation) -> None:
    source, train = evaluation.source, evaluation.train
    where = f"config.eval.{evaluation.name}.train={train.name}"
    if tuple(train.class_names) != tuple(source.class_names):
        raise UserError(f"{where}: its classes are not those of {source.name}")
    if train.fingerprint == source.fingerprint:
        raise UserError(f"{where}: the images on which the probe is tested; fit it on others")


def check_one_batch(evaluation: Evaluation, weights: Variables) -> None:
    """Embeds one batch, so that a source without usable examples is reported before training and not after it."""
    try:
        for source in (evaluation.source, evaluation.train):
            if source is None:
                continue
            embedded = embed_source(evaluation.embedder, weights, source, limit=evaluation.embedder.batch_size)
            if source.class_names and evaluation.protocol in LABELED:
                _check_labels(source, embedded)
    except UserError as error:
        raise UserError(f"config.eval.{evaluation.name}: {error}") from error


def _check_labels(source: Source, embedded: Embedded) -> None:
    """Raises UserError for a label that is no class: counted as wrong, it would only lower the accuracy."""
    classes = len(source.class_names)
    wrong = np.flatnonzero((embedded.labels < 0) | (embedded.labels >= classes))
    if len(wrong):
        raise UserError(
            f"{source.name}: {len(wrong)} of {len(embedded.labels)} labels are not in 0..{classes - 1} "
            f"(example {embedded.indices[wrong[0]]} has {embedded.labels[wrong[0]]}); correct or remove these examples"
        )


def _subject(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> Subject:
    scale = float(np.exp(np.asarray(weights.params["logit_scale"])))
    return Subject(evaluation.name, evaluation.embedder, weights, scale, evaluation.tokenizer, classifiers)


def _prompts(evaluation: Evaluation) -> Prompts:
    return Prompts(tuple(evaluation.source.class_names), evaluation.templates)


def _counts(embedded: Embedded) -> Metrics:
    return {"images": len(embedded.images), "skipped": embedded.skipped.total()}
