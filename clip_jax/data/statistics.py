"""Statistics of a source: sizes, shapes, captions, duplicates and unusable examples, from evenly spaced examples."""

import collections
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from clip_jax.data import images
from clip_jax.data.sources.sample import BadSampleError, Sample, Source
from clip_jax.data.stream import read

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


class Statistics(NamedTuple):
    examples: int
    """The number of examples in the source."""
    inspected: int
    quantiles: dict[str, tuple[float, ...]]
    """Name of a measure -> its values at QUANTILES."""
    captions: int
    same_captions: int
    """Captions that another inspected example has too."""
    same_images: int
    faults: collections.Counter
    """Unusable examples by reason."""
    labels: int
    """Different labels; 0 if there are none."""
    shown: tuple[tuple[np.ndarray, Sample], ...]
    """Pixels uint8[h, w, 3] of some examples, with the examples."""


class _Seen(NamedTuple):
    sample: Sample
    width: int
    height: int
    size: int
    digest: bytes
    picture: np.ndarray | None


def inspect(source: Source, inspected: int, shown: int, thumbnail: int, workers: int) -> Statistics:
    """Reads and decodes ``inspected`` examples, evenly spaced, and keeps ``shown`` pictures of them."""
    count = min(inspected, len(source))
    indices = [i * len(source) // count for i in range(count)]
    kept = {indices[i * count // min(shown, count)] for i in range(min(shown, count))}

    def look(index: int) -> _Seen | str:
        try:
            sample = read(source, index)
            image = images.decode(sample.image)
        except images.BadImageError as error:
            return str(error)
        except BadSampleError as error:
            return error.reason
        data = sample.image if isinstance(sample.image, bytes) else sample.image.tobytes()
        picture = None
        if index in kept:
            small = image.copy()
            small.thumbnail((thumbnail, thumbnail))
            picture = np.asarray(small)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return _Seen(sample._replace(image=b""), *image.size, len(data), digest, picture)

    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(look, indices))
    seen = [entry for entry in found if isinstance(entry, _Seen)]
    texts = [text for entry in seen for text in dict.fromkeys(entry.sample.captions)]
    measures = {
        "width (px)": [entry.width for entry in seen],
        "height (px)": [entry.height for entry in seen],
        "width / height": [entry.width / entry.height for entry in seen],
        "file (kB)": [entry.size / 1000 for entry in seen],
        "captions per example": [len(entry.sample.captions) for entry in seen],
        "caption (characters)": [len(text) for text in texts],
        "caption (words)": [len(text.split()) for text in texts],
    }
    return Statistics(
        examples=len(source),
        inspected=count,
        quantiles={name: tuple(np.quantile(values, QUANTILES)) for name, values in measures.items() if values},
        captions=len(texts),
        same_captions=len(texts) - len(set(texts)),
        same_images=len(seen) - len({entry.digest for entry in seen}),
        faults=collections.Counter(entry for entry in found if isinstance(entry, str)),
        labels=len({entry.sample.label for entry in seen} - {-1}),
        shown=tuple((entry.picture, entry.sample) for entry in seen if entry.picture is not None),
    )
