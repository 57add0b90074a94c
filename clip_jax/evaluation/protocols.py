"""Named evaluations: what ``config.eval.<name>`` measures, on which source, and when.

A protocol is a function of an evaluation, weights, and the classifiers that other evaluations made with these weights.
A new one needs an entry in ``PROTOCOLS`` and its name in ``settings.EVALUATION_CHOICES``.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources.sample import Source, notes
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import Embedded, Embedder, Variables, embed_source
from clip_jax.evaluation.grounding import boxes
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
    _check_labels(evaluation, embedded)
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
}
LABELED = ("zero_shot", "corruptions", "typographic", "adversarial")
"""Protocols that need labels."""
CUES = "shapes:zero_shot"
OF_SCENES = {"composition": "shapes:heldout", "cues": CUES}
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
    if evaluation.protocol == "grounding" and evaluation.embedder.encoders.complete is None:
        raise UserError(
            f"config.eval.{evaluation.name}.protocol=grounding: the model has no decoder that finds boxes; give "
            "config.objectives.captioning and config.objectives.grounding a weight"
        )


def try_one_batch(evaluation: Evaluation, weights: Variables) -> None:
    """Embeds one batch, so that a source without usable examples is reported before training and not after it."""
    try:
        embedded = embed_source(evaluation.embedder, weights, evaluation.source, limit=evaluation.embedder.batch_size)
        if evaluation.source.class_names and evaluation.protocol in LABELED:
            _check_labels(evaluation, embedded)
    except UserError as error:
        raise UserError(f"config.eval.{evaluation.name}: {error}") from error


def _check_labels(evaluation: Evaluation, embedded: Embedded) -> None:
    """Raises UserError for a label that is no class: counted as wrong, it would only lower the accuracy."""
    classes = len(evaluation.source.class_names)
    wrong = np.flatnonzero((embedded.labels < 0) | (embedded.labels >= classes))
    if len(wrong):
        raise UserError(
            f"{evaluation.source.name}: {len(wrong)} of {len(embedded.labels)} labels are not in 0..{classes - 1} "
            f"(example {embedded.indices[wrong[0]]} has {embedded.labels[wrong[0]]}); correct or remove these examples"
        )


def _subject(evaluation: Evaluation, weights: Variables, classifiers: Classifiers) -> Subject:
    scale = float(np.exp(np.asarray(weights.params["logit_scale"])))
    return Subject(evaluation.name, evaluation.embedder, weights, scale, evaluation.tokenizer, classifiers)


def _prompts(evaluation: Evaluation) -> Prompts:
    return Prompts(tuple(evaluation.source.class_names), evaluation.templates)


def _counts(embedded: Embedded) -> Metrics:
    return {"images": len(embedded.images), "skipped": embedded.skipped.total()}
