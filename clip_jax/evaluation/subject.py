"""What a protocol works on: a task, one or several models with the embeddings they keep, and the result it gives."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from clip_jax.data.sources.sample import Source
from clip_jax.errors import UserError
from clip_jax.evaluation import prompts, ranking, zero_shot
from clip_jax.evaluation.embed import Embedded, Embedder, Variables, embed_source, embed_texts
from clip_jax.evaluation.prompts import Prompts
from clip_jax.presets import Preprocess

EMBEDDED_SOURCES = 4
"""Sources whose embeddings are kept: as many as a suite uses for several tasks."""


Classifiers = dict[str, Float[np.ndarray, "classes dim"]]
"""The class vectors of one version of the weights, by the fingerprint of the prompts."""


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
    labels: Any = None
    """Right classes other than the data's own (``label_maps.LabelMap``)."""
    language: str = "en"


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
    indices: Int[np.ndarray, " queries"] | None = None
    """The number in the source of the example of each value of ``hits``, where that is one example."""


def fingerprint(weights: Variables, tokenizer: str, image_size: int, preprocess: Preprocess) -> str:
    """A hash that changes with the model and with its training step."""
    digest = hashlib.sha256(f"{tokenizer} {image_size} {preprocess}".encode())
    for path, leaf in jax.tree_util.tree_flatten_with_path(weights)[0]:
        flat = jnp.asarray(leaf, jnp.float32).ravel()
        # The first numbers and two sums of all: reading back every number would take longer than some evaluations.
        start = np.asarray(jnp.concatenate([flat[:64], jnp.array([flat.sum(), jnp.abs(flat).sum()])]))
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + start.tobytes())
    return digest.hexdigest()[:16]


class Subject:
    """A model with its embeddings: each source is embedded once, each set of prompts becomes a classifier once.

    ``classifiers`` are those that other subjects with the same weights made, and receive those that this one makes.
    """

    def __init__(
        self,
        name: str,
        embedder: Embedder,
        weights: Variables,
        scale: float,
        tokenizer: str,
        classifiers: Classifiers | None = None,
    ):
        self.name, self.embedder, self.weights, self.scale, self.tokenizer = name, embedder, weights, scale, tokenizer
        self._embedded: dict[tuple[str, bool], Embedded] = {}
        self._classifiers = {} if classifiers is None else classifiers

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.weights, self.tokenizer, self.embedder.image_size, self.embedder.preprocess)

    def embed(self, source: Source, *, texts: bool) -> Embedded:
        """The embeddings of a source. Raises UserError if they are not finite."""
        key = source.fingerprint, texts
        if key not in self._embedded:
            while len(self._embedded) >= EMBEDDED_SOURCES:
                self._embedded.pop(next(iter(self._embedded)))
            embedded = embed_source(self.embedder, self.weights, source, texts=texts)
            self.check(source.name, images=embedded.images, texts=embedded.texts)
            self._embedded[key] = embedded
        return self._embedded[key]

    def pooled(self) -> "Subject":
        """This model with image features before the projection, as they are (``CLIP.pool_image``)."""
        return Subject(self.name, self.embedder.pooled(), self.weights, self.scale, self.tokenizer)

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """The embeddings of texts. Raises UserError if they are not finite."""
        found = embed_texts(self.embedder, self.weights, texts)
        self.check("prompts", texts=found)
        return found

    def check(self, of: str, **embeddings: Float[np.ndarray, "n dim"]) -> None:
        """Raises UserError for embeddings of something that are not finite."""
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


Ensemble = Sequence[tuple[Subject, float]]


def labeled(source: Source, models: Ensemble) -> Embedded:
    embedded = models[0][0].embed(source, texts=False)
    outside = (embedded.labels < 0) | (embedded.labels >= len(source.class_names))
    if outside.any():
        raise UserError(
            f"{source.name}: {int(outside.sum())} images have no label among {len(source.class_names)} classes"
        )
    return embedded


def class_probabilities(task: Task, models: Ensemble) -> Float[np.ndarray, "images classes"]:
    mixed = 0.0
    for model, share in models:
        cosines = model.embed(task.source, texts=False).images @ model.classifier(task.prompts).T
        logits = model.scale * cosines.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        exponent = np.exp(logits)
        mixed = mixed + share * exponent / exponent.sum(axis=1, keepdims=True)
    return mixed


def judge(task: Task, models: Ensemble) -> zero_shot.Judged:
    labels, probabilities = labeled(task.source, models).labels, class_probabilities(task, models)
    return judge_probabilities(probabilities, labels, models)


def judge_probabilities(
    probabilities: np.ndarray, labels: np.ndarray, models: Ensemble, only: Sequence[int] | None = None
) -> zero_shot.Judged:
    cosines = as_cosines(probabilities, models)
    return zero_shot.judge(cosines, labels, np.eye(probabilities.shape[1]), only=only)


def as_cosines(
    probabilities: Float[np.ndarray, "images classes"], models: Ensemble
) -> Float[np.ndarray, "images classes"]:
    """Log-probabilities divided by the scale differ as cosines do, so that ties mean the same for an ensemble."""
    scale = sum(share * model.scale for model, share in models)
    return np.log(np.maximum(probabilities, 1e-300)) / scale


def mean_cosines(
    task: Task, models: Ensemble, images: Int[np.ndarray, " pairs"], texts: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    """The cosines of pairs of an image and a text of a source, by their rows in its embeddings; float64."""
    total = np.zeros(len(images))
    for model, share in models:
        found = model.embed(task.source, texts=True)
        total += share * np.sum(found.images[images].astype(np.float64) * found.texts[texts], axis=1)
    return total
