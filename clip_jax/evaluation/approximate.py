"""Approximate nearest-neighbor search by faiss, for more vectors than fit into memory; an extra package.

An inverted file holds compressed vectors (8 bits a feature, or a product quantizer's codes). Of each query a shortlist
is found among the lists that are nearest to it, and ranked again by the vectors themselves, which stay on disk. The
number of lists that are searched is the smallest power of two that reaches the wanted recall.

Recall here is the share of the exact k nearest that are found, on queries of the index itself: captions for images,
where there are any, because queries by text are far from all images and therefore the harder ones.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax.errors import UserError
from clip_jax.evaluation.ranking import check_finite
from clip_jax.evaluation.search import Hits, search
from clip_jax.storage import atomic

SHORTLIST = 10
"""Vectors that are ranked exactly for each hit that is wanted."""
PER_LIST = 39
"""Vectors from which faiss fits a list at the least, before it warns."""
SAMPLED = 256 * PER_LIST
K = 10
QUERIES = 200
BLOCK = 65_536

Vectors = Sequence[Float[np.ndarray, "n dim"]]


class Approximate(NamedTuple):
    """A faiss index of vectors, and what was measured of it."""

    index: Any
    factory: str
    """faiss's description, such as ``IVF256,SQ8``."""
    probes: int
    """Lists that are searched for each query."""
    recall: float
    """The share of the exact 10 nearest vectors that are found."""

    def described(self) -> str:
        """One line for a terminal."""
        lists = _ivf(self.index).nlist
        return f"faiss {self.factory}, {self.probes} of {lists} lists: recall@{K} {self.recall:.3f} of the exact answer"


def open_index(
    path: Path,
    vectors: Vectors,
    queries: Float[np.ndarray, "queries dim"],
    factory: str,
    recall: float,
    mesh: Mesh | None = None,
) -> Approximate:
    """Reads the index at ``path``, or builds and writes it if there is none for these vectors and settings.

    ``factory``: faiss's description of an index with inverted lists; empty: chosen by the number of vectors. Raises
    UserError for a description that faiss does not know and without faiss.
    """
    faiss = import_faiss()
    factory = factory or f"IVF{_lists(sum(map(len, vectors)))},SQ8"
    wanted = {"vectors": [len(part) for part in vectors], "dim": vectors[0].shape[1], "factory": factory}
    about = path.with_suffix(".json")
    try:
        stored = json.loads(about.read_text(encoding="utf-8"))
        if all(stored.get(key) == value for key, value in wanted.items()) and stored["wanted"] == recall:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            return Approximate(index, factory, stored["probes"], stored["recall"])
    except (OSError, ValueError, KeyError, RuntimeError):
        pass  # none, or one that was not completed: it is built again
    built = measure(build(vectors, factory), factory, vectors, queries, recall, mesh)
    with atomic.replacing(path) as temporary:
        faiss.write_index(built.index, str(temporary))
    atomic.write_text(
        about, json.dumps(wanted | {"wanted": recall, "probes": built.probes, "recall": built.recall}) + "\n"
    )
    return built


def build(vectors: Vectors, factory: str) -> Any:
    """A trained faiss index of all vectors, block by block. Raises UserError."""
    faiss = import_faiss()
    try:
        index = faiss.index_factory(vectors[0].shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        faiss.extract_index_ivf(index)
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1]
        raise UserError(f"{factory}: not an index of faiss with inverted lists, such as IVF256,SQ8 ({line})") from error
    count = sum(map(len, vectors))
    sampled = np.linspace(0, count - 1, min(count, max(SAMPLED, PER_LIST * _ivf(index).nlist))).astype(np.int64)
    index.train(_finite(rows(vectors, sampled)))
    for part in vectors:
        for start in range(0, len(part), BLOCK):
            index.add(_finite(np.asarray(part[start : start + BLOCK], np.float32)))
    return index


def measure(
    index: Any,
    factory: str,
    vectors: Vectors,
    queries: Float[np.ndarray, "queries dim"],
    recall: float,
    mesh: Mesh | None = None,
) -> Approximate:
    """The fewest lists, a power of two, with at least this recall, or all; against exact search."""
    exact = search(queries, vectors, K, mesh).number
    probes, lists = 1, _ivf(index).nlist
    while True:
        found = Approximate(index, factory, min(probes, lists), 0.0)
        found = found._replace(recall=recall_of(nearest(found, vectors, queries, K).number, exact))
        if found.recall >= recall or probes >= lists:
            return found
        probes *= 2


def recall_of(found: Int[np.ndarray, "queries k"], exact: Int[np.ndarray, "queries k"]) -> float:
    """The share of the exact hits that were found; -1 stands for no hit."""
    there = exact >= 0
    same = (exact[:, :, None] == found[:, None, :]).any(axis=2)
    return float((same & there).sum() / there.sum())


def nearest(approximate: Approximate, vectors: Vectors, queries: Float[np.ndarray, "queries dim"], k: int) -> Hits:
    """``Hits`` as of exact search; the similarities are exact."""
    check_finite(queries=queries)
    _ivf(approximate.index).nprobe = approximate.probes
    count = min(SHORTLIST * k, sum(map(len, vectors)))
    _, numbers = approximate.index.search(np.ascontiguousarray(queries, np.float32), count)
    there = np.unique(numbers[numbers >= 0])
    candidates = rows(vectors, there)
    similarity = np.where(
        numbers >= 0,
        np.take_along_axis(queries @ candidates.T, np.searchsorted(there, np.maximum(numbers, there[0])), 1),
        -np.inf,
    )
    similarity = np.where(np.isfinite(similarity), similarity, -np.inf)
    order = np.lexsort((numbers, -similarity), axis=1)[:, :k]
    similarity, numbers = np.take_along_axis(similarity, order, 1), np.take_along_axis(numbers, order, 1)
    missing = ((0, 0), (0, k - order.shape[1]))
    numbers = np.where(np.isfinite(similarity), numbers, -1)
    return Hits(np.pad(similarity, missing, constant_values=-np.inf), np.pad(numbers, missing, constant_values=-1))


def rows(vectors: Vectors, numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
    """The vectors with these numbers, which ascend; only they are read."""
    starts = np.cumsum([0, *map(len, vectors)])
    cuts = np.searchsorted(numbers, starts)
    found = [
        np.asarray(part[numbers[low:high] - start], np.float32)
        for part, start, low, high in zip(vectors, starts[:-1], cuts[:-1], cuts[1:], strict=True)
        if high > low
    ]
    return np.concatenate(found)


def _finite(vectors: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
    """A vector that is not finite would spoil the quantizer, or be near to every query."""
    return np.where(np.isfinite(vectors).all(axis=1, keepdims=True), vectors, 0)


def import_faiss():
    """Raises UserError without it."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("approximate search needs extra packages: pip install 'clip-jax-tpu[approximate]'") from error
    return faiss


def _ivf(index: Any) -> Any:
    return import_faiss().extract_index_ivf(index)


def _lists(count: int) -> int:
    """About 4 sqrt(n), as faiss's guidelines advise, where there are enough vectors to fit them."""
    return max(1, min(int(4 * count**0.5), count // PER_LIST))
