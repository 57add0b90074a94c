"""Image-text pairs in this process's memory, for notebooks and scripts.

    memory.put("mine", images, captions)
    loop.run(workdir="runs/mine", recipe="own_images:memory:mine", overrides={})

Images are arrays of pixels or bytes of files. Every process of a run must put the same pairs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from clip_jax.data.sources.captions import clean
from clip_jax.data.sources.sample import BadSampleError, Sample
from clip_jax.errors import UserError, nearest

_SOURCES: dict[str, "MemorySource"] = {}


@dataclass(frozen=True)
class MemorySource:
    """Pairs of this process."""

    name: str
    fingerprint: str
    class_names: tuple[str, ...]
    images: Sequence[bytes | np.ndarray] = field(repr=False)
    captions: Sequence[tuple[str, ...]] = field(repr=False)
    labels: Sequence[int] = field(repr=False)
    former_fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        key = f"{self.name}[{index}]"
        if not self.captions[index]:
            raise BadSampleError("empty caption", key)
        return Sample(self.images[index], self.captions[index], key, self.labels[index])


def put(
    name: str,
    images: Sequence[bytes | UInt8[np.ndarray, "height width 3"]],
    captions: Sequence[str | Sequence[str]],
    *,
    labels: Sequence[int] = (),
    class_names: Sequence[str] = (),
) -> MemorySource:
    """Makes the pairs available as ``memory:NAME``, in place of earlier ones; returns their source.

    An image may have several captions; ``labels`` index ``class_names``. Raises UserError for lengths that differ and
    for labels that are no class.
    """
    where, labels = f"memory:{name}", [int(label) for label in labels]
    if len(captions) != len(images) or (labels and len(labels) != len(images)):
        raise UserError(f"{where}: {len(images)} images, {len(captions)} captions and {len(labels)} labels")
    if not len(images):
        raise UserError(f"{where}: no pairs")
    if wrong := [label for label in labels if not 0 <= label < len(class_names)]:
        raise UserError(f"{where}: label {wrong[0]} is none of the {len(class_names)} class names")
    texts = [clean([given] if isinstance(given, str) else given) for given in captions]
    digest = hashlib.sha256(repr((texts, labels, tuple(class_names))).encode())
    for image in images:
        digest.update(image if isinstance(image, bytes) else f"{image.dtype} {image.shape}".encode() + image.tobytes())
    _SOURCES[name] = MemorySource(
        name=where,
        fingerprint=digest.hexdigest()[:24],
        class_names=tuple(class_names),
        images=list(images),
        captions=[tuple(found) for found in texts],
        labels=labels or [-1] * len(images),
    )
    return _SOURCES[name]


def open_memory(where: str) -> MemorySource:
    """The pairs of that name. Raises UserError."""
    if where not in _SOURCES:
        raise UserError(
            f"memory:{where}: no pairs of this name in this process{nearest(where, _SOURCES)}; "
            f"clip_jax.data.sources.memory.put({where!r}, images, captions) before"
        )
    return _SOURCES[where]
