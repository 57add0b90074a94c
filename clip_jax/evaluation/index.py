"""Folders of embeddings in clip-retrieval's layout, written shard by shard, and read for search.

    DIR/img_emb/img_emb_0.npy      float16 or float32[n, dim], unit length
    DIR/text_emb/text_emb_0.npy    the embedding of the first caption of each image
    DIR/metadata/metadata_0.parquet    image_path, caption, index (in the source), one row per embedding
    DIR/index.json                 the source and the model; a folder with another source or model is rejected

A shard is a pure function of (source, model, its number): existing shards are skipped, a cluster may write them in any
order, and the Parquet file, written last, shows that its shard is complete. Unusable examples are skipped and counted.
"""

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.stream import read
from clip_jax.errors import UserError
from clip_jax.evaluation.embed import Embedded
from clip_jax.storage import atomic

KINDS = {"image": "img_emb", "text": "text_emb"}
MANIFEST = "index.json"


class Part:
    """A source of the examples ``start`` to ``stop`` of another source."""

    def __init__(self, source: Source, start: int, stop: int):
        self.source, self.start, self.stop = source, start, min(stop, len(source))
        self.name, self.class_names = source.name, source.class_names
        self.fingerprint = f"{source.fingerprint}-{start}-{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.start + index]


def prepare(output: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder, or checks that it was begun with the same model, source and shards. Raises UserError."""
    path = output / MANIFEST
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in manifest if stored.get(key, manifest[key]) != manifest[key]]
        if changed:
            raise UserError(f"{output}: begun with another {', '.join(changed)}; use a new folder")
        return
    for folder in (*KINDS.values(), "metadata"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(manifest, indent=1) + "\n")


def is_complete(output: Path, shard: int) -> bool:
    return (output / "metadata" / f"metadata_{shard}.parquet").is_file()


def write_shard(
    output: Path, shard: int, source: Source, embed: Callable[[Source], Embedded], size: int, dtype: str
) -> int:
    """Embeds and writes one shard; returns the number of its embeddings. Raises UserError for ones not finite."""
    import pyarrow
    from pyarrow import parquet

    part = Part(source, shard * size, (shard + 1) * size)
    found = embed(part)
    _, first = np.unique(found.owner, return_index=True)
    arrays = {"image": found.images, "text": found.texts[first]}
    for kind, rows in arrays.items():
        if not np.isfinite(rows).all():
            raise UserError(f"{source.name}, shard {shard}: {kind} embeddings are not finite; the model is broken")
        path = output / KINDS[kind] / f"{KINDS[kind]}_{shard}.npy"
        with atomic.replacing(path) as temporary:
            np.save(temporary, rows.astype(dtype))
    keys = [_key(part, int(index)) for index in found.indices]
    table = pyarrow.table(
        {
            "image_path": keys,
            "caption": [found.captions[t] for t in first],
            "index": (found.indices + part.start).astype(np.int64),
        }
    )
    with atomic.replacing(output / "metadata" / f"metadata_{shard}.parquet") as temporary:
        parquet.write_table(table, temporary)
    return len(found.images)


def embeddings(folder: Path, kind: str) -> list[np.ndarray]:
    """The memory-mapped ``image`` or ``text`` embeddings of the complete shards, in the order of their numbers.

    Raises UserError if there are none.
    """
    complete = {_number(path) for path in metadata_files(folder)}
    found = _numbered(folder / KINDS[kind], f"{KINDS[kind]}_*.npy")
    paths = [path for path in found if _number(path) in complete]
    if not paths:
        raise UserError(f"{folder}/{KINDS[kind]}: no embeddings; write them with clip-jax embed --output={folder}")
    return [np.load(path, mmap_mode="r") for path in paths]


def metadata_files(folder: Path) -> list[Path]:
    """The Parquet files of the complete shards, in the order of their numbers."""
    return _numbered(folder / "metadata", "metadata_*.parquet")


def source_indices(folder: Path) -> Int[np.ndarray, " n"] | None:
    """The index in the source of every embedding; None for an index of clip-retrieval, which does not store it."""
    found = [_indices(path) for path in metadata_files(folder)]
    return None if any(each is None for each in found) else np.concatenate([np.zeros(0, np.int64), *found])


@functools.lru_cache(maxsize=1024)
def _indices(path: Path) -> Int[np.ndarray, " n"] | None:
    from pyarrow import parquet

    if "index" not in parquet.read_schema(path).names:
        return None
    return parquet.read_table(path, columns=["index"])["index"].to_numpy()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``prepare`` stored; empty for an index of clip-retrieval. Raises UserError for a broken file."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}/{MANIFEST}: cannot be read ({error})") from error


def rows_of_examples(folder: Path) -> Int[np.ndarray, " examples"]:
    """The number of each example's embedding through all shards; -1 for an unusable one."""
    examples = source_indices(folder)
    if examples is None:
        raise UserError(f"{folder}: does not say which example an embedding is of; clip-jax embed writes that")
    rows = np.full(int(examples.max(initial=-1)) + 1, -1, np.int64)
    rows[examples] = np.arange(len(examples))
    return rows


def manifest(folder: Path) -> dict[str, Any]:
    """The source and the model of a folder. Raises UserError where they are not stored."""
    found = read_manifest(folder)
    if not found:
        raise UserError(f"{folder}: no {MANIFEST}; clip-jax embed --output={folder} writes it")
    return found


def metadata(folder: Path, numbers: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of these embeddings, which are numbered through all shards."""
    from pyarrow import parquet

    files = [parquet.ParquetFile(path) for path in metadata_files(folder)]
    starts = np.cumsum([0, *(file.metadata.num_rows for file in files)])
    tables: dict[int, Any] = {}
    for number in numbers:
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        if shard not in tables:
            tables[shard] = files[shard].read()
        row = tables[shard].slice(number - int(starts[shard]), 1).to_pylist()
        yield row[0]


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """clip-retrieval numbers shards with or without leading zeros."""
    return sorted(folder.glob(pattern), key=_number)


def _number(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])


def _key(source: Source, index: int) -> str:
    try:
        return read(source, index).key
    except BadSampleError as error:  # it was readable a moment ago
        return error.key
