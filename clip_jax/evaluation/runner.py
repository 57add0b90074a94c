"""What is measured at an evaluation: held-out loss and retrieval of one source, zero-shot accuracy of another."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from clip_jax.data import images
from clip_jax.data.sources import Source
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.evaluation import retrieval, zero_shot
from clip_jax.evaluation.embed import Embedded, Encoders, Weights, embed_source, embed_texts
from clip_jax.presets import Preprocess
from clip_jax.reports.gallery import Gallery

GALLERY_PAIRS = 16


class Evaluator(NamedTuple):
    """Towers with what they need to take a source in."""

    encoders: Encoders
    tokenizer: Tokenizer
    image_size: int
    preprocess: Preprocess
    mesh: Mesh
    batch_size: int
    workers: int

    def embed(self, weights: Weights, source: Source) -> Embedded:
        return embed_source(
            source,
            self.encoders,
            weights,
            self.tokenizer,
            self.image_size,
            self.preprocess,
            self.mesh,
            self.batch_size,
            workers=self.workers,
        )

    def heldout(
        self, weights: Weights, source: Source, scale: float, bias: float | None = None
    ) -> tuple[dict[str, float], Embedded]:
        """Loss over all pairs as one batch (an image's first caption is its pair), and recall at 1, 5 and 10.

        The loss is the softmax one, or with a ``bias`` the sigmoid one.
        """
        embedded = self.embed(weights, source)
        _, first = np.unique(embedded.owner, return_index=True)
        metrics = {"loss": retrieval.loss(embedded.images, embedded.texts[first], scale, bias)}
        metrics |= retrieval.recall(embedded.images, embedded.texts, embedded.owner)
        metrics |= {"images": len(embedded.images), "skipped": embedded.skipped.total()}
        return metrics, embedded

    def zero_shot(self, weights: Weights, source: Source, templates: Sequence[str]) -> dict[str, float]:
        """Accuracy among the source's classes."""
        embedded = self.embed(weights, source)

        def encode(prompts: Sequence[str]) -> np.ndarray:
            return embed_texts(prompts, self.encoders, weights, self.tokenizer, self.mesh, self.batch_size)

        classes = zero_shot.classifier(source.class_names, templates, encode)
        metrics = zero_shot.accuracy(embedded.images, embedded.labels, classes)
        return metrics | {"images": len(embedded.images), "skipped": embedded.skipped.total()}

    def gallery(self, embedded: Embedded, source: Source) -> Gallery:
        """Some pairs of a source, evenly spread, for people to look at."""
        chosen = np.unique(np.linspace(0, len(embedded.images) - 1, GALLERY_PAIRS).astype(int))
        _, first = np.unique(embedded.owner, return_index=True)
        texts = first[chosen]
        pixels = [
            images.resize_and_crop(
                source[int(index)].image,
                self.image_size,
                resize=self.preprocess.resize,
                interpolation=self.preprocess.interpolation,
            )
            for index in embedded.indices[chosen]
        ]
        return Gallery(
            images=np.stack(pixels),
            captions=tuple(embedded.captions[t] for t in texts),
            similarity=(embedded.images[chosen] @ embedded.texts[texts].T).astype(np.float32),
            dataset=source.name,
        )
