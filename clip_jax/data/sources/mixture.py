"""Several sources as one: the samples of the first, then those of the second, and so on.

How often each is seen is a matter of the order (``data/order.py``: ``mix``); names, keys and fingerprints are here.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from clip_jax.data.sources.sample import Sample, Source, notes


@dataclass(frozen=True)
class Mixture:
    """Made by ``open_mixture``."""

    name: str
    fingerprint: str
    parts: tuple[Source, ...]
    starts: tuple[int, ...] = field(repr=False)
    """The first sample of each part, and the number of all."""
    former_fingerprint: str = ""
    class_names: tuple[str, ...] = ()
    """Always empty: labels of different sources mean different things."""

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self.starts, index) - 1
        return self.parts[part][index - self.starts[part]]._replace(label=-1)

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the parts, each with the name of its part."""
        return tuple(f"{part.name}: {note}" for part in self.parts for note in notes(part))

    def some(self, count: int) -> list[int]:
        """About ``count`` samples: the first ones of each part, the same number from each that has enough."""
        each = -(-count // len(self.parts))
        ranges = itertools.pairwise(self.starts)
        return [index for start, end in ranges for index in range(start, min(end, start + each))]


def open_mixture(parts: Sequence[Source], weights: Sequence[float]) -> Mixture:
    """The parts in their order. The weights are in the fingerprint, because other weights give other batches."""
    content = json.dumps([(part.fingerprint, weight) for part, weight in zip(parts, weights, strict=True)])
    return Mixture(
        name=" + ".join(f"{part.name} x {weight:g}" for part, weight in zip(parts, weights, strict=True)),
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:24],
        parts=tuple(parts),
        starts=tuple(itertools.accumulate((len(part) for part in parts), initial=0)),
    )
