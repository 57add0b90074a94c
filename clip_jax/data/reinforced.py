"""Stored embeddings of teachers for augmented views of a source (MobileCLIP's reinforced data, Vasu et al. 2024, 3.2).

    DIR/reinforce.json    the source, the teachers (width and scale of each), and how the crops are drawn
    DIR/image_0.npy       float16[examples, views, widths]: the unit embeddings of all teachers beside each other
    DIR/text_0.npy        float16[examples, captions, widths]; written last, so that its shard is complete

The parameters of a crop are not stored: they follow from (seed, example, view), for images of any size. What an
unusable image or a missing caption would have is NaN.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.data.images import random_resized_crop
from clip_jax.data.order import fold
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.data.tokenizers import Tokenizer
from clip_jax.data.views import Arrays, View
from clip_jax.errors import UserError
from clip_jax.storage import atomic

MANIFEST = "reinforce.json"


class Store(NamedTuple):
    """A folder of embeddings; its shards are memory-mapped."""

    folder: Path
    manifest: dict[str, Any]
    shards: dict[str, list[np.ndarray]]
    """``image`` and ``text`` -> the shards in their order."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def teachers(self) -> list[tuple[int, float]]:
        """(width, scale of the logits) of each."""
        return [(teacher["width"], teacher["scale"]) for teacher in self.manifest["teachers"]]

    def rows(self, kind: str, index: int) -> Float[np.ndarray, "rows widths"]:
        """The embeddings of an example's views or captions, those that there are."""
        shard, row = divmod(index, self.manifest["shard_size"])
        rows = self.shards[kind][shard][row]
        return rows[np.isfinite(rows[:, 0])]


def crop(image: bytes | np.ndarray, size: int, index: int, view: int, manifest: dict[str, Any], interpolation: str):
    """uint8[size, size, 3]: the same part of an image, whatever the size. Raises BadImageError."""
    rng = np.random.Generator(np.random.Philox(key=fold(manifest["seed"], index, view)))
    scale, ratio = manifest["crop_scale"], manifest["crop_ratio"]
    return random_resized_crop(image, size, rng, scale=scale, ratio=ratio, interpolation=interpolation).pixels


def views(
    store: Store, *, image_size: int, context_length: int, tokenizer: Tokenizer | None, interpolation: str
) -> dict[str, View]:
    """The pair's image and text, one of those that are stored, at random, each with its teachers' embedding."""
    width = sum(width for width, _ in store.teachers)

    def choose(kind: str, sample: Sample, rng: np.random.Generator, out: Arrays, most: int) -> int:
        rows = store.rows(kind, sample.index)[:most]
        if not len(rows):
            raise BadSampleError(f"no stored {kind} embedding", sample.key)
        number = int(rng.integers(len(rows)))
        out[f"teacher_{kind}"][:] = rows[number]
        return number

    def fill_image(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        view = choose("image", sample, rng, arrays, store.manifest["views"])
        arrays["image"][:] = crop(sample.image, image_size, sample.index, view, store.manifest, interpolation)

    def fill_text(sample: Sample, rng: np.random.Generator, arrays: Arrays) -> None:
        number = choose("text", sample, rng, arrays, len(sample.captions))
        arrays["text"][:] = tokenizer([sample.captions[number]])[0]

    embedding = ((width,), np.dtype(np.float16))
    return {
        "image": View(
            {"image": ((image_size, image_size, 3), np.dtype(np.uint8)), "teacher_image": embedding}, fill_image
        ),
        "text": View({"text": ((context_length,), np.dtype(np.int32)), "teacher_text": embedding}, fill_text),
    }


def open_store(folder: str) -> Store:
    """Raises UserError for a folder that is missing or incomplete."""
    path = Path(folder).expanduser()
    if not (path / MANIFEST).is_file():
        raise UserError(f"{folder}: no {MANIFEST}; clip-jax reinforce --output={folder} writes it")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    count = -(-manifest["examples"] // manifest["shard_size"])
    missing = [shard for shard in range(count) if not is_complete(path, shard)]
    if missing:
        raise UserError(f"{folder}: shard {missing[0]} of {count} is missing; repeat its clip-jax reinforce")
    shards = {
        kind: [np.load(path / f"{kind}_{shard}.npy", mmap_mode="r") for shard in range(count)]
        for kind in ("image", "text")
    }
    return Store(path, manifest, shards)


def prepare(output: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder, or checks that it was begun in the same way. Raises UserError."""
    path = output / MANIFEST
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in manifest if stored.get(key) != json.loads(json.dumps(manifest[key]))]
        if changed:
            raise UserError(f"{output}: begun with another {', '.join(changed)}; use a new folder")
        return
    output.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(manifest, indent=1) + "\n")


def is_complete(output: Path, shard: int) -> bool:
    return (output / f"text_{shard}.npy").is_file()


def write_shard(output: Path, shard: int, arrays: dict[str, Float[np.ndarray, "examples rows widths"]]) -> None:
    for kind in ("image", "text"):
        with atomic.replacing(output / f"{kind}_{shard}.npy") as temporary:
            np.save(temporary, arrays[kind].astype(np.float16))
