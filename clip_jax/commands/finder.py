"""An index that ``clip-jax embed`` wrote, together with the model that encodes queries for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from clip_jax.devices.sharding import make_mesh
from clip_jax.errors import UserError
from clip_jax.evaluation import index
from clip_jax.evaluation.approximate import QUERIES, Approximate, nearest, open_index, rows
from clip_jax.evaluation.search import search
from clip_jax.model import Model, load


class Finder(NamedTuple):
    """A folder of embeddings and a model of the same width."""

    folder: Path
    model: Model
    mesh: Mesh
    approximate: Mapping[str, Approximate] = {}
    """What is searched among -> an index of faiss in place of exact search."""

    def vectors(self, among: str) -> list[Float[np.ndarray, "n dim"]]:
        """The ``image`` or ``text`` embeddings of the complete shards, memory-mapped. Raises UserError."""
        found = index.embeddings(self.folder, among)
        if self.model.embed_dim != found[0].shape[1]:
            raise UserError(
                f"{self.folder}: embeddings of {found[0].shape[1]} features, but {self.model.name} has "
                f"{self.model.embed_dim}; search with the model that made them"
            )
        return found

    def find(self, queries: Float[np.ndarray, "queries dim"], among: str, k: int) -> list[list[dict[str, Any]]]:
        """The k nearest rows of each query, best first: their metadata and ``similarity``."""
        found = []
        vectors = self.vectors(among)
        if among in self.approximate:
            hits = nearest(self.approximate[among], vectors, queries, k)
        else:
            hits = search(queries, vectors, k, self.mesh)
        for similarity, number in zip(*hits, strict=True):
            there = number >= 0
            rows = index.metadata(self.folder, number[there].tolist())
            found.append([row | {"similarity": float(s)} for row, s in zip(rows, similarity[there], strict=True)])
        return found

    def approximately(self, among: str, factory: str, recall: float) -> Self:
        """Searches ``among`` by an index of faiss, which is stored beside the embeddings. Raises UserError."""
        vectors = self.vectors(among)
        try:
            asked = index.embeddings(self.folder, "text")
        except UserError:
            asked = vectors
        count = sum(map(len, asked))
        queries = rows(asked, np.linspace(0, count - 1, min(count, QUERIES)).astype(np.int64))
        queries = queries[np.isfinite(queries).all(axis=1)]
        path = self.folder / f"approximate_{among}.faiss"
        opened = open_index(path, vectors, queries, factory, recall, self.mesh)
        return self._replace(approximate={**self.approximate, among: opened})


def open_finder(folder: Path, model: str | None) -> Finder:
    """``model`` None: the one that the index was made with. Raises UserError."""
    name = model or index.read_manifest(folder).get("model_name")
    if name is None:
        raise UserError(f"{folder}/{index.MANIFEST}: does not name a model; give --model")
    return Finder(folder, load(name), make_mesh())
